"""Neural memory of Titans (LMM): a network per head that gradient descent trains on keys and values while it reads.

    q, k, v = silu(conv(x W)),  q and k normalized;       lr_t = max_lr sigmoid(x w_lr + b) (1 - momentum_t)
    S_t = momentum_t S_{t-1} - lr_t grad l(M; k_t, v_t)   M_t = keep_t M_{t-1} + S_t   (gates per head and matrix)
    y_t = W_o [ rms_head(M_t(q_t)) * silu(x_t W_g) ]

The factor 1 - momentum makes S an average of gradients, so that momentum does not change the size of a step. Gates are
initialised for a long memory (keep = 0.993). Gradients are taken at the weights at the start of each chunk of the
document, so packed documents must start on that grid. Persistent tokens are read by the memory before each document,
but not by its convolution.

State: change of the weights and momentum, 2 times the network per head in float32; the tokens since the last chunk
boundary; and the last inputs of the convolution.

TTT (no momentum, no decay), LaCT (`SwiGLUNet`, dot loss, read before write) and linear memories are values of
`inner_optimizer`. Source: Titans (Behrouz et al. 2025, arXiv 2501.00663), section 3; convolutions of width 4, gates per
matrix and the network x + LN(W_2 gelu(W_1 x)) as in its NeurIPS version.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from recallax.config import ConfigError, added_field
from recallax.layers.base import LayerInfo, MixerConfig, QueryableMixer
from recallax.layers.dense import Linear, Projections, head_dim_of, parameter
from recallax.layers.norm import l2_normalize
from recallax.layers.output_projection import OutputProjection
from recallax.layers.recurrence_gates import split_heads
from recallax.layers.short_convolution import ShortConvolution
from recallax.layers.state_reset import reset_for_prefill, reset_for_step
from recallax.pallas_kernels.neural_memory import (
    FastWeights,
    InnerOptimizer,
    MemoryInputs,
    NeuralState,
    OuterParams,
    current_delta,
    init_neural_state,
    is_memory_reset,
    neural_memory,
    neural_memory_read,
    neural_memory_step,
)
from recallax.types import Aux, Precision, SeqInfo, StepInfo

KEEP_BIAS, MOMENTUM_BIAS, LR_BIAS = 5.0, 0.0, 0.0
"""Initial gate biases: a memory of 150 tokens, a momentum of 1/2, and learning rates with a sum below 1/2 per chunk."""
STABLE_CHUNK_LR = 1.6
"""Largest stable sum of learning rates per chunk, for keys with cosines up to 0.7 (`experiments/inner_stability`)."""


@dataclass(frozen=True, kw_only=True)
class NeuralMemory(MixerConfig):
    """A network per head that is trained while it reads (Titans, TTT, LaCT)."""

    num_heads: int = 4
    """Number of memories; each has its own network."""
    head_dim: int | None = None
    """Width of a memory's inputs and outputs; None: d_model / num_heads."""
    inner_optimizer: InnerOptimizer = InnerOptimizer()
    """Network, loss and update rule of the memory."""
    max_lr: float | None = None
    """Largest learning rate before the factor 1 - momentum; None: `stable_lr`."""
    forget: bool = True
    """Decay the memory by a gate; False: keep = 1."""
    conv_size: int = 4
    """Taps of the short convolution; 0: no convolution."""
    num_persistent_tokens: int = added_field(0)
    """Learned tokens that the memory reads before each document (section 3.3); a multiple of the chunk size."""
    norm_eps: float = 1e-5
    """Added to the mean square in the output norm."""

    def __post_init__(self) -> None:
        if self.max_lr is not None and self.max_lr <= 0:
            raise ConfigError(f"max_lr is {self.max_lr}; it must be above 0")
        if self.num_persistent_tokens < 0 or self.num_persistent_tokens % self.grid:
            raise ConfigError(
                f"num_persistent_tokens is {self.num_persistent_tokens} tokens; it must be a multiple of the chunk of "
                f"{self.grid}, because the memory is updated after whole chunks"
            )

    @property
    def stable_lr(self) -> float:
        """Largest learning rate with which the updates of similar keys in one chunk do not overshoot in sum."""
        if self.inner_optimizer.gradient != "chunk_start":
            return 1.0
        return min(1.0, STABLE_CHUNK_LR / self.inner_optimizer.chunk_size)

    @property
    def grid(self) -> int:
        return self.inner_optimizer.chunk_size if self.inner_optimizer.gradient == "chunk_start" else 1

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "NeuralMemoryMixer":
        return NeuralMemoryMixer(self, d_model, layer, precision=precision, rngs=rngs)


