"""Placeholder for an absent channel mixer: y = 0, without a norm before it and without a state.

Used in stacks whose layers have one sublayer each, a sequence mixer or a perceptron, such as Mamba's and Nemotron-H's.
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
    """No channel mixer: the block has one sublayer."""

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "ZeroMixer":
        return ZeroMixer()


class ZeroMixer(StatelessMixer):
    """Returns zeros."""

    def apply(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return jnp.zeros_like(x)
