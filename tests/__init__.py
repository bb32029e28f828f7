"""The tests: one file a module; unprivileged unless marked `root`."""
