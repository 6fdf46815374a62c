"""Gated diagonal state-space model: one state per channel, with coefficients that are computed from the token.

    u = conv(x),   [r, B, C, U] = u W;   alpha = exp(-softplus(r) * rate);   s_t = alpha_t * s_{t-1} + B_t * U_t
    y_t = rms(C_t * s_t) + u_t W_skip                   rate > 0 per channel; convolution with silu

A token reads the state after it has been added; the printed equation reads one token later. Rates are initialised so
that the half-life at r = 0 is log-uniform over the channels, from 1 to `max_timescale` tokens. Columns of B are scaled
by sqrt(1 - alpha^2), so that states of all half-lives start with the same size. The other projections are initialised
as in Mamba. The state has only d elements; recall needs attention or a memory beside this mixer.

State: one float32 per channel, and the last 3 inputs of the convolution.
Source: Hydra (arXiv 2508.15099), the equations of its SSM. Hydra does not specify convolution, norm, half-lives and
initialization; those here are our choice.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import ConfigError, require_at_least
from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer
from recallax.layers.dense import Linear, parameter, residual_linear, torch_linear_std
from recallax.layers.norm import RMSNorm
from recallax.layers.short_convolution import ShortConvolution
from recallax.layers.state_reset import reset_for_prefill, reset_for_step
from recallax.layers.step_filter import StepFilteredModule
from recallax.pallas_kernels.selective_scan import selective_scan, selective_scan_step
from recallax.types import Aux, Precision, SeqInfo, StepInfo


@dataclass(frozen=True, kw_only=True)
class DiagonalSSM(MixerConfig):
    """Gated diagonal state-space model (Hydra)."""

    max_timescale: float = 2048.0
    """Longest half-life at initialization in tokens, usually the training length."""
    conv_size: int = 4
    """Taps of the short convolution."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_timescale < math.inf:
            raise ConfigError(
                f"max_timescale is {self.max_timescale}; a half-life must be at least 1 token, and finite"
            )
        require_at_least(1, conv_size=self.conv_size)

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "DiagonalSSMMixer":
        return DiagonalSSMMixer(self, d_model, layer, precision=precision, rngs=rngs)


class DiagonalSSMState(NamedTuple):
    """State of `DiagonalSSM`."""

    ssm_state: Float[Array, "B D 1"]
    """State of each channel, float32."""
    conv_state: Float[Array, "B W-1 D"]
    """Last inputs of the convolution in the compute dtype."""


class DiagonalSSMMixer(RecurrentMixer, StepFilteredModule):
    """Short convolution, one decaying state per channel, output norm and skip connection."""

    def __init__(self, config: DiagonalSSM, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        self.conv = ShortConvolution(d_model, config.conv_size, precision=precision, rngs=rngs)
        self.input = Linear(d_model, 4 * d_model, precision=precision, rngs=rngs, std=torch_linear_std(d_model))
        uniform = jax.random.uniform(rngs.params(), (d_model,), precision.param, 0.0, math.log(config.max_timescale))
        rate = jnp.exp(-uniform)  # exp(-softplus(0) / half-life) = 2^(-1 / half-life)
        columns = jnp.ones((4, d_model), precision.param).at[1].set(jnp.sqrt(-jnp.expm1(-2 * math.log(2) * rate)))
        self.input.kernel[...] = self.input.kernel[...] * columns.reshape(1, -1)
        self.rate = parameter(jnp.log(jnp.expm1(rate)), ("heads",), weight_decay=False)
        self.norm = RMSNorm(d_model, precision=precision)
        self.skip = residual_linear(d_model, d_model, layer.num_layers, in_axis="heads", precision=precision, rngs=rngs)
        self.dtype = precision.compute

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        y, _ = self._run(x, seq, None)
        return y, {}

    def init_state(self, batch: int, max_len: int) -> DiagonalSSMState:
        return DiagonalSSMState(jnp.zeros((batch, *self.rate.shape, 1), jnp.float32), self.conv.init_state(batch))

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: DiagonalSSMState
    ) -> tuple[Float[Array, "B T D"], DiagonalSSMState, Aux]:
        y, state = self._run(x, seq, reset_for_prefill(state, seq))
        return y, state, {}

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: DiagonalSSMState
    ) -> tuple[Float[Array, "B D"], DiagonalSSMState]:
        active, (ssm_state, conv_state) = jnp.asarray(info.active), reset_for_step(state, info)
        u, conv_state = self.conv.step(x, info, conv_state)
        inputs, log_decay, c = self._scan_inputs(u)
        s, ssm_state = selective_scan_step(inputs, log_decay, ssm_state, active)
        return jnp.where(active[:, None], self._output(s, c, u), 0), DiagonalSSMState(ssm_state, conv_state)

    def _run(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: DiagonalSSMState | None
    ) -> tuple[Float[Array, "B T D"], DiagonalSSMState]:
        segment_ids = jnp.asarray(seq.segment_ids)
        ssm_state, conv_state = (None, None) if state is None else state
        u, conv_state = self.conv(x, segment_ids, conv_state)
        inputs, log_decay, c = self._scan_inputs(u)
        s, ssm_state = selective_scan(inputs, log_decay, state=ssm_state, segment_ids=segment_ids)
        return self._output(s, c, u), DiagonalSSMState(ssm_state, conv_state)

    def _scan_inputs(self, u: Float[Array, "*batch D"]) -> tuple[Array, Array, Array]:
        """Compute the inputs B * U of the scan, its log-decay, and C, in float32."""
        r, b, c, value = jnp.split(self.input(u).astype(jnp.float32), 4, axis=-1)
        dt, inputs = self.filter_steps(jax.nn.softplus(r)), b * value
        if self.filter is not None:
            inputs = jnp.where(dt > 0, inputs, 0)  # B * U does not depend on dt, so a filtered step has to clear it
        return inputs, -dt * jnp.broadcast_to(self.decay_rates(), r.shape), c

    def decay_rates(self) -> Float[Array, " D"]:
        return jax.nn.softplus(self.rate[...].astype(jnp.float32))

    def _output(
        self, s: Float[Array, "*batch D"], c: Float[Array, "*batch D"], u: Float[Array, "*batch D"]
    ) -> Float[Array, "*batch D"]:
        return self.norm((c * s).astype(self.dtype)) + self.skip(u)
