"""Weights of other projects and of runs: layouts, import, export, StableHLO programs."""
