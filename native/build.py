"""Build description of ``interceptor._native`` (cffi, API mode).

``INTERCEPTOR_SANITIZE=1`` adds AddressSanitizer and UndefinedBehaviorSanitizer, for a run of ``integration/check``.
"""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
#: Source of the command ``interceptor-runc``, which setup.py builds.
FRONT = "native/front.c"
SOURCES = sorted({str(p.relative_to(HERE.parent)) for p in HERE.glob("*.c")} - {FRONT})
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wvla", "-Wformat=2"]
HARDENING = ["-fstack-protector-strong", "-fno-strict-overflow", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]
LINK = ["-Wl,-z,relro", "-Wl,-z,now", "-pthread"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]

FRONT_FLAGS = ["-std=gnu11", "-O2", *WARNINGS, *HARDENING, *LINK]

sanitized = os.environ.get("INTERCEPTOR_SANITIZE") == "1"

ffibuilder = FFI()
ffibuilder.cdef((HERE / "api.h").read_text())
ffibuilder.set_source(
    "interceptor._native",
    '#include "compat.h"',
    sources=SOURCES,
    include_dirs=["native"],
    extra_compile_args=[
        "-std=gnu11",
        "-O2",
        "-pthread",
        # cffi's own generated code has unused parameters and constants; ours is held to -Wextra by the same flags
        "-Wno-unused-parameter",
        *WARNINGS,
        *(SANITIZE if sanitized else HARDENING),
    ],
    extra_link_args=[*LINK, *(SANITIZE[:1] if sanitized else [])],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
