"""The containers that are guarded, and what they were created with."""
