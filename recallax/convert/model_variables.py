"""The variables of a model that checkpoints contain: parameters and statistics."""

from flax import nnx

from recallax.layers.base import Statistic
from recallax.models.accounting import abstract_model
from recallax.models.lm import LM, LMConfig
from recallax.models.parameter_paths import ParameterPath, layer_paths, parameter_paths


def model_variables(config: LMConfig, vocab_size: int | None = None) -> tuple[LM, dict[str, ParameterPath]]:
    """Return the abstract model and the paths of its parameters and statistics.

    Args:
        config: The model config.
        vocab_size: The vocabulary size, for configs without one.

    Returns:
        The model with shapes instead of arrays, and the paths by name.
    """
    model = abstract_model(config, vocab_size)
    return model, parameter_paths(model, layer_paths(config.terms), (nnx.Param, Statistic))
