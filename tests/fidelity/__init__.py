"""Fidelity (I4): the same calls in identical containers, with us and without, and what they answer."""
