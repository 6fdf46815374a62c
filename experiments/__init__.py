"""Experiments: one folder per question, with a sweep, its result rows and a report made from them."""
