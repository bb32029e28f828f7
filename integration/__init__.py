"""Integration: the project on real runtimes and real containers."""
