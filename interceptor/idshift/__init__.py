"""Ownership of files: who owns what on disk and in a container, without a file ever being chowned on the way."""
