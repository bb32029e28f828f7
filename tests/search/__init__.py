"""The search: random programs of mount operations by several processes of one container, and what must always hold."""
