"""Sequence models that recall well with little memory: architectures, kernels, tasks and one train loop in JAX.

Import the subpackages: `recallax.layers`, `recallax.models`, `recallax.tasks`, `recallax.train`, `recallax.sweep`,
`recallax.report`, `recallax.convert` and `recallax.pallas_kernels`. Importing `recallax` alone does not import JAX.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
