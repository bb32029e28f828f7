"""A private Docker engine with this checkout's runtime, for tests and for the pages of README.md."""
