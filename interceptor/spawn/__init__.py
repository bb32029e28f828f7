"""Namespaced children without an OCI runtime: what runc does between fork and exec, for `interceptor.library`."""
