"""Real containers on stock runc, for the quickstart and for tests."""
