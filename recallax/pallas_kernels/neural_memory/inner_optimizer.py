"""Options of the neural memory: network, loss, and update rule of the inner optimizer."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.config import Config, ConfigError, added_field, require_at_least

NORM_EPS = 1e-6
"""Added to the variance in the norm of `MLPNet`."""

type NamedMatMul = Callable[[str, Float[Array, "C I"]], Float[Array, "C O"]]
"""(name, x) -> x times the weight matrix of that name."""
type Weights = dict[str, Array]
"""Weight matrices by name."""


class Network(Config, abc.ABC):
    """Network whose weights enter through matrix products only, so that gradients per token are outer products."""

    @abc.abstractmethod
    def shapes(self, head_dim: int) -> dict[str, tuple[int, int]]:
        """Return name and shape (inputs, outputs) of each matrix, in the order of their application.

        Args:
            head_dim: Width of the memory's inputs and outputs.
        """

    @abc.abstractmethod
    def apply(
        self,
        product: NamedMatMul,
        x: Float[Array, "C D"],
        norm_scale: Float[Array, " D"],
        norm_bias: Float[Array, " D"],
    ) -> Float[Array, "C D"]:
        """Apply the network.

        Args:
            product: Multiplies by the weight matrix of a name.
            x: Inputs.
            norm_scale: Scale of the network's norm, trained by the outer optimizer.
            norm_bias: Bias of the network's norm, trained by the outer optimizer.
        """


@dataclass(frozen=True, kw_only=True)
class LinearNet(Network):
    """Matrix memory M(x) = x W."""

    def shapes(self, head_dim: int) -> dict[str, tuple[int, int]]:
        return {"w1": (head_dim, head_dim)}

    def apply(self, product: NamedMatMul, x: Array, norm_scale: Array, norm_bias: Array) -> Array:
        return product("w1", x)


@dataclass(frozen=True, kw_only=True)
class MLPNet(Network):
    """Memory of Titans (NeurIPS version): M(x) = x + LN(W_L gelu(... gelu(W_1 x))); depth 1 is TTT-Linear."""

    depth: int = 2
    """Number of matrices."""
    expansion: int = 4
    """Hidden width divided by the width of the memory."""

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
        scale = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + NORM_EPS)
        return x + centred * scale * norm_scale[None] + norm_bias[None]


@dataclass(frozen=True, kw_only=True)
class SwiGLUNet(Network):
    """Memory of LaCT: M(x) = W_2 (silu(W_1 x) * W_3 x)."""

    expansion: int = 2
    """Hidden width divided by the width of the memory."""

    def __post_init__(self) -> None:
        require_at_least(1, expansion=self.expansion)

    def shapes(self, head_dim: int) -> dict[str, tuple[int, int]]:
        hidden = self.expansion * head_dim
        return {"w1": (head_dim, hidden), "w3": (head_dim, hidden), "w2": (hidden, head_dim)}

    def apply(self, product: NamedMatMul, x: Array, norm_scale: Array, norm_bias: Array) -> Array:
        return product("w2", jax.nn.silu(product("w1", x)) * product("w3", x))


@dataclass(frozen=True, kw_only=True)
class RandomFeatureNet(Network):
    """Linear memory after a fixed nonlinear map: M(x) = gelu(x R) W with a random, untrained R.

    It is the control for depth: the advantage of a deep memory over it is due to training the first layer.
    """

    expansion: int = 4
    """Number of features divided by the width of the memory."""

    def __post_init__(self) -> None:
        require_at_least(1, expansion=self.expansion)

    def shapes(self, head_dim: int) -> dict[str, tuple[int, int]]:
        return {"w1": (self.expansion * head_dim, head_dim)}

    def apply(self, product: NamedMatMul, x: Array, norm_scale: Array, norm_bias: Array) -> Array:
        # Each random direction is used with both signs, which reduces the variance between seeds for small heads.
        width = x.shape[-1]
        half = jax.random.normal(jax.random.key(0), (width, -(-self.expansion * width // 2)), jnp.float32)
        features = jnp.concatenate([half, -half], axis=1)[:, : self.expansion * width].astype(x.dtype)
        hidden = jnp.matmul(x, features, precision=jax.lax.Precision.HIGHEST)
        return product("w1", jax.nn.gelu(hidden, approximate=False))


def l2(prediction: Float[Array, " D"], target: Float[Array, " D"]) -> Float[Array, ""]:
    """Half the squared error; Titans omits the factor 1/2, which the learning rate absorbs."""
    return 0.5 * jnp.sum((prediction - target) ** 2)


def huber(prediction: Float[Array, " D"], target: Float[Array, " D"]) -> Float[Array, ""]:
    """Huber loss (Yaad of MIRAS): half the squared error up to a distance of 1, else the distance minus 1/2."""
    square = jnp.sum((prediction - target) ** 2)
    distance = jnp.sqrt(jnp.maximum(square, 1.0))  # clipped, because the gradient of the root at 0 is infinite
    return jnp.where(square <= 1, 0.5 * square, distance - 0.5)


def dot(prediction: Float[Array, " D"], target: Float[Array, " D"]) -> Float[Array, ""]:
    """Minus the dot product; its gradient does not depend on the weights (linear attention, LaCT)."""
    return -jnp.sum(prediction * target)


LOSSES = {"l2": l2, "huber": huber, "dot": dot}
"""Loss of one token by name."""


@dataclass(frozen=True, kw_only=True)
class InnerOptimizer(Config):
    """Network, loss and update rule of a neural memory."""

    network: Network = MLPNet()
    loss: Literal["l2", "huber", "dot"] = "l2"
    momentum: bool = True
    """Use momentum; without it, `MemoryInputs.log_momentum` is ignored and the state has no momentum."""
    gradient_reduction: Literal["sum", "mean"] = "sum"
    """Sum of the gradients of a chunk, or their mean over the tokens of the chunk so far (TTT)."""
    gradient: Literal["chunk_start", "token", "token_decayed"] = "chunk_start"
    """Weights at which gradients are computed: those at the start of the chunk, those before the token, or those before
    the token after its decay. The last two require a linear memory with the l2 loss; without momentum, `token_decayed`
    is Gated DeltaNet."""
    readout: Literal["dual", "chunk_start"] = "dual"
    """Weights that a token reads: those after its own update, or those at the start of the chunk."""
    decay_to: Literal["zero", "init"] = "init"
    """Target of the decay. A network of two or more layers that has decayed to zero has zero gradients."""
    boundary: Literal["none", "weight_norm", "muon"] = "none"
    """Update of the weights at the end of a chunk: none; rescale the weights of each output to their initial norm
    (LaCT); or orthogonalise the change of the chunk by Newton-Schulz steps before rescaling (LaCT with Muon)."""
    reset_interval: int | None = added_field(None)
    """Tokens of a document after which the memory is reset (shards of TNT, Li et al. 2025); None: never."""
    trainable_weights: tuple[str, ...] | None = None
    """Names of the trainable matrices; None: all. The others keep their initial weights."""
    chunk_size: int = 16
    """Tokens of a chunk. It changes the outputs with gradients at `chunk_start`, and only the speed otherwise."""

    def __post_init__(self) -> None:
        require_at_least(1, chunk_size=self.chunk_size)
        exact = isinstance(self.network, LinearNet) and self.loss == "l2" and self.readout == "dual"
        if self.gradient != "chunk_start" and not (exact and self.boundary == "none"):
            raise ConfigError(
                f"gradient is {self.gradient!r}, which requires network LinearNet, the l2 loss, readout 'dual' and "
                "boundary 'none'; use gradient 'chunk_start'"
            )
        if self.gradient_reduction == "mean" and (self.momentum or self.gradient != "chunk_start"):
            raise ConfigError("gradient_reduction 'mean' requires momentum=False and gradient 'chunk_start'")
        if self.reset_interval is not None and (
            self.gradient != "chunk_start" or self.reset_interval < 1 or self.reset_interval % self.chunk_size
        ):
            raise ConfigError(
                f"reset_interval is {self.reset_interval}; it must be a multiple of chunk_size {self.chunk_size}, and "
                f"gradient must be 'chunk_start' (it is {self.gradient!r})"
            )
        unknown = [name for name in self.trainable_weights or () if name not in self.network.shapes(1)]
        if unknown or self.trainable_weights == ():
            raise ConfigError(
                f"trainable_weights is {self.trainable_weights}; "
                f"it must name some of {', '.join(self.network.shapes(1))}"
            )

    @property
    def gate_names(self) -> tuple[str, ...]:
        """Trainable matrices in the order of the gates, which is the ascending order of their names.

        It is not the order of application: `SwiGLUNet` applies w1, w3 and w2, and its gates belong to w1, w2 and w3.
        """
        return tuple(sorted(self.trainable_shapes(1)))

    def trainable_shapes(self, head_dim: int) -> dict[str, tuple[int, int]]:
        """Return name and shape of the trainable matrices.

        Args:
            head_dim: Width of the memory's inputs and outputs.
        """
        shapes = self.network.shapes(head_dim)
        return {name: shapes[name] for name in self.trainable_weights or shapes}
