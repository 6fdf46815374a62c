"""The module behind full and sliding-window softmax attention: projections, rotary positions, the op, the cache."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import ConfigError
from recallax.layers.base import RecurrentMixer
from recallax.layers.dense import Linear, parameter, residual_std
from recallax.layers.rotary import rotary
from recallax.layers.state_reset import head_dim_of
from recallax.pallas_kernels.window_attention import KVCache, PersistentKV, window_attention, window_attention_step
from recallax.types import Aux, Precision, SeqInfo, StepInfo


class SoftmaxAttentionMixer(RecurrentMixer):
    """y = W_o attention(W_q x, W_k x, W_v x); keys are cached after rotation."""

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
        if head_dim is not None and head_dim < 1:
            raise ConfigError(f"head_dim is {head_dim}; it must be at least 1 (or None for d_model / heads)")
        self.head_dim = head_dim or head_dim_of("attention", d_model, num_heads)
        head_dim_of("attention's query heads over key/value heads", num_heads, num_kv_heads)
        if num_persistent_tokens < 0:
            raise ConfigError(f"num_persistent_tokens is {num_persistent_tokens}; it must be at least 0 tokens")
        if rope_theta is not None and self.head_dim % 2:
            raise ConfigError(
                f"a head is {self.head_dim} wide; rotary positions need an even width (or rotary_base=None)"
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
        self.out = Linear(
            q_width, d_model, precision=precision, rngs=rngs, std=residual_std(num_layers), axes=("heads", "embed")
        )

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        q, k, v = self.project_qkv(x, jnp.asarray(seq.positions))
        always, segments = self.persistent_kv(), jnp.asarray(seq.segment_ids)
        y, _ = window_attention(q, k, v, window=self.window, persistent=always, segment_ids=segments)
        return self.out(y.reshape(*x.shape[:-1], -1)), {}

    def init_state(self, batch: int, max_len: int) -> KVCache:
        slots = max_len if self.window is None else min(self.window, max_len)
        empty = jnp.zeros((batch, slots, self.num_kv_heads, self.head_dim), self.dtype)
        return KVCache(empty, empty)

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache, Aux]:
        positions, segments = jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids)
        q, k, v = self.project_qkv(x, positions)
        y, cache = window_attention(
            q,
            k,
            v,
            window=self.window,
            state=state,
            persistent=self.persistent_kv(),
            positions=positions,
            segment_ids=segments,
        )
        assert cache is not None
        return self.out(y.reshape(*x.shape[:-1], -1)), cache, {}

    def step(self, x: Float[Array, "B D"], info: StepInfo, state: KVCache) -> tuple[Float[Array, "B D"], KVCache]:
        position, active = jnp.asarray(info.position), jnp.asarray(info.active)
        q, k, v = self.project_qkv(x[:, None], position[:, None])
        token, always = (q[:, 0], k[:, 0], v[:, 0]), self.persistent_kv()
        y, state = window_attention_step(*token, state, position, active, window=self.window, persistent=always)
        return self.out(y.reshape(*x.shape[:-1], -1)), state

    def persistent_kv(self) -> PersistentKV | None:
        """Keys and values of the persistent tokens."""
        return (
            None
            if self.persistent is None
            else PersistentKV(*self.unrotated_kv(self.persistent[...].astype(self.dtype)))
        )

    def unrotated_kv(
        self, x: Float[Array, "*batch D"]
    ) -> tuple[Float[Array, "*batch G K"], Float[Array, "*batch G K"]]:
        """Keys and values of what has no position."""
        k, v = (part(x).reshape(*x.shape[:-1], self.num_kv_heads, self.head_dim) for part in (self.k, self.v))
        return k, v

    def project_qkv(self, x: Float[Array, "B T D"], positions: Array) -> tuple[Array, Array, Array]:
        """Queries [B, T, H, K], and keys and values [B, T, G, K], rotated to their positions."""
        q, k, v = (part(x).reshape(*x.shape[:2], -1, self.head_dim) for part in (self.q, self.k, self.v))
        if self.rope_theta is not None:
            q, k = rotary(q, positions, self.rope_theta), rotary(k, positions, self.rope_theta)
        return q, k, v
