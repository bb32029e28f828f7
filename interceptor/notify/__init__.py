"""The runtime's side of seccomp user notification."""
