"""Memories of equal bytes on recall of the last value of overwritten keys."""
