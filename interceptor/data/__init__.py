"""Files that are installed as they are."""
