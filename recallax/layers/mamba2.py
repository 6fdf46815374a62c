"""Mamba-2: a state-space model in the form of linear attention with a decay per token and head.

    S_t = exp(-exp(a) dt_t) S_{t-1} + B_t (dt_t x_t)^T,   o_t = S_t^T C_t + D x_t,   dt_t = softplus(u_t W_dt + b)
    x, B, C = silu(conv(u W) + bias);   y_t = W_o rms(o_t * silu(u_t W_z))   per group

The heads of a group share B and C (keys and queries of width N). State: N P float32 per head of width P, and the last 3
inputs of the convolution. Projections have PyTorch's default initialization, as in the authors' code: at widths below a
few hundred, a standard deviation of 0.02 is too small to learn within a few thousand steps.
Source: Dao & Gu 2024 (arXiv 2405.21060), sections 5 and 7.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import ConfigError, require_at_least
from recallax.layers.base import LayerInfo
from recallax.layers.dense import Linear, Projections, head_dim_of, parameter, torch_linear_std
from recallax.layers.matrix_memory import MatrixCell, RecurrenceInputs
from recallax.layers.memory import HeadDims, MemoryConfig
from recallax.layers.output_projection import NormGateOrder, OutputProjection
from recallax.layers.recurrence_gates import DecayGate, decay_rate, split_heads
from recallax.layers.short_convolution import ShortConvolution
from recallax.layers.step_filter import StepFilteredModule
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class Mamba2(MemoryConfig):
    """State-space model with one decay per head (Mamba-2)."""

    state_dim: int = 128
    """N: width of B and C."""
    head_dim: int = 64
    """P: width of a head; there are intermediate_size / P heads."""
    num_groups: int = 1
    """Groups of heads that share B and C, and of channels that are normalized together."""
    expand: int = 2
    """Width of all heads together as a multiple of d_model."""
    intermediate_size: int | None = None
    """Width of all heads together; None: expand * d_model."""
    conv_size: int = 4
    """Taps of the short convolution."""
    order: NormGateOrder = "gate_first"
    """Order of output norm and output gate."""
    dt_limit: tuple[float, float | None] = (0.0, None)
    """Range to which step sizes are clipped; None: no upper limit."""
    norm_eps: float = 1e-5
    """Added to the mean square in the output norm."""

    def __post_init__(self) -> None:
        require_at_least(1, conv_size=self.conv_size)
        low, high = self.dt_limit
        if low < 0 or (high is not None and high <= low):
            raise ConfigError(f"dt_limit is {self.dt_limit}; it must be a range of step sizes of at least 0")

    def head_dims(self, d_model: int) -> HeadDims:
        intermediate_size = self.intermediate_size or self.expand * d_model
        if intermediate_size % self.head_dim:
            raise ConfigError(
                f"head_dim is {self.head_dim}; it must divide the intermediate size {intermediate_size} of Mamba2"
            )
        num_heads = intermediate_size // self.head_dim
        head_dim_of("mamba2's heads over groups", num_heads, self.num_groups)
        return HeadDims(self.num_groups, num_heads, self.state_dim, self.head_dim)

    def q_proj(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Projections:
        width, std = self.num_groups * self.state_dim, torch_linear_std(d_model)
        return Projections({"q": Linear(d_model, width, std=std, precision=precision, rngs=rngs)})

    def kv_proj(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Projections:
        num_groups, num_heads, head_k_dim, head_v_dim = self.head_dims(d_model)
        widths = {"k": num_groups * head_k_dim, "v": num_heads * head_v_dim, "dt": num_heads}
        std = torch_linear_std(d_model)
        linear = {name: Linear(d_model, w, std=std, precision=precision, rngs=rngs) for name, w in widths.items()}
        return Projections(linear)

    def cell(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "Mamba2Cell":
        num_groups, num_heads, head_k_dim, head_v_dim = dims = self.head_dims(d_model)
        width = 2 * num_groups * head_k_dim + num_heads * head_v_dim
        conv = ShortConvolution(width, self.conv_size, precision=precision, rngs=rngs, bias=True)
        low, high = self.dt_limit
        limit = (float(low), float("inf" if high is None else high))
        gate = DecayGate(num_heads, num_heads, precision=precision, rngs=rngs, dt_limit=limit)
        return Mamba2Cell(dims, conv, gate, precision)

    def output_proj(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> OutputProjection:
        _, num_heads, _, head_v_dim = self.head_dims(d_model)
        return OutputProjection(
            num_heads * head_v_dim,
            d_model,
            layer,
            num_groups=self.num_groups,
            gate=Linear(d_model, num_heads * head_v_dim, std=torch_linear_std(d_model), precision=precision, rngs=rngs),
            order=self.order,
            shared_scale=False,
            norm_eps=self.norm_eps,
            precision=precision,
            rngs=rngs,
        )


class Mamba2Cell(MatrixCell, StepFilteredModule):
    """Matrix memory with a decay per token and head, and a skip connection from values to outputs."""

    def __init__(self, head_dims: HeadDims, conv: ShortConvolution, gate: DecayGate, precision: Precision):
        super().__init__(head_dims, conv)
        self.gate = gate
        self.d = parameter(jnp.ones(head_dims.num_v_heads, precision.param), (None,), weight_decay=False)

    def recurrence_inputs(
        self, projections: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]
    ) -> RecurrenceInputs:
        num_groups, num_heads, _, _ = self.head_dims
        q, k = (split_heads(projections[name], num_groups) for name in ("q", "k"))
        x = split_heads(projections["v"], num_heads)
        dt = self.filter_steps(self.gate.dt(projections["dt"]))
        v = (x.astype(jnp.float32) * dt[..., None]).astype(x.dtype)
        return RecurrenceInputs(q, k, v, log_decay=self.gate(dt))

    def decay_rates(self) -> Float[Array, " H"]:
        return decay_rate(self.gate.a_log[...])

    def cell_output(
        self, y: Float[Array, "B T H V"], projections: Mapping[str, Float[Array, "B T W"]]
    ) -> Float[Array, "B T H V"]:
        x = split_heads(projections["v"], self.head_dims.num_v_heads).astype(jnp.float32)
        return (y.astype(jnp.float32) + self.d[...][None, None, :, None] * x).astype(y.dtype)
