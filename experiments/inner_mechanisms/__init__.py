"""The effect of forgetting, momentum, depth and chunk size in a neural memory, measured without training a model."""
