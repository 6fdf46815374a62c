"""Full and sliding-window softmax attention: their options, projections, rotary positions, the op and its cache."""

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import added_field, require_at_least
from recallax.layers.attention_heads import attention_head_dim
from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer
from recallax.layers.dense import Linear, parameter, residual_linear
from recallax.layers.rotary import rotary
from recallax.pallas_kernels.window_attention import KVCache, PersistentKV, window_attention, window_attention_step
from recallax.types import Aux, Precision, SeqInfo, StepInfo


@dataclass(frozen=True, kw_only=True)
class SoftmaxAttentionConfig(MixerConfig, abc.ABC):
    """Base class of configs of causal softmax attention, which differ in the tokens that a query sees."""

    num_heads: int = 1
    """Query heads."""
    num_kv_heads: int | None = None
    """Key/value heads, each shared by a group of query heads; None: `num_heads`."""
    head_dim: int | None = added_field(None)
    """Width of a head; None: d_model / num_heads."""
    rope_theta: float | None = 10_000.0
    """Base of the rotary embedding; None: no positional embedding."""
    num_persistent_tokens: int = added_field(0)
    """Learned key/value tokens without a position, visible to all tokens (Titans, arXiv 2501.00663, section 3.3)."""

    @property
    @abc.abstractmethod
    def visible_tokens(self) -> int | None:
        """Number of tokens that a query sees, including its own; None: all earlier tokens."""

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "SoftmaxAttentionMixer":
        return SoftmaxAttentionMixer(
            d_model,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim,
            window=self.visible_tokens,
            rope_theta=self.rope_theta,
            num_persistent_tokens=self.num_persistent_tokens,
            num_layers=layer.num_layers,
            precision=precision,
            rngs=rngs,
        )


class SoftmaxAttentionMixer(RecurrentMixer):
    """y = W_o attention(W_q x, W_k x, W_v x); keys are cached after rotation.

    Args:
        d_model: Width of the model.
        num_heads: Query heads.
        num_kv_heads: Key/value heads, a divisor of `num_heads`.
        head_dim: Width of a head; None: d_model / num_heads.
        window: Tokens in the window, including the current one; None: all earlier tokens.
        rope_theta: Base of the rotary embedding; None: no positional embedding.
        num_persistent_tokens: Learned key/value tokens without a position.
        num_layers: Layers of the model, for the initial scale of the output projection.
        precision: Dtypes of parameters and activations.
        rngs: Source of the initial parameters.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None,
        window: int | None,
        rope_theta: float | None,
        num_persistent_tokens: int,
        num_layers: int,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        require_at_least(0, num_persistent_tokens=num_persistent_tokens)
        self.head_dim = attention_head_dim(
            "attention",
            d_model,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
        )
        self.num_heads, self.num_kv_heads, self.window, self.rope_theta = num_heads, num_kv_heads, window, rope_theta
        self.dtype = precision.compute
        q_width, kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q = Linear(d_model, q_width, precision=precision, rngs=rngs)
        self.k = Linear(d_model, kv_width, precision=precision, rngs=rngs)
        self.v = Linear(d_model, kv_width, precision=precision, rngs=rngs)
        tokens = (
            0.02 * jax.random.normal(rngs.params(), (num_persistent_tokens, d_model), precision.param)
            if num_persistent_tokens
            else None
        )
        self.persistent = None if tokens is None else parameter(tokens, (None, "embed"), weight_decay=False)
        self.out = residual_linear(q_width, d_model, num_layers, in_axis="heads", precision=precision, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        q, k, v = self.project_qkv(x, jnp.asarray(seq.positions))
        persistent, segment_ids = self.persistent_kv(), jnp.asarray(seq.segment_ids)
        y, _ = window_attention(q, k, v, window=self.window, persistent=persistent, segment_ids=segment_ids)
        return self.out(y.reshape(*x.shape[:-1], -1)), {}

    def init_state(self, batch: int, max_len: int) -> KVCache:
        slots = max_len if self.window is None else min(self.window, max_len)
        empty = jnp.zeros((batch, slots, self.num_kv_heads, self.head_dim), self.dtype)
        return KVCache(empty, empty)

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache, Aux]:
        positions, segment_ids = jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids)
        q, k, v = self.project_qkv(x, positions)
        y, cache = window_attention(
            q,
            k,
            v,
            window=self.window,
            state=state,
            persistent=self.persistent_kv(),
            positions=positions,
            segment_ids=segment_ids,
        )
        assert cache is not None
        return self.out(y.reshape(*x.shape[:-1], -1)), cache, {}

    def step(self, x: Float[Array, "B D"], info: StepInfo, state: KVCache) -> tuple[Float[Array, "B D"], KVCache]:
        position, active = jnp.asarray(info.position), jnp.asarray(info.active)
        q, k, v = self.project_qkv(x[:, None], position[:, None])
        q, k, v, persistent = q[:, 0], k[:, 0], v[:, 0], self.persistent_kv()
        y, state = window_attention_step(q, k, v, state, position, active, window=self.window, persistent=persistent)
        return self.out(y.reshape(*x.shape[:-1], -1)), state

    def persistent_kv(self) -> PersistentKV | None:
        """Compute keys and values of the persistent tokens; None if there are none."""
        if self.persistent is None:
            return None
        return PersistentKV(*self.unrotated_kv(self.persistent[...].astype(self.dtype)))

    def unrotated_kv(
        self, x: Float[Array, "*batch D"]
    ) -> tuple[Float[Array, "*batch G K"], Float[Array, "*batch G K"]]:
        """Compute keys and values of vectors without a position.

        Args:
            x: Vectors of the model's width.

        Returns:
            Keys and values.
        """
        k, v = (part(x).reshape(*x.shape[:-1], self.num_kv_heads, self.head_dim) for part in (self.k, self.v))
        return k, v

    def project_qkv(self, x: Float[Array, "B T D"], positions: Array) -> tuple[Array, Array, Array]:
        """Compute queries, keys and values, and rotate queries and keys to their positions.

        Args:
            x: Inputs.
            positions: Position of each token [B, T].

        Returns:
            Queries [B, T, H, K], keys and values [B, T, G, K].
        """
        q, k, v = (part(x).reshape(*x.shape[:2], -1, self.head_dim) for part in (self.q, self.k, self.v))
        if self.rope_theta is not None:
            q, k = rotary(q, positions, self.rope_theta), rotary(k, positions, self.rope_theta)
        return q, k, v
