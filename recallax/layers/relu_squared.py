"""The squared-ReLU channel mixer: y = W_out [ max(W_in x, 0)^2 ].

Source: So et al. 2021 (Primer, arXiv 2109.08668), section 3; the perceptron of Nemotron-H. Remembers nothing.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import ConfigError
from recallax.layers.base import LayerInfo, MixerConfig
from recallax.layers.dense import Linear, residual_std
from recallax.layers.stateless import StatelessMixer
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class ReLUSquared(MixerConfig):
    """A two-layer perceptron on each token, without a gate."""

    expand: int = 4
    """Inner width as a multiple of the model's."""
    intermediate_size: int | None = None
    """The inner width itself, in place of `expand`."""

    def __post_init__(self) -> None:
        if self.expand < 1 or (self.intermediate_size is not None and self.intermediate_size < 1):
            raise ConfigError(f"expand and inner of relu_squared must be at least 1: {self}")

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "ReLUSquaredMixer":
        return ReLUSquaredMixer(self, d_model, layer, precision=precision, rngs=rngs)


class ReLUSquaredMixer(StatelessMixer):
    """See the head of the file."""

    def __init__(self, config: ReLUSquared, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        inner = config.intermediate_size or config.expand * d_model
        self.up = Linear(d_model, inner, precision=precision, rngs=rngs, axes=("embed", "mlp"))
        self.out = Linear(
            inner, d_model, precision=precision, rngs=rngs, std=residual_std(layer.num_layers), axes=("mlp", "embed")
        )

    def apply(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self.out(jnp.square(jax.nn.relu(self.up(x))))
