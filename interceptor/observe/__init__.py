"""What an operator sees: log, service manager, metrics."""
