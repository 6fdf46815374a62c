"""Product-key memory: a table of n^2 learned values, of which each token reads the k with the best matching keys.

    q = rms(W_q x) per head, halved:  s1_i = q1.c1_i,  s2_j = q2.c2_j;   score of slot (i, j) = s1_i + s2_j
    y = sigmoid(w_g.x + b_g) W_o sum over heads of sum over the k best slots of softmax(score) value

The k best of the n^2 sums are among the sums of the k best halves, so an exact search computes 2 n + k^2 scores. The
table stores facts of the training data. Nothing of a sequence is stored, and the state is `()`.

The gradient of the table is a dense array, as JAX has no other, to which the rows of one slot per token are added at a
time. Values have the tags `lr_multiplier` and `sparse`: Adam does not update a row, or its moments, in steps in which
no token reads it.

Source: Lample et al. 2019 (arXiv 1907.05242), section 3, for the memory of Hydra (arXiv 2508.15099). Queries are
normalized by RMSNorm in place of batch norm, which mixes rows. The gate, a scalar per token that is initially almost 0,
is that of Hydra's prototype. Hydra leaves the size open; the defaults are Lample's: 512 sub-keys, 4 heads, k = 32.
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
from recallax.layers.dense import Linear, parameter, residual_linear
from recallax.layers.norm import rms_norm
from recallax.layers.stateless import StatelessMixer
from recallax.types import DIAGNOSTIC_PREFIX, Aux, Mean, Precision, SeqInfo

QUERY_NORM_EPS = 1e-5
"""Added to the mean square in the norm of queries."""
TINY = 1e-30
"""Lower bound of denominators and of arguments of logarithms."""


@dataclass(frozen=True, kw_only=True)
class ProductKeys(MixerConfig):
    """Table of learned values with product keys."""

    num_sub_keys: int = 512
    """n: sub-keys per half; the table has n^2 values."""
    num_heads: int = 4
    """Heads, each with its own queries and keys; all heads read one table."""
    head_k_dim: int = 256
    """Width of a head's query, both halves together."""
    value_dim: int = 512
    """Width of the values."""
    top_k: int = 32
    """k: values that each head reads."""
    gate_bias_init: float = -2.0
    """Initial bias of the output gate; sigmoid(-2) is 0.12."""
    value_lr_multiplier: float = 10.0
    """Learning rate of the values as a multiple of the run's (lucidrains uses 1e-2 for values, 1e-3 for the rest)."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_sub_keys:
            raise ConfigError(f"top_k is {self.top_k}; it must be from 1 to num_sub_keys = {self.num_sub_keys}")
        if self.head_k_dim < 2 or self.head_k_dim % 2:
            raise ConfigError(f"head_k_dim is {self.head_k_dim}; it must be even and at least 2, one half per sub-key")
        require_at_least(1, num_heads=self.num_heads, value_dim=self.value_dim)

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "ProductKeysMixer":
        return ProductKeysMixer(self, d_model, layer, precision=precision, rngs=rngs)


class ProductKeySlots(NamedTuple):
    """Values that each head of each token reads."""

    index: Int[Array, "*batch H S"]
    """Rows of the table."""
    weight: Float[Array, "*batch H S"]
    """Weights of the rows, which sum to 1, float32."""


class ProductKeysMixer(StatelessMixer):
    """Product-key search, weighted sum of table rows, output projection and gate."""

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
        self.out = residual_linear(
            config.value_dim, d_model, layer.num_layers, in_axis=None, precision=precision, rngs=rngs
        )
        self.gate = Linear(d_model, 1, precision=precision, rngs=rngs, bias=True, axes=("embed", None))
        assert self.gate.bias is not None
        self.gate.bias[...] = jnp.full(1, config.gate_bias_init, precision.param)

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        slots = self.select_slots(x)
        return self._output(x, slots), self._aux(slots, seq)

    def apply(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self._output(x, self.select_slots(x))

    def select_slots(self, x: Float[Array, "*batch D"]) -> ProductKeySlots:
        """Find the k best slots of each head, in float32.

        Args:
            x: Inputs.

        Returns:
            Slots in the order of their scores, the best first.
        """
        q = self.query(x).reshape(*x.shape[:-1], self.num_heads, -1)
        halves = jnp.split(rms_norm(q, self.scale[...], QUERY_NORM_EPS, jnp.float32), 2, axis=-1)
        exact, keys = jax.lax.Precision.HIGHEST, self.keys[...].astype(jnp.float32)
        best = [
            jax.lax.top_k(jnp.einsum("...hd,hnd->...hn", half, k, precision=exact), self.top_k)
            for half, k in zip(halves, keys, strict=True)
        ]
        (first, i), (second, j) = best
        sums = first[..., :, None] + second[..., None, :]
        score, pair = jax.lax.top_k(sums.reshape(*sums.shape[:-2], -1), self.top_k)
        i = jnp.take_along_axis(i, pair // self.top_k, axis=-1)
        j = jnp.take_along_axis(j, pair % self.top_k, axis=-1)
        return ProductKeySlots(i * keys.shape[2] + j, jax.nn.softmax(score, axis=-1))

    def _output(self, x: Float[Array, "*batch D"], slots: ProductKeySlots) -> Float[Array, "*batch D"]:
        count = self.num_heads * self.top_k
        y = embedding_bag(self.values[...], slots.index.reshape(-1, count), slots.weight.reshape(-1, count))
        y = self.out(y.astype(self.dtype).reshape(*x.shape[:-1], -1))
        return (jax.nn.sigmoid(self.gate(x).astype(jnp.float32)) * y.astype(jnp.float32)).astype(self.dtype)

    def _aux(self, slots: ProductKeySlots, seq: SeqInfo) -> Aux:
        """Compute the fraction of slots that are read, and the KL divergence in nats of their use from uniform."""
        count = self.values.shape[0]
        index, weight = (jax.lax.stop_gradient(part).reshape(-1) for part in slots)
        valid = jnp.broadcast_to((jnp.asarray(seq.segment_ids) > 0)[..., None, None], slots.index.shape).reshape(-1)
        weight = jnp.where(valid, weight, 0)
        usage = jnp.zeros(count, jnp.float32).at[index].add(weight)
        share = usage / jnp.maximum(jnp.sum(weight), TINY)
        kl = jnp.sum(share * jnp.log(jnp.maximum(share * count, TINY)))
        used = jnp.mean((usage > 0).astype(jnp.float32))
        one = jnp.ones(())
        return {DIAGNOSTIC_PREFIX + "slots_used": Mean(used, one), DIAGNOSTIC_PREFIX + "slots_kl": Mean(kl, one)}


@jax.custom_vjp
def embedding_bag(
    values: Float[Array, "N V"], index: Int[Array, "T S"], weight: Float[Array, "T S"]
) -> Float[Array, "T V"]:
    """Compute weighted sums of table rows: sum_s weight[t, s] values[index[t, s]].

    The loop reads one row per token at a time, so it never stores all S rows of a token.

    Args:
        values: Table of N rows.
        index: Rows that each token reads.
        weight: Weights of the rows.

    Returns:
        One sum per token, float32.
    """

    def add(s: Array, total: Array) -> Array:
        rows = values[index[:, s]].astype(jnp.float32)
        return total + weight[:, s, None] * rows

    return jax.lax.fori_loop(0, index.shape[1], add, jnp.zeros((index.shape[0], values.shape[1]), jnp.float32))


def _embedding_bag_fwd(values: Array, index: Array, weight: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return embedding_bag(values, index, weight), (values, index, weight)


def _embedding_bag_bwd(residuals: tuple[Array, Array, Array], grad: Array) -> tuple[Array, np.ndarray, Array]:
    values, index, weight = residuals

    def add(s: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        values_grad, weight_grad = carry
        rows = index[:, s]
        values_grad = values_grad.at[rows].add(weight[:, s, None] * grad)
        return values_grad, weight_grad.at[:, s].set(jnp.sum(values[rows].astype(jnp.float32) * grad, axis=-1))

    zeros = (jnp.zeros(values.shape, jnp.float32), jnp.zeros(weight.shape, jnp.float32))
    values_grad, weight_grad = jax.lax.fori_loop(0, index.shape[1], add, zeros)
    return values_grad.astype(values.dtype), np.zeros(index.shape, jax.dtypes.float0), weight_grad


embedding_bag.defvjp(_embedding_bag_fwd, _embedding_bag_bwd)
