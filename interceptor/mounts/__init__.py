"""Mounts: what they are, what a request on one of them gets, and how composites are built and welded."""
