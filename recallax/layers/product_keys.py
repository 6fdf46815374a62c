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

from recallax.config import ConfigError, require_at_least
from recallax.layers.base import LayerInfo, MixerConfig
from recallax.layers.dense import Linear, parameter, residual_std
from recallax.layers.norm import rms_norm
from recallax.layers.stateless import StatelessMixer
from recallax.types import DIAGNOSTIC_PREFIX, Aux, Mean, Precision, SeqInfo


@dataclass(frozen=True, kw_only=True)
class ProductKeys(MixerConfig):
    """See the head of the file."""

    num_sub_keys: int = 512
    """n: the table has n^2 values."""
    num_heads: int = 4
    head_k_dim: int = 256
    """Width of a head's query, both halves together."""
    value_dim: int = 512
    top_k: int = 32
    gate_bias_init: float = -2.0
    value_lr_multiplier: float = 10.0
    """Learning rate of the values as a multiple of the run's (lucidrains' package recommends 1e-2 beside 1e-3)."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_sub_keys:
            raise ConfigError(f"top_k is {self.top_k}; it must be from 1 to sub_keys = {self.num_sub_keys}")
        if self.head_k_dim < 2 or self.head_k_dim % 2:
            raise ConfigError(f"head_k_dim is {self.head_k_dim}; it must be even, a half for each sub-key")
        require_at_least(1, num_heads=self.num_heads, value_dim=self.value_dim)

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "ProductKeysMixer":
        return ProductKeysMixer(self, d_model, layer, precision=precision, rngs=rngs)


class ProductKeySlots(NamedTuple):
    """What each token's heads read."""

    index: Int[Array, "*batch H S"]
    weight: Float[Array, "*batch H S"]
    """Sums to 1."""


class ProductKeysMixer(StatelessMixer):
    """See the head of the file."""

    def __init__(self, config: ProductKeys, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        self.num_heads, self.top_k, half = config.num_heads, config.top_k, config.head_k_dim // 2
        self.dtype = precision.compute
        self.query = Linear(d_model, self.num_heads * config.head_k_dim, precision=precision, rngs=rngs)
        self.scale = parameter(jnp.ones(config.head_k_dim, precision.param), (None,), weight_decay=False)
        shape = (2, self.num_heads, config.num_sub_keys, half)
        keys = half**-0.5 * jax.random.normal(rngs.params(), shape, precision.param)
        self.keys = parameter(keys, (None, None, None, None))
        count = config.num_sub_keys**2
        table = jax.random.normal(rngs.params(), (count, config.value_dim), precision.param)
        self.values = parameter(
            config.value_dim**-0.5 * table,
            ("vocab", None),
            weight_decay=False,
            lr_multiplier=config.value_lr_multiplier,
            sparse=True,
            active_fraction=min(1.0, self.num_heads * self.top_k / count),
        )
        std = residual_std(layer.num_layers)
        self.out = Linear(config.value_dim, d_model, precision=precision, rngs=rngs, std=std, axes=(None, "embed"))
        self.gate = Linear(d_model, 1, precision=precision, rngs=rngs, bias=True, axes=("embed", None))
        assert self.gate.bias is not None
        self.gate.bias[...] = jnp.full(1, config.gate_bias_init, precision.param)

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        slots = self.select_slots(x)
        return self._output(x, slots), self._aux(slots, seq)

    def apply(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self._output(x, self.select_slots(x))

    def select_slots(self, x: Float[Array, "*batch D"]) -> ProductKeySlots:
        """The k best slots of each head, the best first; in float32."""
        q = self.query(x).reshape(*x.shape[:-1], self.num_heads, -1)
        halves = jnp.split(rms_norm(q, self.scale[...], 1e-5, jnp.float32), 2, axis=-1)
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
        return ProductKeySlots(i * keys.shape[2] + j, jax.nn.softmax(score, axis=-1))

    def _output(self, x: Float[Array, "*batch D"], slots: ProductKeySlots) -> Float[Array, "*batch D"]:
        count = self.num_heads * self.top_k
        y = embedding_bag(self.values[...], slots.index.reshape(-1, count), slots.weight.reshape(-1, count))
        y = self.out(y.astype(self.dtype).reshape(*x.shape[:-1], -1))
        return (jax.nn.sigmoid(self.gate(x).astype(jnp.float32)) * y.astype(jnp.float32)).astype(self.dtype)

    def _aux(self, slots: ProductKeySlots, seq: SeqInfo) -> Aux:
        """The share of slots that this batch reads, and how far the weights on slots are from equal, in nats."""
        count = self.values.shape[0]
        index, weight = (jax.lax.stop_gradient(part).reshape(-1) for part in slots)
        valid = jnp.broadcast_to((jnp.asarray(seq.segment_ids) > 0)[..., None, None], slots.index.shape).reshape(-1)
        weight = jnp.where(valid, weight, 0)
        taken = jnp.zeros(count, jnp.float32).at[index].add(weight)
        share = taken / jnp.maximum(jnp.sum(weight), 1e-30)
        apart = jnp.sum(share * jnp.log(jnp.maximum(share * count, 1e-30)))
        used = jnp.mean((taken > 0).astype(jnp.float32))
        one = jnp.ones(())
        return {DIAGNOSTIC_PREFIX + "slots_used": Mean(used, one), DIAGNOSTIC_PREFIX + "slots_kl": Mean(apart, one)}


@jax.custom_vjp
def embedding_bag(
    values: Float[Array, "N V"], index: Int[Array, "T S"], weight: Float[Array, "T S"]
) -> Float[Array, "T V"]:
    """sum_s weight[t, s] values[index[t, s]], in float32, one row per token at a time."""

    def add(s: Array, total: Array) -> Array:
        rows = values[index[:, s]].astype(jnp.float32)
        return total + weight[:, s, None] * rows

    return jax.lax.fori_loop(0, index.shape[1], add, jnp.zeros((index.shape[0], values.shape[1]), jnp.float32))


def _embedding_bag_fwd(values: Array, index: Array, weight: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return embedding_bag(values, index, weight), (values, index, weight)


def _embedding_bag_bwd(residuals: tuple[Array, Array, Array], grad: Array) -> tuple[Array, np.ndarray, Array]:
    values, index, weight = residuals

    def add(s: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        table, weights = carry
        at = index[:, s]
        table = table.at[at].add(weight[:, s, None] * grad)
        return table, weights.at[:, s].set(jnp.sum(values[at].astype(jnp.float32) * grad, axis=-1))

    zeros = (jnp.zeros(values.shape, jnp.float32), jnp.zeros(weight.shape, jnp.float32))
    table, weights = jax.lax.fori_loop(0, index.shape[1], add, zeros)
    return table.astype(values.dtype), np.zeros(index.shape, jax.dtypes.float0), weights


embedding_bag.defvjp(_embedding_bag_fwd, _embedding_bag_bwd)
