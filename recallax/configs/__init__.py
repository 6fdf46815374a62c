"""One run per file."""
