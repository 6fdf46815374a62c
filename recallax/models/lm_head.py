"""From the last hidden states to logits over the vocabulary, at the positions that are asked for.

Every readout ends in one product with a matrix of a row per token. It stops short of it, so that a loss can be taken
without the logits of all positions (`linear_cross_entropy`).
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


class LogitProjection(NamedTuple):
    """Logits before the product that makes them: z = c tanh((features W^T + b) / c), without a cap just the product."""

    features: Float[Array, "B N F"]
    weight: Float[Array, "V F"]
    """In the parameters' dtype; the product is taken in that of the features."""
    bias: Float[Array, " V"] | None = None
    soft_cap: float | None = None

    def logits(self) -> Float[Array, "B N V"]:
        """Float32 logits."""
        logits = einsum_f32("bnf,vf->bnv", self.features, self.weight.astype(self.features.dtype))
        logits = logits if self.bias is None else logits + self.bias.astype(jnp.float32)[None, None]
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)


class LMHeadModule(nnx.Module, abc.ABC):
    """What a `LMHead` builds."""

    @abc.abstractmethod
    def __call__(
        self,
        hidden: Float[Array, "B N D"],
        embedding: Float[Array, "V D"],
        last_hidden: Float[Array, "B D"],
        positions: Int[Array, "B N"],
    ) -> LogitProjection:
        """hidden: at the asked positions; summary: at each row's last token; at: the positions, in the document."""


class LMHead(Config, abc.ABC):
    """How a model turns hidden states into logits."""

    @abc.abstractmethod
    def build(self, d_model: int, vocab_size: int, *, precision: Precision, rngs: nnx.Rngs) -> LMHeadModule:
        """The module."""


@dataclass(frozen=True, kw_only=True)
class Tied(LMHead):
    """Logits by the transposed embedding."""

    def build(self, d_model: int, vocab_size: int, *, precision: Precision, rngs: nnx.Rngs) -> LMHeadModule:
        return TiedModule()


class TiedModule(LMHeadModule):
    """h E^T."""

    def __call__(self, hidden: Array, embedding: Array, last_hidden: Array, positions: Array) -> LogitProjection:
        return LogitProjection(hidden, embedding)


@dataclass(frozen=True, kw_only=True)
class Untied(LMHead):
    """Logits by a matrix of their own."""

    def build(self, d_model: int, vocab_size: int, *, precision: Precision, rngs: nnx.Rngs) -> LMHeadModule:
        return UntiedModule(d_model, vocab_size, precision=precision, rngs=rngs)


class UntiedModule(LMHeadModule):
    """h W."""

    def __init__(self, d_model: int, vocab_size: int, *, precision: Precision, rngs: nnx.Rngs):
        kernel = 0.02 * jax.random.normal(rngs.params(), (d_model, vocab_size), precision.param)
        self.kernel = parameter(kernel, ("embed", "vocab"))

    def __call__(self, hidden: Array, embedding: Array, last_hidden: Array, positions: Array) -> LogitProjection:
        return LogitProjection(hidden, self.kernel[...].T)


@dataclass(frozen=True, kw_only=True)
class Autoencoder(LMHead):
    """MAD's readout for compression: every token is rebuilt from the last token's hidden state and a position.

    logits_t = W_2 gelu(W_1 (h_last + sinusoid(t))) (Poli et al. 2024, arXiv 2403.17844, appendix on MAD). It reads the
    end of the row by design, so a model with it does not decode.
    """

    hidden_size: int = 128

    def build(self, d_model: int, vocab_size: int, *, precision: Precision, rngs: nnx.Rngs) -> LMHeadModule:
        return AutoencoderModule(self, d_model, vocab_size, precision=precision, rngs=rngs)


class AutoencoderModule(LMHeadModule):
    """See `Autoencoder`."""

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
    rate = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions[..., None].astype(jnp.float32) * rate[None, None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[..., :width]
