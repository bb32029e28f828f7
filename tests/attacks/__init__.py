"""Attacks on what must hold whatever the guard answers. Each is run with a real, a careless and a random guard."""
