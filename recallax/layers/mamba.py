"""Mamba: a diagonal state-space model whose step size, input and output coefficients depend on the token.

    h_t[d] = exp(dt_t[d] A[d]) h_{t-1}[d] + dt_t[d] x_t[d] B_t,   o_t[d] = C_t.h_t[d] + D[d] x_t[d]
    x = silu(conv(u W_x) + bias);   r, B, C = x W;   dt = softplus(r W_dt + b);   y_t = W_o [ o_t * silu(u_t W_z) ]

State: N float32 for each of the E = expand * d channels, and the last 3 inputs of the convolution.
Projections have PyTorch's default initialization, as in the authors' code.
Source: Gu & Dao 2023 (arXiv 2312.00752), section 3 and algorithm 2.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import require_at_least
from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer
from recallax.layers.dense import Linear, parameter, residual_linear, torch_linear_std
from recallax.layers.recurrence_gates import decay_rate, init_dt_bias
from recallax.layers.short_convolution import ShortConvolution
from recallax.layers.state_reset import reset_for_prefill, reset_for_step
from recallax.pallas_kernels.selective_scan import selective_scan, selective_scan_step
from recallax.types import Aux, Precision, SeqInfo, StepInfo


@dataclass(frozen=True, kw_only=True)
class Mamba(MixerConfig):
    """Selective state-space model (Mamba)."""

    state_dim: int = 16
    """N: states per channel."""
    expand: int = 2
    """Number of channels as a multiple of d_model."""
    conv_size: int = 4
    """Taps of the short convolution."""
    dt_rank: int | None = None
    """Rank of the projection to step sizes; None: d_model / 16, rounded up."""

    def __post_init__(self) -> None:
        require_at_least(1, state_dim=self.state_dim, expand=self.expand, conv_size=self.conv_size)

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "MambaMixer":
        return MambaMixer(self, d_model, layer, precision=precision, rngs=rngs)


class MambaState(NamedTuple):
    """State of `Mamba`."""

    ssm_state: Float[Array, "B E N"]
    """States of each channel, float32."""
    conv_state: Float[Array, "B W-1 E"]
    """Last inputs of the convolution in the compute dtype."""


class MambaMixer(RecurrentMixer):
    """Short convolution, selective scan with N states per channel, skip connection and output gate."""

    def __init__(self, config: Mamba, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        inner = config.expand * d_model
        self.dt_rank = config.dt_rank or math.ceil(d_model / 16)
        self.state_dim = config.state_dim
        self.dtype = precision.compute
        self.input = Linear(d_model, 2 * inner, std=torch_linear_std(d_model), precision=precision, rngs=rngs)
        self.conv = ShortConvolution(inner, config.conv_size, precision=precision, rngs=rngs, bias=True)
        width = self.dt_rank + 2 * self.state_dim
        axes = ("heads", None)
        self.select = Linear(inner, width, std=torch_linear_std(inner), precision=precision, rngs=rngs, axes=axes)
        std = torch_linear_std(self.dt_rank)
        self.dt = Linear(self.dt_rank, inner, std=std, precision=precision, rngs=rngs, axes=(None, "heads"))
        self.dt_bias = parameter(init_dt_bias(inner, precision, rngs), ("heads",), weight_decay=False)
        rates = jnp.broadcast_to(jnp.arange(1, self.state_dim + 1, dtype=precision.param), (inner, self.state_dim))
        self.a_log = parameter(jnp.log(rates), ("heads", None), weight_decay=False)
        self.d = parameter(jnp.ones(inner, precision.param), ("heads",), weight_decay=False)
        self.out = residual_linear(inner, d_model, layer.num_layers, in_axis="heads", precision=precision, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        y, _ = self._run(x, seq, None)
        return y, {}

    def init_state(self, batch: int, max_len: int) -> MambaState:
        h = jnp.zeros((batch, *self.a_log[...].shape), jnp.float32)
        return MambaState(h, self.conv.init_state(batch))

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: MambaState
    ) -> tuple[Float[Array, "B T D"], MambaState, Aux]:
        y, state = self._run(x, seq, reset_for_prefill(state, seq))
        return y, state, {}

    def step(self, x: Float[Array, "B D"], info: StepInfo, state: MambaState) -> tuple[Float[Array, "B D"], MambaState]:
        active, (ssm_state, conv_state) = jnp.asarray(info.active), reset_for_step(state, info)
        u, z = jnp.split(self.input(x), 2, axis=-1)
        u, conv_state = self.conv.step(u, info, conv_state)
        inputs, dt, b, c = self._scan_inputs(u)
        y, ssm_state = selective_scan_step(inputs, dt, ssm_state, active, a=-decay_rate(self.a_log[...]), b=b, c=c)
        return jnp.where(active[:, None], self._output(y, u, z), 0), MambaState(ssm_state, conv_state)

    def _run(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: MambaState | None
    ) -> tuple[Float[Array, "B T D"], MambaState]:
        segment_ids, a = jnp.asarray(seq.segment_ids), -decay_rate(self.a_log[...])
        ssm_state, conv_state = (None, None) if state is None else state
        u, z = jnp.split(self.input(x), 2, axis=-1)
        u, conv_state = self.conv(u, segment_ids, conv_state)
        inputs, dt, b, c = self._scan_inputs(u)
        y, ssm_state = selective_scan(inputs, dt, a=a, b=b, c=c, state=ssm_state, segment_ids=segment_ids)
        return self._output(y, u, z), MambaState(ssm_state, conv_state)

    def _scan_inputs(self, u: Float[Array, "*batch E"]) -> tuple[Array, Array, Array, Array]:
        """Compute dt * u, dt, B and C, in float32."""
        r, b, c = jnp.split(self.select(u), [self.dt_rank, self.dt_rank + self.state_dim], axis=-1)
        projected = self.dt(r).astype(jnp.float32)
        dt = jax.nn.softplus(projected + jnp.broadcast_to(self.dt_bias[...], projected.shape))
        return dt * u.astype(jnp.float32), dt, b.astype(jnp.float32), c.astype(jnp.float32)

    def _output(
        self, y: Float[Array, "*batch E"], u: Float[Array, "*batch E"], z: Float[Array, "*batch E"]
    ) -> Float[Array, "*batch D"]:
        y = y + jnp.broadcast_to(self.d[...], y.shape) * u.astype(jnp.float32)
        return self.out((y * jax.nn.silu(z.astype(jnp.float32))).astype(self.dtype))
