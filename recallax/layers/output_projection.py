"""Output projection of memories: a norm per group of channels, a gate, and a projection to the residual stream.

gate_last:   y = W_o [ rms(o) * f(g) ]         gate_first:   y = W_o [ rms(o * f(g)) ]      g = x W_g
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.base import LayerInfo
from recallax.layers.dense import Linear, LowRank, parameter, residual_linear
from recallax.layers.norm import rms_norm
from recallax.types import Precision

type NormGateOrder = Literal["gate_last", "gate_first", "no_norm"]
"""Order of norm and gate; "no_norm" leaves the norm out."""
type GateActivation = Literal["silu", "sigmoid"]
GATE_ACTIVATIONS = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


class OutputProjection(nnx.Module):
    """Norm, optional gate and output projection of a memory's output.

    Args:
        in_features: Width of all value heads together.
        d_model: Width of the model.
        layer: Position of the layer in the model, for the initial scale of the projection.
        num_groups: Number of groups of channels that are normalized separately.
        precision: Dtypes of parameters and activations.
        rngs: Source of the initial parameters.
        gate: Projection of the gate; None: no gate.
        activation: Activation of the gate.
        order: Order of norm and gate.
        shared_scale: All groups share one scale of the norm; otherwise each has its own.
        norm_eps: Added to the mean square in the norm.
    """

    def __init__(
        self,
        in_features: int,
        d_model: int,
        layer: LayerInfo,
        *,
        num_groups: int,
        precision: Precision,
        rngs: nnx.Rngs,
        gate: Linear | LowRank | None = None,
        activation: GateActivation = "silu",
        order: NormGateOrder = "gate_last",
        shared_scale: bool = True,
        norm_eps: float = 1e-5,
    ):
        self.num_groups, self.order, self.activation, self.norm_eps = num_groups, order, activation, norm_eps
        self.dtype = precision.compute
        self.gate = gate
        width = in_features // num_groups
        ones = jnp.ones((width,) if shared_scale else (num_groups, width), precision.param)
        self.scale = None if order == "no_norm" else parameter(ones, (None,) * ones.ndim, weight_decay=False)
        self.out = residual_linear(
            in_features, d_model, layer.num_layers, in_axis="heads", precision=precision, rngs=rngs
        )

    def __call__(self, o: Float[Array, "*batch H V"], x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Map a memory's output to the residual stream; norm and gate are computed in float32.

        Args:
            o: Output of the memory.
            x: Input of the layer, from which the gate is computed.

        Returns:
            The layer's output in the compute dtype.
        """
        y = o.reshape(*x.shape[:-1], -1).astype(jnp.float32)
        gate = 1.0 if self.gate is None else GATE_ACTIVATIONS[self.activation](self.gate(x).astype(jnp.float32))
        if self.order == "gate_last":
            y = self._norm(y) * gate
        elif self.order == "gate_first":
            y = self._norm(y * gate)
        else:
            y = y * gate
        return self.out(y.astype(self.dtype))

    def _norm(self, y: Float[Array, "*batch W"]) -> Float[Array, "*batch W"]:
        assert self.scale is not None
        grouped = y.reshape(*y.shape[:-1], self.num_groups, -1)
        return rms_norm(grouped, self.scale[...], self.norm_eps, jnp.float32).reshape(y.shape)
