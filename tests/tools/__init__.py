"""Today's tools, each the real program in a real guarded container."""
