"""Containers of a real Docker engine."""