class NeuralMemoryState(NamedTuple):
    """State of `NeuralMemory`."""

    neural_state: NeuralState
    """Weights and momentum at the last chunk boundary, and the tokens since."""
    conv_state: Float[Array, "B W-1 C"] | None
    """Last inputs of the convolution in the compute dtype; None: there is no convolution."""


class NeuralMemoryMixer(QueryableMixer):
    """Projections, short convolution, gates, the memory op and the output projection."""

    def __init__(self, config: NeuralMemory, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        heads = config.num_heads
        self.num_heads, self.inner_optimizer = heads, config.inner_optimizer
        self.head_dim = width = config.head_dim or head_dim_of("neural memory", d_model, heads)
        inner = heads * width
        layers = len(config.inner_optimizer.gate_names)
        widths = {"q": inner, "k": inner, "v": inner, "lr": heads * layers}
        widths |= {"momentum": heads * layers} if config.inner_optimizer.momentum else {}
        widths |= {"keep": heads * layers} if config.forget else {}
        self.streams = Projections({n: Linear(d_model, w, precision=precision, rngs=rngs) for n, w in widths.items()})
        self.conv = (
            ShortConvolution(3 * inner, config.conv_size, precision=precision, rngs=rngs) if config.conv_size else None
        )
        biases = {"lr": LR_BIAS, "momentum": MOMENTUM_BIAS, "keep": KEEP_BIAS}
        self.biases = nnx.Dict(
            {
                name: parameter(jnp.full((heads, layers), bias, precision.param), (None, None), weight_decay=False)
                for name, bias in biases.items()
                if name in widths
            }
        )
        self.max_lr = config.max_lr or config.stable_lr
        self.weights = nnx.Dict(
            {
                name: parameter(
                    jax.random.normal(rngs.params(), (heads, *shape), precision.param) * shape[0] ** -0.5,
                    ("heads", None, None),
                    weight_decay=False,
                )
                for name, shape in config.inner_optimizer.network.shapes(width).items()
            }
        )
        self.gain = parameter(jnp.ones((heads, width), precision.param), ("heads", None), weight_decay=False)
        self.offset = parameter(jnp.zeros((heads, width), precision.param), ("heads", None), weight_decay=False)
        tokens = jax.random.normal(rngs.params(), (config.num_persistent_tokens, d_model), precision.param)
        self.persistent = (
            parameter(tokens, (None, "embed"), weight_decay=False) if config.num_persistent_tokens else None
        )
        gate = Linear(d_model, inner, precision=precision, rngs=rngs)
        self.readout = OutputProjection(
            inner, d_model, layer, num_groups=heads, gate=gate, norm_eps=config.norm_eps, precision=precision, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        y, _ = self._run(x, seq, None, None)
        return y, {}

    def init_state(self, batch: int, max_len: int) -> NeuralMemoryState:
        neural_state = init_neural_state(self.inner_optimizer, batch, self.num_heads, self.head_dim)
        return NeuralMemoryState(neural_state, None if self.conv is None else self.conv.init_state(batch))

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: NeuralMemoryState
    ) -> tuple[Float[Array, "B T D"], NeuralMemoryState, Aux]:
        y, state = self._run(x, seq, *reset_for_prefill(state, seq))
        return y, state, {}

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: NeuralMemoryState
    ) -> tuple[Float[Array, "B D"], NeuralMemoryState]:
        neural_state, conv_state = reset_for_step(state, info)
        projections, active = self.streams(x), jnp.asarray(info.active)
        qkv = self._concat(projections)
        if self.conv is not None and conv_state is not None:
            qkv, conv_state = self.conv.step(qkv, info, conv_state)
        tokens = self._memory_inputs(qkv[:, None], {name: part[:, None] for name, part in projections.items()})
        token = jax.tree.map(lambda part: part[:, 0], tokens)
        outer_params = self._initial_memory(active & is_memory_reset(self.inner_optimizer, neural_state.num_tokens))
        y, neural_state = neural_memory_step(self.inner_optimizer, token, outer_params, neural_state, active)
        return jnp.where(active[:, None], self.readout(y, x), 0), NeuralMemoryState(neural_state, conv_state)

    def read_state(self, state: NeuralMemoryState) -> dict[str, Float[Array, "B H I O"]]:
        outer_params = self._initial_memory(is_memory_reset(self.inner_optimizer, state.neural_state.num_tokens))
        return current_delta(self.inner_optimizer, outer_params, state.neural_state)

    def retrieve(
        self, x: Float[Array, "B N D"], read_state: dict[str, Float[Array, "B H I O"]]
    ) -> Float[Array, "B N D"]:
        """Read the memory as it was at its last chunk boundary.

        Queries do not pass through the convolution, since they have no order.

        Args:
            x: Inputs of the queries.
            read_state: Result of the method `read_state`.

        Returns:
            One output per query, in the compute dtype.
        """
        q = self.streams.parts["q"](x)
        q = l2_normalize(split_heads(q if self.conv is None else self.conv.activation(q), self.num_heads))
        return self.readout(neural_memory_read(self.inner_optimizer, self._initial_weights(), read_state, q), x)

    def _run(
        self,
        x: Float[Array, "B T D"],
        seq: SeqInfo,
        neural_state: NeuralState | None,
        conv_state: Float[Array, "B P C"] | None,
    ) -> tuple[Float[Array, "B T D"], NeuralMemoryState]:
        segment_ids, projections = jnp.asarray(seq.segment_ids), self.streams(x)
        qkv = self._concat(projections)
        if self.conv is not None:
            qkv, conv_state = self.conv(qkv, segment_ids, conv_state)
        tokens = self._memory_inputs(qkv, projections)
        is_reset = is_memory_reset(self.inner_optimizer, jnp.asarray(seq.positions)) & (segment_ids > 0)
        outer_params = self._initial_memory(None if neural_state is None else is_reset)
        y, neural_state = neural_memory(
            self.inner_optimizer, tokens, outer_params, state=neural_state, segment_ids=segment_ids
        )
        return self.readout(y, x), NeuralMemoryState(neural_state, conv_state)

    def _concat(self, projections: dict[str, Array]) -> Float[Array, "... C"]:
        return jnp.concatenate([projections[name] for name in ("q", "k", "v")], axis=-1)

    def _memory_inputs(self, qkv: Float[Array, "B T C"], projections: dict[str, Array]) -> MemoryInputs:
        q, k, v = (split_heads(part, self.num_heads) for part in jnp.split(qkv, 3, axis=-1))
        gates = {name: self._gate(name, projections[name]) for name in self.biases}
        lr = self.max_lr * jax.nn.sigmoid(gates["lr"])
        log_momentum = log_keep = jnp.zeros_like(lr)
        if "momentum" in gates:
            log_momentum, lr = jax.nn.log_sigmoid(gates["momentum"]), lr * jax.nn.sigmoid(-gates["momentum"])
        if "keep" in gates:
            log_keep = jax.nn.log_sigmoid(gates["keep"])
        return MemoryInputs(l2_normalize(q), l2_normalize(k), v, lr, log_momentum, log_keep)

    def _gate(self, name: str, x: Float[Array, "B T W"]) -> Float[Array, "B T H L"]:
        return split_heads(x.astype(jnp.float32), self.num_heads) + self.biases[name][...][None, None]

    def _initial_memory(self, is_reset: Bool[Array, "..."] | None) -> OuterParams:
        """Collect the parameters of the memory, with the fast weights after the persistent tokens.

        `is_reset` is True where a memory starts; None: everywhere. Without a start the fast weights are not needed,
        and zeros take their place.
        """
        outer_params = self._initial_weights()
        if self.persistent is None:
            return outer_params
        if is_reset is None:
            fast_weights = self._persistent_memory()
        else:
            fast_weights = jax.lax.cond(is_reset.any(), self._persistent_memory, self._zero_memory)
        return outer_params._replace(initial_fast_weights=fast_weights)

    def _initial_weights(self) -> OuterParams:
        weights = {name: weight[...] for name, weight in self.weights.items()}
        return OuterParams(weights, self.gain[...], self.offset[...])

    def _persistent_memory(self) -> FastWeights:
        """Compute the fast weights after the persistent tokens, without a batch axis."""
        assert self.persistent is not None
        projections = self.streams(self.persistent[...][None])
        qkv = self._concat(projections)
        if self.conv is not None:
            qkv, _ = self.conv(qkv, jnp.ones(qkv.shape[:2], jnp.int32), None)
        _, state = neural_memory(self.inner_optimizer, self._memory_inputs(qkv, projections), self._initial_weights())
        return jax.tree.map(lambda x: x[0], state.fast_weights)

    def _zero_memory(self) -> FastWeights:
        state = init_neural_state(self.inner_optimizer, 1, self.num_heads, self.head_dim)
        return jax.tree.map(lambda x: x[0], state.fast_weights)
