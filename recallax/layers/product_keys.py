"""Product-key memory: a table of n^2 learned values, of which every token reads the k whose keys fit best.

    q = rms(W_q x) per head, halved:  s1_i = q1.c1_i,  s2_j = q2.c2_j;   score of slot (i, j) = s1_i + s2_j
    y = sigmoid(w_g.x + b_g) W_o sum over heads of sum over the k best slots of softmax(score) value

The k best sums are found among the k best halves: exact, for 2 n + k^2 sums instead of n^2. The table is for facts of
the training data: nothing of a sequence is remembered, and the state is `()`.

Updates: the table's gradient is a dense array (JAX has no other), made by adding k rows per token and head to zeros in
place; never are there more than one row per token and head at once. Values carry the tags `lr`, their learning rate as
a multiple of the others', and `sparse`: Adam leaves a row and its moments alone where no token read it.

Source: Lample et al. 2019 (arXiv 1907.05242), section 3, for the memory of Hydra (arXiv 2508.15099). Queries pass
RMSNorm where Lample's pass batch norm, which mixes rows. The gate, a scalar per token that starts nearly closed, is the
one of Hydra's prototype; the size, which Hydra leaves open, that of Lample: 512 sub-keys, 4 heads, k = 32.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import ConfigError
from recallax.layers.base import MixerConfig, Site
from recallax.layers.dense import Linear, parameter, residual_std
from recallax.layers.norm import rms
from recallax.layers.stateless import StatelessMixer
from recallax.types import DIAGNOSTIC, Aux, Mean, Precision, SeqInfo


@dataclass(frozen=True, kw_only=True)
class ProductKeys(MixerConfig):
    """See the head of the file."""

    sub_keys: int = 512
    """n: the table has n^2 values."""
    heads: int = 4
    key_dim: int = 256
    """Width of a head's query, both halves together."""
    value_dim: int = 512
    top_k: int = 32
    gate_bias: float = -2.0
    value_lr: float = 10.0
    """Learning rate of the values as a multiple of the run's (lucidrains' package recommends 1e-2 beside 1e-3)."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.sub_keys:
            raise ConfigError(f"top_k is {self.top_k}; it must be from 1 to sub_keys = {self.sub_keys}")
        if self.key_dim < 2 or self.key_dim % 2:
            raise ConfigError(f"key_dim is {self.key_dim}; it must be even, a half for each sub-key")
        for name in ("heads", "value_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def build(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "ProductKeysMixer":
        return ProductKeysMixer(self, d_model, site, precision=precision, rngs=rngs)


class Slots(NamedTuple):
    """What each token's heads read."""

    index: Int[Array, "*batch H S"]
    weight: Float[Array, "*batch H S"]
    """Sums to 1."""


