"""The identity channel mixer of zoology's synthetic models: y = x.

Not a no-op inside a block: the block normalises its input and adds the result back, r <- r + norm(r), as zoology's
models with an identity state mixer do. Remembers nothing.
"""

from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.base import LayerInfo, MixerConfig
from recallax.layers.stateless import StatelessMixer
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class Identity(MixerConfig):
    """Returns its input."""

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "IdentityMixer":
        return IdentityMixer()


class IdentityMixer(StatelessMixer):
    """See the head of the file."""

    def apply(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return x
