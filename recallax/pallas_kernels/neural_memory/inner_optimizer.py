"""What a neural memory is and how it learns, as values: network, loss, and the rules of its inner optimiser."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.config import Config, ConfigError, added_field, require_at_least

type NamedMatMul = Callable[[str, Float[Array, "C I"]], Float[Array, "C O"]]
"""x times the weight matrix of that name."""
type Weights = dict[str, Array]


class Network(Config, abc.ABC):
    """A network whose weights enter through matrix products only: per-token gradients are outer products."""

    @abc.abstractmethod
    def shapes(self, head_dim: int) -> dict[str, tuple[int, int]]:
        """Name and [inputs, outputs] of each matrix, in the order in which they are applied."""

    @abc.abstractmethod
    def apply(
        self,
        product: NamedMatMul,
        x: Float[Array, "C D"],
        norm_scale: Float[Array, " D"],
        norm_bias: Float[Array, " D"],
    ) -> Float[Array, "C D"]:
        """The network's output; gain and offset are of its norm, and are learned outside."""


@dataclass(frozen=True, kw_only=True)
class LinearNet(Network):
    """M(x) = x W: a matrix memory."""

    def shapes(self, head_dim: int) -> dict[str, tuple[int, int]]:
        return {"w1": (head_dim, head_dim)}

    def apply(self, product: NamedMatMul, x: Array, norm_scale: Array, norm_bias: Array) -> Array:
        return product("w1", x)


@dataclass(frozen=True, kw_only=True)
class MLPNet(Network):
    """M(x) = x + LN(W_L gelu(... gelu(W_1 x))): Titans' memory (NeurIPS version); depth 1 is that of TTT-Linear."""

    depth: int = 2
    expansion: int = 4
    """Hidden width over the memory's."""

    def __post_init__(self) -> None:
        require_at_least(1, depth=self.depth, expansion=self.expansion)

    def shapes(self, head_dim: int) -> dict[str, tuple[int, int]]:
        sizes = [head_dim, *[self.expansion * head_dim] * (self.depth - 1), head_dim]
        return {f"w{i + 1}": (sizes[i], sizes[i + 1]) for i in range(self.depth)}

    def apply(self, product: NamedMatMul, x: Array, norm_scale: Array, norm_bias: Array) -> Array:
        hidden = product("w1", x)
        for i in range(2, self.depth + 1):
            hidden = product(f"w{i}", jax.nn.gelu(hidden, approximate=False))
        centred = hidden - jnp.mean(hidden, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + 1e-6)
        return x + centred * scale * norm_scale[None] + norm_bias[None]


@dataclass(frozen=True, kw_only=True)
class SwiGLUNet(Network):
    """M(x) = W_2 (silu(W_1 x) * W_3 x): LaCT's memory."""

    expansion: int = 2

    def __post_init__(self) -> None:
        require_at_least(1, expansion=self.expansion)

    def shapes(self, head_dim: int) -> dict[str, tuple[int, int]]:
        hidden = self.expansion * head_dim
        return {"w1": (head_dim, hidden), "w3": (head_dim, hidden), "w2": (hidden, head_dim)}

    def apply(self, product: NamedMatMul, x: Array, norm_scale: Array, norm_bias: Array) -> Array:
        return product("w2", jax.nn.silu(product("w1", x)) * product("w3", x))


