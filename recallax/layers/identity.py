"""Identity channel mixer of Zoology's synthetic models: y = x.

A block with this mixer is not a no-op: it adds the normalized residual stream, r <- r + norm(r), as Zoology's models
with an identity state mixer do. There is no state.
"""

from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.base import LayerInfo, MixerConfig
from recallax.layers.stateless import StatelessMixer
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class Identity(MixerConfig):
    """Identity channel mixer."""

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "IdentityMixer":
        return IdentityMixer()


class IdentityMixer(StatelessMixer):
    """Returns its input unchanged."""

    def apply(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return x
