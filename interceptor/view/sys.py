"""The view's nodes in sysfs, one row a node."""

from __future__ import annotations

import stat

from interceptor.view.nodes import Row, real

ROWS: tuple[Row, ...] = (
    real(b"kernel", mode=stat.S_IFDIR | 0o755, cache_s=1.0),
    real(b"devices/virtual", mode=stat.S_IFDIR | 0o755, cache_s=1.0),
    # The container's own network devices: they come and go.
    real(b"devices/virtual/net"),
    # There only while the module is loaded.
    real(b"module/nf_conntrack/parameters"),
)
