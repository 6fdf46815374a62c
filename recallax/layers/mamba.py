"""Mamba: a diagonal state-space model whose step size, input and readout depend on the token.

    h_t[d] = exp(dt_t[d] A[d]) h_{t-1}[d] + dt_t[d] x_t[d] B_t,   o_t[d] = C_t.h_t[d] + D[d] x_t[d]
    x = silu(conv(u W_x) + bias);   r, B, C = x W;   dt = softplus(r W_dt + b);   y_t = W_o [ o_t * silu(u_t W_z) ]

State: N float32 for each of the E = expand * d channels, and the last 3 inputs of the convolution.
Projections start as PyTorch's do, as in the authors' code.
Source: Gu & Dao 2023 (arXiv 2312.00752), section 3 and algorithm 2.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import ConfigError
from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer
from recallax.layers.dense import Linear, parameter, residual_std, torch_linear_std
from recallax.layers.recurrence_gates import init_dt_bias
from recallax.layers.short_convolution import ShortConvolution
from recallax.layers.state_reset import reset_for_prefill, reset_for_step
from recallax.pallas_kernels.selective_scan import selective_scan, selective_scan_step
from recallax.types import Aux, Precision, SeqInfo, StepInfo


@dataclass(frozen=True, kw_only=True)
class Mamba(MixerConfig):
    """The selective state-space model of Mamba-1."""

    state_dim: int = 16
    """N: states per channel."""
    expand: int = 2
    conv_size: int = 4
    dt_rank: int | None = None
    """Width of the projection to step sizes; None is d_model / 16, rounded up."""

    def __post_init__(self) -> None:
        if min(self.state_dim, self.expand, self.conv_size) < 1:
            raise ConfigError(f"state_dim, expand and conv of mamba must be at least 1: {self}")

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "MambaMixer":
        return MambaMixer(self, d_model, layer, precision=precision, rngs=rngs)


class MambaState(NamedTuple):
    """The states and the last inputs of the convolution."""

    ssm_state: Float[Array, "B E N"]
    conv_state: Float[Array, "B W-1 E"]


class MambaMixer(RecurrentMixer):
    """See the head of the file."""

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
        self.out = Linear(
            inner, d_model, precision=precision, rngs=rngs, std=residual_std(layer.num_layers), axes=("heads", "embed")
        )

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
        active, (h, past) = jnp.asarray(info.active), reset_for_step(state, info)
        u, z = jnp.split(self.input(x), 2, axis=-1)
        u, past = self.conv.step(u, info, past)
        fed, dt, b, c = self._scan_inputs(u)
        y, h = selective_scan_step(fed, dt, h, active, a=-jnp.exp(self.a_log[...]), b=b, c=c)
        return jnp.where(active[:, None], self._output(y, u, z), 0), MambaState(h, past)

    def _run(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: MambaState | None
    ) -> tuple[Float[Array, "B T D"], MambaState]:
        segments = jnp.asarray(seq.segment_ids)
        h, past = (None, None) if state is None else state
        u, z = jnp.split(self.input(x), 2, axis=-1)
        u, past = self.conv(u, segments, past)
        fed, dt, b, c = self._scan_inputs(u)
        y, h = selective_scan(fed, dt, a=-jnp.exp(self.a_log[...]), b=b, c=c, state=h, segment_ids=segments)
        return self._output(y, u, z), MambaState(h, past)

    def _scan_inputs(self, u: Float[Array, "*batch E"]) -> tuple[Array, Array, Array, Array]:
        """dt * u, dt, B and C, in float32."""
        r, b, c = jnp.split(self.select(u), [self.dt_rank, self.dt_rank + self.state_dim], axis=-1)
        raw = self.dt(r).astype(jnp.float32)
        dt = jax.nn.softplus(raw + jnp.broadcast_to(self.dt_bias[...], raw.shape))
        return dt * u.astype(jnp.float32), dt, b.astype(jnp.float32), c.astype(jnp.float32)

    def _output(
        self, y: Float[Array, "*batch E"], u: Float[Array, "*batch E"], z: Float[Array, "*batch E"]
    ) -> Float[Array, "*batch D"]:
        y = y + jnp.broadcast_to(self.d[...], y.shape) * u.astype(jnp.float32)
        return self.out((y * jax.nn.silu(z.astype(jnp.float32))).astype(self.dtype))
