"""Parameters with tags, and the projection that most of them belong to."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

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
    """A trainable array with what the optimizer and the mesh need to know about it.

    axes: a logical name per axis ("embed", "heads", "mlp", "vocab" or None), from which the mesh shards it; a stack
    of repeated blocks adds leading axes that have no name. decay: False exempts it from weight decay. lr: its learning
    rate as a multiple of the run's. sparse: rows whose gradient is zero are left as they are, their moments too.
    active: the share of it that one token takes.
    """
    if len(axes) != value.ndim:
        raise ValueError(f"a parameter of shape {value.shape} has axes {axes}; it needs one per axis")
    return nnx.Param(value, axes=axes, decay=weight_decay, lr=lr_multiplier, sparse=sparse, active=active_fraction)


class Linear(nnx.Module):
    """y = x W (+ b), in the compute dtype; W is [inputs, outputs], normal with the given standard deviation."""

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
"""How a projection is applied; `Linear.__call__` unless a caller groups tokens by which weights they take."""


class LowRank(nnx.Module):
    """y = x A B (+ b) with A [inputs, rank] and B [rank, outputs]; nothing between the two."""

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
        """Every stream; they differ in width."""
        return {
            name: part(x, apply_linear) if isinstance(part, LowRank) else apply_linear(part, x)
            for name, part in self.parts.items()
        }


def torch_linear_std(in_features: int) -> float:
    """Deviation of PyTorch's default initialisation of a linear layer, which some published models keep."""
    return (3 * in_features) ** -0.5


def residual_std(num_layers: int) -> float:
    """Initial deviation of projections into the residual stream: 0.02 / sqrt(2 depth), as in GPT-2."""
    return 0.02 / math.sqrt(2 * num_layers)
