"""Logit of masked attention scores."""

MASKED_LOGIT = -1e30
"""Finite, so that a softmax over masked scores only does not give NaN."""