class ProductKeysMixer(StatelessMixer):
    """See the head of the file."""

    def __init__(self, config: ProductKeys, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs):
        self.heads, self.top_k, half = config.heads, config.top_k, config.key_dim // 2
        self.dtype = precision.compute
        self.query = Linear(d_model, self.heads * config.key_dim, precision=precision, rngs=rngs)
        self.scale = parameter(jnp.ones(config.key_dim, precision.param), (None,), decay=False)
        shape = (2, self.heads, config.sub_keys, half)
        keys = half**-0.5 * jax.random.normal(rngs.params(), shape, precision.param)
        self.keys = parameter(keys, (None, None, None, None))
        count = config.sub_keys**2
        table = jax.random.normal(rngs.params(), (count, config.value_dim), precision.param)
        self.values = parameter(
            config.value_dim**-0.5 * table,
            ("vocab", None),
            decay=False,
            lr=config.value_lr,
            sparse=True,
            active=min(1.0, self.heads * self.top_k / count),
        )
        std = residual_std(site.depth)
        self.out = Linear(config.value_dim, d_model, precision=precision, rngs=rngs, std=std, axes=(None, "embed"))
        self.gate = Linear(d_model, 1, precision=precision, rngs=rngs, bias=True, axes=("embed", None))
        assert self.gate.bias is not None
        self.gate.bias[...] = jnp.full(1, config.gate_bias, precision.param)

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        slots = self.choose(x)
        return self._read(x, slots), self._aux(slots, seq)

    def apply(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self._read(x, self.choose(x))

    def choose(self, x: Float[Array, "*batch D"]) -> Slots:
        """The k best slots of each head, the best first; in float32."""
        q = self.query(x).reshape(*x.shape[:-1], self.heads, -1)
        halves = jnp.split(rms(q, self.scale[...], 1e-5, jnp.float32), 2, axis=-1)
        exact, keys = jax.lax.Precision.HIGHEST, self.keys[...].astype(jnp.float32)
        best = [
            jax.lax.top_k(jnp.einsum("...hd,hnd->...hn", half, k, precision=exact), self.top_k)
            for half, k in zip(halves, keys, strict=True)
        ]
        (first, i), (second, j) = best
        sums = first[..., :, None] + second[..., None, :]
        score, pair = jax.lax.top_k(sums.reshape(*sums.shape[:-2], -1), self.top_k)
        i, j = (
            jnp.take_along_axis(part, at, axis=-1) for part, at in ((i, pair // self.top_k), (j, pair % self.top_k))
        )
        return Slots(i * keys.shape[2] + j, jax.nn.softmax(score, axis=-1))

    def _read(self, x: Float[Array, "*batch D"], slots: Slots) -> Float[Array, "*batch D"]:
        count = self.heads * self.top_k
        y = mixture(self.values[...], slots.index.reshape(-1, count), slots.weight.reshape(-1, count))
        y = self.out(y.astype(self.dtype).reshape(*x.shape[:-1], -1))
        return (jax.nn.sigmoid(self.gate(x).astype(jnp.float32)) * y.astype(jnp.float32)).astype(self.dtype)

    def _aux(self, slots: Slots, seq: SeqInfo) -> Aux:
        """The share of slots that this batch reads, and how far the weights on slots are from equal, in nats."""
        count = self.values.shape[0]
        index, weight = (jax.lax.stop_gradient(part).reshape(-1) for part in slots)
        valid = jnp.broadcast_to((jnp.asarray(seq.segments) > 0)[..., None, None], slots.index.shape).reshape(-1)
        weight = jnp.where(valid, weight, 0)
        taken = jnp.zeros(count, jnp.float32).at[index].add(weight)
        share = taken / jnp.maximum(jnp.sum(weight), 1e-30)
        apart = jnp.sum(share * jnp.log(jnp.maximum(share * count, 1e-30)))
        used = jnp.mean((taken > 0).astype(jnp.float32))
        one = jnp.ones(())
        return {DIAGNOSTIC + "slots_used": Mean(used, one), DIAGNOSTIC + "slots_kl": Mean(apart, one)}


@jax.custom_vjp
def mixture(values: Float[Array, "N V"], index: Int[Array, "T S"], weight: Float[Array, "T S"]) -> Float[Array, "T V"]:
    """sum_s weight[t, s] values[index[t, s]], in float32, one row per token at a time."""

    def add(s: Array, total: Array) -> Array:
        rows = values[index[:, s]].astype(jnp.float32)
        return total + weight[:, s, None] * rows

    return jax.lax.fori_loop(0, index.shape[1], add, jnp.zeros((index.shape[0], values.shape[1]), jnp.float32))


def _mixture_forward(values: Array, index: Array, weight: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return mixture(values, index, weight), (values, index, weight)


def _mixture_backward(kept: tuple[Array, Array, Array], slope: Array) -> tuple[Array, np.ndarray, Array]:
    values, index, weight = kept

    def add(s: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        table, weights = carry
        at = index[:, s]
        table = table.at[at].add(weight[:, s, None] * slope)
        return table, weights.at[:, s].set(jnp.sum(values[at].astype(jnp.float32) * slope, axis=-1))

    zeros = (jnp.zeros(values.shape, jnp.float32), jnp.zeros(weight.shape, jnp.float32))
    table, weights = jax.lax.fori_loop(0, index.shape[1], add, zeros)
    return table.astype(values.dtype), np.zeros(index.shape, jax.dtypes.float0), weights


mixture.defvjp(_mixture_forward, _mixture_backward)
