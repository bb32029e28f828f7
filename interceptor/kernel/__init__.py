"""Thin, typed wrappers, one a system call. Nothing here decides anything."""
