"""How it must hold up: faults, idleness, bad input, leaks. All of it as root, on real daemons and containers."""
