"""A gated diagonal state-space model: one state per channel, all of its coefficients from the token.

    u = conv(x),   [r, B, C, U] = u W;   alpha = exp(-softplus(r) * rate);   s_t = alpha_t * s_{t-1} + B_t * U_t
    y_t = rms(C_t * s_t) + u_t W_skip                   rate > 0 per channel; convolution with silu

A state is read after its token entered; the printed equation reads one token late. Rates start so that, at r = 0, half
of a state is left after 1 to `max_timescale` tokens, log-uniform over the channels. Columns of B start smaller where states
last longer, by sqrt(1 - alpha^2), so that the norm meets states of one size. Projections otherwise start as in Mamba.
With d states in all, recall is left to attention and memories beside it.

State: a float32 per channel, and the last 3 inputs of the convolution.
Source: Hydra (arXiv 2508.15099), the equations of its SSM; convolution, norm, half-lives and start are chosen here.
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
from recallax.layers.norm import RMSNorm
from recallax.layers.short_convolution import ShortConvolution
from recallax.layers.state_reset import reset_for_prefill, reset_for_step
from recallax.layers.step_filter import StepFilteredModule
from recallax.pallas_kernels.selective_scan import selective_scan, selective_scan_step
from recallax.types import Aux, Precision, SeqInfo, StepInfo


@dataclass(frozen=True, kw_only=True)
class DiagonalSSM(MixerConfig):
    """See the head of the file."""

    max_timescale: float = 2048.0
    """Longest half-life at the start, in tokens: the training length."""
    conv_size: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.max_timescale < math.inf:
            raise ConfigError(
                f"max_timescale is {self.max_timescale}; a half-life must be at least 1 token, and finite"
            )
        if self.conv_size < 1:
            raise ConfigError(f"conv_size is {self.conv_size}; it needs at least 1 tap")

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "DiagonalSSMMixer":
        return DiagonalSSMMixer(self, d_model, layer, precision=precision, rngs=rngs)


class DiagonalSSMState(NamedTuple):
    """The states and the last inputs of the convolution."""

    ssm_state: Float[Array, "B D 1"]
    conv_state: Float[Array, "B W-1 D"]


class DiagonalSSMMixer(RecurrentMixer, StepFilteredModule):
    """See the head of the file."""

    def __init__(self, config: DiagonalSSM, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        self.conv = ShortConvolution(d_model, config.conv_size, precision=precision, rngs=rngs)
        self.input = Linear(d_model, 4 * d_model, precision=precision, rngs=rngs, std=torch_linear_std(d_model))
        uniform = jax.random.uniform(rngs.params(), (d_model,), precision.param, 0.0, math.log(config.max_timescale))
        rate = jnp.exp(-uniform)  # exp(-softplus(0) / half-life) = 2^(-1 / half-life)
        columns = jnp.ones((4, d_model), precision.param).at[1].set(jnp.sqrt(-jnp.expm1(-2 * math.log(2) * rate)))
        self.input.kernel[...] = self.input.kernel[...] * columns.reshape(1, -1)
        self.rate = parameter(jnp.log(jnp.expm1(rate)), ("heads",), weight_decay=False)
        self.norm = RMSNorm(d_model, precision=precision)
        std = residual_std(layer.num_layers)
        self.skip = Linear(d_model, d_model, precision=precision, rngs=rngs, std=std, axes=("heads", "embed"))
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
        active, (s, past) = jnp.asarray(info.active), reset_for_step(state, info)
        u, past = self.conv.step(x, info, past)
        fed, log_decay, c = self._scan_inputs(u)
        read, s = selective_scan_step(fed, log_decay, s, active)
        return jnp.where(active[:, None], self._output(read, c, u), 0), DiagonalSSMState(s, past)

    def _run(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: DiagonalSSMState | None
    ) -> tuple[Float[Array, "B T D"], DiagonalSSMState]:
        segments = jnp.asarray(seq.segment_ids)
        s, past = (None, None) if state is None else state
        u, past = self.conv(x, segments, past)
        fed, log_decay, c = self._scan_inputs(u)
        read, s = selective_scan(fed, log_decay, state=s, segment_ids=segments)
        return self._output(read, c, u), DiagonalSSMState(s, past)

    def _scan_inputs(self, u: Float[Array, "*batch D"]) -> tuple[Array, Array, Array]:
        """What is fed, the log-decay, and C, in float32."""
        r, b, c, value = jnp.split(self.input(u).astype(jnp.float32), 4, axis=-1)
        dt, fed = self.filter_steps(jax.nn.softplus(r)), b * value
        if self.filter is not None:
            fed = jnp.where(dt > 0, fed, 0)  # what is fed does not grow with the step
        return fed, -dt * jnp.broadcast_to(self.decay_rates(), r.shape), c

    def decay_rates(self) -> Float[Array, " D"]:
        return jax.nn.softplus(self.rate[...].astype(jnp.float32))

    def _output(
        self, scanned: Float[Array, "*batch D"], c: Float[Array, "*batch D"], u: Float[Array, "*batch D"]
    ) -> Float[Array, "*batch D"]:
        return self.norm((c * scanned).astype(self.dtype)) + self.skip(u)
