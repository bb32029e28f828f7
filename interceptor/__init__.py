"""Interception of the mount family in system containers; see README.md beside this file."""

from __future__ import annotations

# As in typing, which the hook does not import.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from interceptor.library import Interceptor

__all__ = ["Interceptor", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # The library pulls in the native module and the event loop. The hook, which runs while a runtime waits for it,
    # must not pay for that (PEP 562).
    if name == "Interceptor":
        from interceptor.library import Interceptor

        return Interceptor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
