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
from recallax.pallas_kernels.product import product
from recallax.types import Precision


class Projection(NamedTuple):
    """Logits before the product that makes them: z = c tanh((features W^T + b) / c), without a cap just the product."""

    features: Float[Array, "B N F"]
    weight: Float[Array, "V F"]
    """In the parameters' dtype; the product is taken in that of the features."""
    bias: Float[Array, " V"] | None = None
    soft_cap: float | None = None

    def logits(self) -> Float[Array, "B N V"]:
        """Float32 logits."""
        logits = product("bnf,vf->bnv", self.features, self.weight.astype(self.features.dtype))
        logits = logits if self.bias is None else logits + self.bias.astype(jnp.float32)[None, None]
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)


class ReadoutModule(nnx.Module, abc.ABC):
    """What a `Readout` builds."""

    @abc.abstractmethod
    def __call__(
        self,
        hidden: Float[Array, "B N D"],
        embedding: Float[Array, "V D"],
        summary: Float[Array, "B D"],
        at: Int[Array, "B N"],
    ) -> Projection:
        """hidden: at the asked positions; summary: at each row's last token; at: the positions, in the document."""


class Readout(Config, abc.ABC):
    """How a model turns hidden states into logits."""

    @abc.abstractmethod
    def build(self, d_model: int, vocab_size: int, *, precision: Precision, rngs: nnx.Rngs) -> ReadoutModule:
        """The module."""


@dataclass(frozen=True, kw_only=True)
class Tied(Readout):
    """Logits by the transposed embedding."""

    def build(self, d_model: int, vocab_size: int, *, precision: Precision, rngs: nnx.Rngs) -> ReadoutModule:
        return TiedModule()


class TiedModule(ReadoutModule):
    """h E^T."""

    def __call__(self, hidden: Array, embedding: Array, summary: Array, at: Array) -> Projection:
        return Projection(hidden, embedding)


@dataclass(frozen=True, kw_only=True)
class Untied(Readout):
    """Logits by a matrix of their own."""

    def build(self, d_model: int, vocab_size: int, *, precision: Precision, rngs: nnx.Rngs) -> ReadoutModule:
        return UntiedModule(d_model, vocab_size, precision=precision, rngs=rngs)


class UntiedModule(ReadoutModule):
    """h W."""

    def __init__(self, d_model: int, vocab_size: int, *, precision: Precision, rngs: nnx.Rngs):
        kernel = 0.02 * jax.random.normal(rngs.params(), (d_model, vocab_size), precision.param)
        self.kernel = parameter(kernel, ("embed", "vocab"))

    def __call__(self, hidden: Array, embedding: Array, summary: Array, at: Array) -> Projection:
        return Projection(hidden, self.kernel[...].T)


@dataclass(frozen=True, kw_only=True)
class Autoencode(Readout):
    """MAD's readout for compression: every token is rebuilt from the last token's hidden state and a position.

    logits_t = W_2 gelu(W_1 (h_last + sinusoid(t))) (Poli et al. 2024, arXiv 2403.17844, appendix on MAD). It reads the
    end of the row by design, so a model with it does not decode.
    """

    hidden: int = 128

    def build(self, d_model: int, vocab_size: int, *, precision: Precision, rngs: nnx.Rngs) -> ReadoutModule:
        return AutoencodeModule(self, d_model, vocab_size, precision=precision, rngs=rngs)


class AutoencodeModule(ReadoutModule):
    """See `Autoencode`."""

    def __init__(self, config: Autoencode, d_model: int, vocab_size: int, *, precision: Precision, rngs: nnx.Rngs):
        std = d_model**-0.5
        self.inner = Linear(d_model, config.hidden, precision=precision, rngs=rngs, bias=True, std=std)
        self.outer = Linear(
            config.hidden,
            vocab_size,
            precision=precision,
            rngs=rngs,
            bias=True,
            std=config.hidden**-0.5,
            axes=(None, "vocab"),
        )

    def __call__(self, hidden: Array, embedding: Array, summary: Array, at: Array) -> Projection:
        x = summary[:, None].astype(jnp.float32) + _sinusoid(at, summary.shape[-1])
        assert self.outer.bias is not None
        return Projection(jax.nn.gelu(self.inner(x)), self.outer.kernel[...].T, self.outer.bias[...])


def _sinusoid(positions: Int[Array, "B N"], width: int) -> Float[Array, "B N D"]:
    rate = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions[..., None].astype(jnp.float32) * rate[None, None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[..., :width]
