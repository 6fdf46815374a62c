"""One layer: a sequence mixer and a channel mixer, each after a norm and with a residual connection.

    r <- r + mixer(norm(r));   r <- r + channel(norm(r))

A block whose channel mixer is `NoChannelMixer` has one sublayer and one norm. The residual stream is float32; mixers
use the compute dtype.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from recallax.config import Config
from recallax.layers import LayerInfo, MixerConfig, NoChannelMixer, RecurrentMixer, SequenceMixer, SwiGLU
from recallax.layers.base import State
from recallax.layers.norm import RMSNorm
from recallax.models.residual_module import ResidualModule
from recallax.types import Aux, Precision, SeqInfo, StepInfo, add_aux


@dataclass(frozen=True, kw_only=True)
class Block(Config):
    """A named layer of a pattern: a sequence mixer and a channel mixer."""

    mixer: MixerConfig
    """The sequence mixer."""
    channel: MixerConfig = SwiGLU()
    """The channel mixer."""


class BlockModule(ResidualModule):
    """A layer: r <- r + mixer(norm(r)), then r <- r + channel(norm(r)).

    Args:
        config: The block's config.
        d_model: Width of the residual stream.
        layer: The layer's number and the number of layers.
        dropout: Dropout rate of each mixer's output.
        norm_eps: Epsilon of the norms.
        precision: The dtypes of parameters and computation.
        rngs: Random number generators of the parameters.
    """

    def __init__(
        self,
        config: Block,
        d_model: int,
        layer: LayerInfo,
        *,
        dropout: float,
        norm_eps: float,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        self.mixer = config.mixer.build(d_model, layer, precision=precision, rngs=rngs)
        self.channel = config.channel.build(d_model, layer, precision=precision, rngs=rngs)
        self.mixer_norm = RMSNorm(d_model, precision=precision, eps=norm_eps)
        has_channel = not isinstance(config.channel, NoChannelMixer)
        self.channel_norm = RMSNorm(d_model, precision=precision, eps=norm_eps) if has_channel else _identity
        self.dropout = dropout

    def __call__(self, r: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        """Apply the layer to whole sequences.

        Args:
            r: The residual stream, float32.
            seq: Positions, document ids, prefixes, and the layer's key.

        Returns:
            The residual stream after the layer, and the auxiliary means of the mixers.
        """
        keys = None if seq.key is None else jax.random.split(seq.key, 4)
        y, aux = self.mixer(self.mixer_norm(r), _with_key(seq, keys, 0))
        r = r + self._apply_dropout(y, keys, 1)
        y, more = self.channel(self.channel_norm(r), _with_key(seq, keys, 2))
        return r + self._apply_dropout(y, keys, 3), add_aux(aux, more)

    def init_state(self, batch: int, max_len: int) -> State:
        return tuple(_require_recurrent(m).init_state(batch, max_len) for m in (self.mixer, self.channel))

    def prefill(self, r: Float[Array, "B T D"], seq: SeqInfo, state: State) -> tuple[Float[Array, "B T D"], State, Aux]:
        y, mixer, aux = _require_recurrent(self.mixer).prefill(self.mixer_norm(r), seq, state[0])
        r = r + y.astype(r.dtype)
        y, channel, more = _require_recurrent(self.channel).prefill(self.channel_norm(r), seq, state[1])
        return r + y.astype(r.dtype), (mixer, channel), add_aux(aux, more)

    def step(self, r: Float[Array, "B D"], info: StepInfo, state: State) -> tuple[Float[Array, "B D"], State]:
        y, mixer = _require_recurrent(self.mixer).step(self.mixer_norm(r), info, state[0])
        r = r + y.astype(r.dtype)
        y, channel = _require_recurrent(self.channel).step(self.channel_norm(r), info, state[1])
        return r + y.astype(r.dtype), (mixer, channel)

    def _apply_dropout(self, y: Float[Array, "B T D"], keys: Array | None, which: int) -> Float[Array, "B T D"]:
        return dropout(y.astype(jnp.float32), self.dropout, None if keys is None else keys[which])


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None) -> Float[Array, "..."]:
    """Zero elements at random, and divide the others by 1 - rate.

    Args:
        x: The input.
        rate: The probability of zeroing an element.
        key: The random key. None: return the input.

    Returns:
        The input after dropout.
    """
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def _identity(r: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return r


def _with_key(seq: SeqInfo, keys: Array | None, which: int) -> SeqInfo:
    return seq if keys is None else seq._replace(key=keys[which])


def _require_recurrent(mixer: SequenceMixer) -> RecurrentMixer:
    if not isinstance(mixer, RecurrentMixer):
        raise TypeError(f"{type(mixer).__name__} has no state, so a model that holds it cannot prefill or decode")
    return mixer
