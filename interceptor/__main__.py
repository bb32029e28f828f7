"""``python -m interceptor``: the same as the ``interceptor`` command."""

from __future__ import annotations

from interceptor.cli import main

if __name__ == "__main__":
    main()
