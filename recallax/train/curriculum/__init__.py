"""Staged training: which parameters train, on what, and until when."""
