"""SwiGLU channel mixer: y = W_out [ silu(W_gate x) * W_up x ].

Source: Shazeer 2020 (arXiv 2002.05202), equation 6. There is no state.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import added_field, require_at_least
from recallax.layers.base import LayerInfo, MixerConfig
from recallax.layers.dense import Linear, residual_linear
from recallax.layers.stateless import StatelessMixer
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class SwiGLU(MixerConfig):
    """Two-layer perceptron with a SiLU gate (SwiGLU)."""

    expand: float = 8 / 3
    """Hidden width as a multiple of d_model (BASED: 2; Llama: 8/3)."""
    multiple_of: int = 1
    """The hidden width is rounded up to a multiple of this (BASED and Llama: 256)."""
    intermediate_size: int | None = added_field(None)
    """Hidden width in place of `expand` and `multiple_of`."""

    def __post_init__(self) -> None:
        require_at_least(1, intermediate_size=self.intermediate_size)

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "SwiGLUMixer":
        return SwiGLUMixer(self, d_model, layer, precision=precision, rngs=rngs)


class SwiGLUMixer(StatelessMixer):
    """Perceptron with one hidden layer and a SiLU gate."""

    def __init__(self, config: SwiGLU, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        rounded = -int(-config.expand * d_model // config.multiple_of) * config.multiple_of
        inner = config.intermediate_size or rounded
        self.up = Linear(d_model, 2 * inner, precision=precision, rngs=rngs, axes=("embed", "mlp"))
        self.out = residual_linear(inner, d_model, layer.num_layers, in_axis="mlp", precision=precision, rngs=rngs)

    def apply(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        gate, up = jnp.split(self.up(x), 2, axis=-1)
        return self.out(jax.nn.silu(gate) * up)
