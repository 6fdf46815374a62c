"""Parameters with tags for optimizer and mesh, and the linear projections that own most of them."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import ConfigError
from recallax.types import Precision


def parameter(
    value: Array,
    axes: tuple[str | None, ...],
    *,
    weight_decay: bool = True,
    lr_multiplier: float = 1.0,
    sparse: bool = False,
    active_fraction: float = 1.0,
) -> nnx.Param[Array]:
    """Create a trainable array with tags for the optimizer and the mesh.

    Args:
        value: Initial value.
        axes: A logical name per axis ("embed", "heads", "mlp", "vocab" or None), by which the mesh shards it. A stack
            of repeated blocks adds leading axes without a name.
        weight_decay: False exempts the parameter from weight decay.
        lr_multiplier: Learning rate as a multiple of the run's.
        sparse: Adam does not update rows, or their moments, in steps where their gradient is zero.
        active_fraction: Fraction of the elements that one token uses, for counts of active parameters.

    Returns:
        The parameter.

    Raises:
        ValueError: `axes` does not have one name per axis.
    """
    if len(axes) != value.ndim:
        raise ValueError(f"a parameter of shape {value.shape} has axes {axes}; it needs one per axis")
    return nnx.Param(value, axes=axes, decay=weight_decay, lr=lr_multiplier, sparse=sparse, active=active_fraction)


class Linear(nnx.Module):
    """y = x W (+ b) in the compute dtype; W is [in_features, out_features] and starts normal with deviation `std`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
        std: float = 0.02,
        bias: bool = False,
        axes: tuple[str | None, str | None] = ("embed", "heads"),
    ):
        kernel = std * jax.random.normal(rngs.params(), (in_features, out_features), precision.param)
        self.kernel = parameter(kernel, axes)
        self.bias = parameter(jnp.zeros(out_features, precision.param), axes[1:], weight_decay=False) if bias else None
        self.dtype = precision.compute

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        exact = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
        y = jnp.matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype), precision=exact)
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...].astype(self.dtype), y.shape)


type ApplyLinear = Callable[[Linear, Array], Array]
"""Applies a projection: `Linear.__call__`, or a function that groups tokens by the weights that they use."""


class LowRank(nnx.Module):
    """y = x A B (+ b) with A [in_features, rank] and B [rank, out_features], without an activation between them."""

    def __init__(
        self,
        in_features: int,
        rank: int,
        out_features: int,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
        bias: bool = False,
    ):
        self.down = Linear(in_features, rank, precision=precision, rngs=rngs, axes=("embed", None))
        self.up = Linear(rank, out_features, precision=precision, rngs=rngs, bias=bias, axes=(None, "heads"))

    def __call__(
        self, x: Float[Array, "*batch I"], apply_linear: ApplyLinear = Linear.__call__
    ) -> Float[Array, "*batch O"]:
        return apply_linear(self.up, apply_linear(self.down, x))


class Projections(nnx.Module):
    """Several named projections of one input."""

    def __init__(self, parts: Mapping[str, Linear | LowRank]):
        self.parts = nnx.Dict(parts)

    def __call__(
        self, x: Float[Array, "*batch D"], apply_linear: ApplyLinear = Linear.__call__
    ) -> dict[str, Float[Array, "*batch O"]]:
        """Apply every projection.

        Args:
            x: Inputs.
            apply_linear: Function that applies each linear map.

        Returns:
            Outputs by name; they may differ in width.
        """
        return {
            name: part(x, apply_linear) if isinstance(part, LowRank) else apply_linear(part, x)
            for name, part in self.parts.items()
        }


def head_dim_of(name: str, width: int, num_heads: int) -> int:
    """Compute the width of one head, or the size of one group of heads.

    Args:
        name: Name of the mixer, for the error message.
        width: Channels (or heads) to be split.
        num_heads: Number of equal parts.

    Returns:
        `width / num_heads`.

    Raises:
        ConfigError: `num_heads` does not divide `width`.
    """
    if num_heads < 1 or width % num_heads:
        divisors = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        raise ConfigError(f"{name}: {width} channels cannot be split into {num_heads} heads; use one of {divisors}")
    return width // num_heads


def torch_linear_std(in_features: int) -> float:
    """Standard deviation of PyTorch's default initialization of a linear layer, which some published models keep."""
    return (3 * in_features) ** -0.5


def residual_std(num_layers: int) -> float:
    """Initial standard deviation of projections into the residual stream: 0.02 / sqrt(2 num_layers), as in GPT-2."""
    return 0.02 / math.sqrt(2 * num_layers)


def residual_linear(
    in_features: int,
    d_model: int,
    num_layers: int,
    *,
    in_axis: str | None,
    precision: Precision,
    rngs: nnx.Rngs,
    bias: bool = False,
) -> Linear:
    """Build a projection into the residual stream, which starts with the standard deviation `residual_std`.

    Args:
        in_features: Width of the input.
        d_model: Width of the model.
        num_layers: Number of layers of the model.
        in_axis: Logical name of the input axis.
        precision: Dtypes of parameters and activations.
        rngs: Source of the initial parameters.
        bias: Add a bias.

    Returns:
        The projection.
    """
    std = residual_std(num_layers)
    return Linear(in_features, d_model, precision=precision, rngs=rngs, std=std, bias=bias, axes=(in_axis, "embed"))
