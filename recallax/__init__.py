"""Sequence models that recall well with little memory: architectures, kernels, tasks and one train loop in JAX."""

__version__ = "0.1.0"
