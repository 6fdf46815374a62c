"""Squared-ReLU channel mixer: y = W_out [ max(W_in x, 0)^2 ].

Source: So et al. 2021 (Primer, arXiv 2109.08668), section 3; Nemotron-H uses it. There is no state.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import require_at_least
from recallax.layers.base import LayerInfo, MixerConfig
from recallax.layers.dense import Linear, residual_linear
from recallax.layers.stateless import StatelessMixer
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class ReLUSquared(MixerConfig):
    """Two-layer perceptron with a squared ReLU."""

    expand: int = 4
    """Hidden width as a multiple of d_model."""
    intermediate_size: int | None = None
    """Hidden width in place of `expand`; None: expand * d_model."""

    def __post_init__(self) -> None:
        require_at_least(1, expand=self.expand, intermediate_size=self.intermediate_size)

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "ReLUSquaredMixer":
        return ReLUSquaredMixer(self, d_model, layer, precision=precision, rngs=rngs)


class ReLUSquaredMixer(StatelessMixer):
    """Perceptron with one hidden layer and a squared ReLU."""

    def __init__(self, config: ReLUSquared, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        inner = config.intermediate_size or config.expand * d_model
        self.up = Linear(d_model, inner, precision=precision, rngs=rngs, axes=("embed", "mlp"))
        self.out = residual_linear(inner, d_model, layer.num_layers, in_axis="mlp", precision=precision, rngs=rngs)

    def apply(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self.out(jnp.square(jax.nn.relu(self.up(x))))