@dataclass(frozen=True, kw_only=True)
class RandomFeatureNet(Network):
    """M(x) = gelu(x R) W, R random and never learned: a linear memory behind a fixed nonlinear map.

    The control for depth: what a deep memory gains over it is due to learning its first layer.
    """

    expansion: int = 4

    def __post_init__(self) -> None:
        require_at_least(1, expansion=self.expansion)

    def shapes(self, head_dim: int) -> dict[str, tuple[int, int]]:
        return {"w1": (self.expansion * head_dim, head_dim)}

    def apply(self, product: NamedMatMul, x: Array, norm_scale: Array, norm_bias: Array) -> Array:
        # A small head's features must not depend on chance: every direction and its opposite.
        width = x.shape[-1]
        half = jax.random.normal(jax.random.key(0), (width, -(-self.expansion * width // 2)), jnp.float32)
        features = jnp.concatenate([half, -half], axis=1)[:, : self.expansion * width].astype(x.dtype)
        hidden = jnp.matmul(x, features, precision=jax.lax.Precision.HIGHEST)
        return product("w1", jax.nn.gelu(hidden, approximate=False))


def l2(prediction: Float[Array, " D"], target: Float[Array, " D"]) -> Float[Array, ""]:
    """Half the squared error; the factor that Titans leaves out is absorbed by the learning rate."""
    return 0.5 * jnp.sum((prediction - target) ** 2)


def huber(prediction: Float[Array, " D"], target: Float[Array, " D"]) -> Float[Array, ""]:
    """Half the squared error up to a distance of 1, the distance minus 1/2 beyond (MIRAS' Yaad)."""
    square = jnp.sum((prediction - target) ** 2)
    distance = jnp.sqrt(jnp.maximum(square, 1.0))  # of what lies beyond: no gradient of a root at 0
    return jnp.where(square <= 1, 0.5 * square, distance - 0.5)


def dot(prediction: Float[Array, " D"], target: Float[Array, " D"]) -> Float[Array, ""]:
    """Minus the dot product: gradients do not depend on what is held (linear attention, LaCT)."""
    return -jnp.sum(prediction * target)


LOSSES = {"l2": l2, "huber": huber, "dot": dot}


@dataclass(frozen=True, kw_only=True)
class InnerOptimizer(Config):
    """How a memory learns while it reads. Raises ConfigError where the choices do not go together."""

    network: Network = MLPNet()
    loss: Literal["l2", "huber", "dot"] = "l2"
    momentum: bool = True
    """Whether steps carry momentum, and the state its sum; without, the arguments' momentum is not read."""
    gradient_reduction: Literal["sum", "mean"] = "sum"
    """Whether the gradients of a chunk add up, or count as their mean over the tokens of the chunk so far (TTT)."""
    gradient: Literal["chunk_start", "token", "token_decayed"] = "chunk_start"
    """Where gradients are taken: at the weights of the chunk's start (any network), at those before the token, or at
    these after their decay. The last two are exact recurrences, for the linear memory under the l2 loss alone; without
    momentum, `token_decayed` is Gated DeltaNet."""
    readout: Literal["dual", "chunk_start"] = "dual"
    """What a token reads: the weights after its own write, or those of the chunk's start."""
    decay_to: Literal["zero", "init"] = "init"
    """What forgetting returns to. A network of two layers or more that has decayed to zero has no gradient left."""
    boundary: Literal["none", "weight_norm", "muon"] = "none"
    """What happens to the weights at the end of a chunk: nothing; what feeds each output goes back to the norm it was
    initialised with (LaCT); the chunk's change is orthogonalised by Newton-Schulz steps before that (with Muon)."""
    reset_interval: int | None = added_field(None)
    """Tokens of a document after which the memory begins anew (TNT's shards, Li et al. 2025); None is never."""
    trainable_weights: tuple[str, ...] | None = None
    """Names of the matrices that learn; None is all. The others keep their initial weights."""
    chunk_size: int = 16
    """Tokens of a document that share their gradient point: part of the model under `chunk_start`, else only speed."""

    def __post_init__(self) -> None:
        require_at_least(1, chunk_size=self.chunk_size)
        exact = isinstance(self.network, LinearNet) and self.loss == "l2" and self.readout == "dual"
        if self.gradient != "chunk_start" and not (exact and self.boundary == "none"):
            raise ConfigError(
                f"gradient is {self.gradient!r}: only a linear memory under the l2 loss, read by `dual` and without a "
                "boundary, learns from per-token gradients; take gradient 'chunk_start' or network LinearNet"
            )
        if self.gradient_reduction == "mean" and (self.momentum or self.gradient != "chunk_start"):
            raise ConfigError("step 'mean' goes with momentum=False and gradient 'chunk_start' alone")
        if self.reset_interval is not None and (
            self.gradient != "chunk_start" or self.reset_interval < 1 or self.reset_interval % self.chunk_size
        ):
            raise ConfigError(
                f"reset is after {self.reset_interval} tokens; it must be a multiple of the chunk of {self.chunk_size}, under "
                f"gradient 'chunk_start' (it is {self.gradient!r})"
            )
        unknown = [name for name in self.trainable_weights or () if name not in self.network.shapes(1)]
        if unknown or self.trainable_weights == ():
            raise ConfigError(
                f"trainable_weights is {self.trainable_weights}; it must name some of {', '.join(self.network.shapes(1))}"
            )

    def trainable_shapes(self, head_dim: int) -> dict[str, tuple[int, int]]:
        """Name and shape of the matrices that learn."""
        shapes = self.network.shapes(head_dim)
        return {name: shapes[name] for name in self.trainable_weights or shapes}
