"""One file per method of the search."""
