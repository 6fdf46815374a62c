"""The channel mixer that is not there: y = 0, and no norm before it. Remembers nothing.

For stacks whose layers have one sublayer each, as Mamba's and Nemotron-H's: a mixer or a perceptron, never both.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.base import LayerInfo, MixerConfig
from recallax.layers.stateless import StatelessMixer
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class NoChannelMixer(MixerConfig):
    """Adds nothing to the residual stream."""

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "ZeroMixer":
        return ZeroMixer()


class ZeroMixer(StatelessMixer):
    """See the head of the file."""

    def apply(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return jnp.zeros_like(x)
