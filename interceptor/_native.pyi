"""The compiled module (cffi, API mode, from native/). Its functions are declared in native/api.h.

Untyped on purpose: interceptor/kernel and interceptor/guards, its only users, wrap each function with types.
"""

from typing import Any

ffi: Any
lib: Any
