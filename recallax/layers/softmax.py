"""The module behind full and sliding-window softmax attention: projections, rotary positions, the op, the cache."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import ConfigError
from recallax.layers.base import RecurrentMixer
from recallax.layers.continuation import divide_heads
from recallax.layers.dense import Linear, parameter, residual_std
from recallax.layers.rotary import rotary
from recallax.pallas_kernels.window_attention import KVCache, Persistent, window_attention, window_attention_step
from recallax.types import Aux, Precision, SeqInfo, StepInfo


class SoftmaxMixer(RecurrentMixer):
    """y = W_o attention(W_q x, W_k x, W_v x); keys are cached after rotation."""

    def __init__(
        self,
        d_model: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int | None,
        window: int | None,
        rotary_base: float | None,
        persistent: int,
        depth: int,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        if head_dim is not None and head_dim < 1:
            raise ConfigError(f"head_dim is {head_dim}; it must be at least 1 (or None for d_model / heads)")
        self.width = head_dim or divide_heads("attention", d_model, heads)
        divide_heads("attention's query heads over key/value heads", heads, kv_heads)
        if persistent < 0:
            raise ConfigError(f"persistent is {persistent}; it must be at least 0 tokens")
        if rotary_base is not None and self.width % 2:
            raise ConfigError(f"a head is {self.width} wide; rotary positions need an even width (or rotary_base=None)")
        self.heads, self.kv_heads, self.window, self.base = heads, kv_heads, window, rotary_base
        self.dtype = precision.compute
        q_width, kv_width = heads * self.width, kv_heads * self.width
        self.q = Linear(d_model, q_width, precision=precision, rngs=rngs)
        self.k = Linear(d_model, kv_width, precision=precision, rngs=rngs)
        self.v = Linear(d_model, kv_width, precision=precision, rngs=rngs)
        tokens = 0.02 * jax.random.normal(rngs.params(), (persistent, d_model), precision.param) if persistent else None
        self.persistent = None if tokens is None else parameter(tokens, (None, "embed"), decay=False)
        self.out = Linear(
            q_width, d_model, precision=precision, rngs=rngs, std=residual_std(depth), axes=("heads", "embed")
        )

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        q, k, v = self.project(x, jnp.asarray(seq.positions))
        always, segments = self.always(), jnp.asarray(seq.segments)
        y, _ = window_attention(q, k, v, window=self.window, persistent=always, segments=segments)
        return self.out(y.reshape(*x.shape[:-1], -1)), {}

    def init_state(self, batch: int, max_len: int) -> KVCache:
        slots = max_len if self.window is None else min(self.window, max_len)
        empty = jnp.zeros((batch, slots, self.kv_heads, self.width), self.dtype)
        return KVCache(empty, empty)

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache, Aux]:
        positions, segments = jnp.asarray(seq.positions), jnp.asarray(seq.segments)
        q, k, v = self.project(x, positions)
        y, cache = window_attention(
            q,
            k,
            v,
            window=self.window,
            state=state,
            persistent=self.always(),
            positions=positions,
            segments=segments,
        )
        assert cache is not None
        return self.out(y.reshape(*x.shape[:-1], -1)), cache, {}

    def step(self, x: Float[Array, "B D"], info: StepInfo, state: KVCache) -> tuple[Float[Array, "B D"], KVCache]:
        position, active = jnp.asarray(info.position), jnp.asarray(info.active)
        q, k, v = self.project(x[:, None], position[:, None])
        token, always = (q[:, 0], k[:, 0], v[:, 0]), self.always()
        y, state = window_attention_step(*token, state, position, active, window=self.window, persistent=always)
        return self.out(y.reshape(*x.shape[:-1], -1)), state

    def always(self) -> Persistent | None:
        """Keys and values of the persistent tokens."""
        return None if self.persistent is None else Persistent(*self.unplaced(self.persistent[...].astype(self.dtype)))

    def unplaced(self, x: Float[Array, "*batch D"]) -> tuple[Float[Array, "*batch G K"], Float[Array, "*batch G K"]]:
        """Keys and values of what has no position."""
        k, v = (part(x).reshape(*x.shape[:-1], self.kv_heads, self.width) for part in (self.k, self.v))
        return k, v

    def project(self, x: Float[Array, "B T D"], positions: Array) -> tuple[Array, Array, Array]:
        """Queries [B, T, H, K], and keys and values [B, T, G, K], rotated to their positions."""
        q, k, v = (part(x).reshape(*x.shape[:2], -1, self.width) for part in (self.q, self.k, self.v))
        if self.base is not None:
            q, k = rotary(q, positions, self.base), rotary(k, positions, self.base)
        return q, k, v
