"""Griffin's recurrent block: a short convolution, a real-gated linear recurrent unit (RG-LRU) and a GELU gate.

    u = conv(x W_u) + bias;   r = sigmoid(W_r u + b_r),   i = sigmoid(W_i u + b_i)   (block-diagonal W_r, W_i)
    log a = -8 softplus(L) r;   h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t);   y = W_o [ h * gelu(x W_g) ]

The first token of a document is added without the factor sqrt(1 - a^2).
State: one float32 per channel, and the last 3 inputs of the convolution.
Source: De et al. 2024 (Griffin, arXiv 2402.19427), equations 1 to 4.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer
from recallax.layers.dense import Linear, head_dim_of, parameter, residual_linear
from recallax.layers.short_convolution import ShortConvolution
from recallax.layers.state_reset import reset_for_prefill, reset_for_step
from recallax.pallas_kernels.selective_scan import selective_scan, selective_scan_step
from recallax.types import Aux, Precision, SeqInfo, StepInfo

DECAY_SCALE = 8.0
"""Constant c in log a = -c softplus(L) r, from the paper."""


@dataclass(frozen=True, kw_only=True)
class RGLRU(MixerConfig):
    """Recurrent block with a real-gated linear recurrent unit (Griffin)."""

    num_heads: int = 4
    """Blocks of the block-diagonal projections of the two gates."""
    lru_width: int | None = None
    """Channels of the recurrence; None: d_model."""
    conv_size: int = 4
    """Taps of the short convolution."""

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "RGLRUMixer":
        return RGLRUMixer(self, d_model, layer, precision=precision, rngs=rngs)


class RGLRUState(NamedTuple):
    """State of `RGLRU`."""

    recurrent_state: Float[Array, "B E 1"]
    """State of each channel, float32."""
    conv_state: Float[Array, "B W-1 E"]
    """Last inputs of the convolution in the compute dtype."""


class RGLRUMixer(RecurrentMixer):
    """Short convolution, real-gated linear recurrence, GELU gate and output projection."""

    def __init__(self, config: RGLRU, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        inner = config.lru_width or d_model
        block = head_dim_of("rg_lru", inner, config.num_heads)
        self.dtype = precision.compute
        self.input = Linear(d_model, inner, precision=precision, rngs=rngs, bias=True)
        self.gate = Linear(d_model, inner, precision=precision, rngs=rngs, bias=True)
        self.conv = ShortConvolution(
            inner, config.conv_size, precision=precision, rngs=rngs, bias=True, activation="none"
        )
        shape = (config.num_heads, block, 2 * block)
        gates = block**-0.5 * jax.random.normal(rngs.params(), shape, precision.param)
        self.gates = parameter(gates, ("heads", None, None))
        self.gates_bias = parameter(jnp.zeros(shape[::2], precision.param), ("heads", None), weight_decay=False)
        a = jax.random.uniform(rngs.params(), (inner,), precision.param, 0.9, 0.999)  # decay at r = 1
        self.rate = parameter(jnp.log(jnp.expm1(-jnp.log(a) / DECAY_SCALE)), ("heads",), weight_decay=False)
        self.out = residual_linear(
            inner, d_model, layer.num_layers, in_axis="heads", precision=precision, rngs=rngs, bias=True
        )

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        y, _ = self._run(x, seq, None)
        return y, {}

    def init_state(self, batch: int, max_len: int) -> RGLRUState:
        return RGLRUState(jnp.zeros((batch, *self.rate.shape, 1), jnp.float32), self.conv.init_state(batch))

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: RGLRUState
    ) -> tuple[Float[Array, "B T D"], RGLRUState, Aux]:
        y, state = self._run(x, seq, reset_for_prefill(state, seq))
        return y, state, {}

    def step(self, x: Float[Array, "B D"], info: StepInfo, state: RGLRUState) -> tuple[Float[Array, "B D"], RGLRUState]:
        active, (recurrent_state, conv_state) = jnp.asarray(info.active), reset_for_step(state, info)
        u, conv_state = self.conv.step(self.input(x), info, conv_state)
        inputs, log_decay = self._scan_inputs(u, jnp.asarray(info.position))
        h, recurrent_state = selective_scan_step(inputs, log_decay, recurrent_state, active)
        return jnp.where(active[:, None], self._output(h, x), 0), RGLRUState(recurrent_state, conv_state)

    def _run(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: RGLRUState | None
    ) -> tuple[Float[Array, "B T D"], RGLRUState]:
        segment_ids = jnp.asarray(seq.segment_ids)
        recurrent_state, conv_state = (None, None) if state is None else state
        u, conv_state = self.conv(self.input(x), segment_ids, conv_state)
        inputs, log_decay = self._scan_inputs(u, jnp.asarray(seq.positions))
        h, recurrent_state = selective_scan(inputs, log_decay, state=recurrent_state, segment_ids=segment_ids)
        return self._output(h, x), RGLRUState(recurrent_state, conv_state)

    def _scan_inputs(self, u: Float[Array, "*batch E"], positions: Int[Array, "*batch"]) -> tuple[Array, Array]:
        """Compute the inputs sqrt(1 - a^2) i u of the scan and its log-decay, in float32."""
        heads = self.gates.shape[0]
        blocks = u.reshape(*u.shape[:-1], heads, -1)
        exact = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
        gates = jnp.einsum("...hi,hio->...ho", blocks, self.gates[...].astype(u.dtype), precision=exact)
        gates = gates.astype(jnp.float32) + jnp.broadcast_to(self.gates_bias[...], gates.shape)
        r, i = (jax.nn.sigmoid(gate).reshape(u.shape) for gate in jnp.split(gates, 2, axis=-1))
        log_decay = -DECAY_SCALE * jnp.broadcast_to(jax.nn.softplus(self.rate[...]), r.shape) * r
        # The derivative of the square root is infinite at 0.
        scale = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_decay), 1e-12))
        scale = jnp.where((positions == 0)[..., None], 1, scale)
        return scale * i * u.astype(jnp.float32), log_decay

    def _output(self, h: Float[Array, "*batch E"], x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        gate = jax.nn.gelu(self.gate(x).astype(jnp.float32), approximate=True)
        return self.out((h * gate).astype(self.dtype))
