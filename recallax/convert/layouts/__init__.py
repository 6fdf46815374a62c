"""One weight layout per published architecture family."""
