"""Language model heads: from the final hidden states to logits over the vocabulary.

Every head ends in a product with a matrix of one row per token id. A head returns the two factors, so that a loss can
be computed without storing the logits of all positions (`linear_cross_entropy`).
"""

import abc
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import Config
from recallax.layers.dense import Linear, parameter
from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.types import Precision

INIT_STD = 0.02
"""Standard deviation of the initial head, as in GPT-2."""
MAX_WAVELENGTH = 10_000.0
"""Base of the sinusoidal positions (Vaswani et al. 2017, arXiv 1706.03762, section 3.5)."""


class LogitProjection(NamedTuple):
    """The factors of logits z = features W^T + b, with a cap c tanh(z / c)."""

    features: Float[Array, "B N F"]
    """In the compute dtype, which is also that of the product."""
    weight: Float[Array, "V F"]
    """W in the parameters' dtype."""
    bias: Float[Array, " V"] | None = None
    """b; None: no bias."""
    soft_cap: float | None = None
    """c; None: no cap."""

    def logits(self) -> Float[Array, "B N V"]:
        """Compute the logits.

        Returns:
            Float32 logits.
        """
        logits = einsum_f32("bnf,vf->bnv", self.features, self.weight.astype(self.features.dtype))
        logits = logits if self.bias is None else logits + self.bias.astype(jnp.float32)[None, None]
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)


class LMHeadModule(nnx.Module, abc.ABC):
    """A language model head."""

    @abc.abstractmethod
    def __call__(
        self,
        hidden: Float[Array, "B N D"],
        embedding: Float[Array, "V D"],
        last_hidden: Float[Array, "B D"],
        positions: Int[Array, "B N"],
    ) -> LogitProjection:
        """Compute the factors of the logits.

        Args:
            hidden: Hidden states at the positions whose logits are needed.
            embedding: The token embedding.
            last_hidden: Hidden states at each row's last token.
            positions: Positions in the document of the logits.

        Returns:
            The factors.
        """


class LMHead(Config, abc.ABC):
    """A map from hidden states to logits."""

    @abc.abstractmethod
    def build(self, d_model: int, vocab_size: int, *, precision: Precision, rngs: nnx.Rngs) -> LMHeadModule:
        """Build the module.

        Args:
            d_model: Width of the hidden states.
            vocab_size: The number of token ids.
            precision: The dtypes of parameters and computation.
            rngs: Random number generators of the parameters.

        Returns:
            The module.
        """


@dataclass(frozen=True, kw_only=True)
class Tied(LMHead):
    """Logits from the transposed embedding."""

    def build(self, d_model: int, vocab_size: int, *, precision: Precision, rngs: nnx.Rngs) -> LMHeadModule:
        return TiedModule()


class TiedModule(LMHeadModule):
    """z = h E^T."""

    def __call__(self, hidden: Array, embedding: Array, last_hidden: Array, positions: Array) -> LogitProjection:
        return LogitProjection(hidden, embedding)


@dataclass(frozen=True, kw_only=True)
class Untied(LMHead):
    """Logits from a separate matrix."""

    def build(self, d_model: int, vocab_size: int, *, precision: Precision, rngs: nnx.Rngs) -> LMHeadModule:
        return UntiedModule(d_model, vocab_size, precision=precision, rngs=rngs)


class UntiedModule(LMHeadModule):
    """z = h W."""

    def __init__(self, d_model: int, vocab_size: int, *, precision: Precision, rngs: nnx.Rngs):
        kernel = INIT_STD * jax.random.normal(rngs.params(), (d_model, vocab_size), precision.param)
        self.kernel = parameter(kernel, ("embed", "vocab"))

    def __call__(self, hidden: Array, embedding: Array, last_hidden: Array, positions: Array) -> LogitProjection:
        return LogitProjection(hidden, self.kernel[...].T)


@dataclass(frozen=True, kw_only=True)
class Autoencoder(LMHead):
    """MAD's head for compression: each token is reconstructed from the last token's hidden state and a position.

    logits_t = W_2 gelu(W_1 (h_last + sinusoid(t))) (Poli et al. 2024, arXiv 2403.17844, appendix on MAD). It reads the
    end of the row by design, so a model with it cannot decode.
    """

    hidden_size: int = 128
    """Width of the hidden layer."""

    def build(self, d_model: int, vocab_size: int, *, precision: Precision, rngs: nnx.Rngs) -> LMHeadModule:
        return AutoencoderModule(self, d_model, vocab_size, precision=precision, rngs=rngs)


class AutoencoderModule(LMHeadModule):
    """logits_t = W_2 gelu(W_1 (h_last + sinusoid(t))).

    Args:
        config: The head's config.
        d_model: Width of the hidden states.
        vocab_size: The number of token ids.
        precision: The dtypes of parameters and computation.
        rngs: Random number generators of the parameters.
    """

    def __init__(self, config: Autoencoder, d_model: int, vocab_size: int, *, precision: Precision, rngs: nnx.Rngs):
        std = d_model**-0.5
        self.inner = Linear(d_model, config.hidden_size, precision=precision, rngs=rngs, bias=True, std=std)
        self.outer = Linear(
            config.hidden_size,
            vocab_size,
            precision=precision,
            rngs=rngs,
            bias=True,
            std=config.hidden_size**-0.5,
            axes=(None, "vocab"),
        )

    def __call__(self, hidden: Array, embedding: Array, last_hidden: Array, positions: Array) -> LogitProjection:
        x = last_hidden[:, None].astype(jnp.float32) + _sinusoidal_embedding(positions, last_hidden.shape[-1])
        assert self.outer.bias is not None
        return LogitProjection(jax.nn.gelu(self.inner(x)), self.outer.kernel[...].T, self.outer.bias[...])


def _sinusoidal_embedding(positions: Int[Array, "B N"], width: int) -> Float[Array, "B N D"]:
    rate = MAX_WAVELENGTH ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions[..., None].astype(jnp.float32) * rate[None, None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[..., :width]
