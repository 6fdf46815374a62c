"""The neural memory of Titans (LMM): a network per head that learns keys' values by gradient descent while it reads.

    q, k, v = silu(conv(x W)),  q and k of length 1;      lr_t = max_lr sigmoid(x w_lr + b) (1 - momentum_t)
    S_t = momentum_t S_{t-1} - lr_t grad l(M; k_t, v_t)   M_t = keep_t M_{t-1} + S_t   (gates per head and matrix)
    y_t = W_o [ rms_head(M_t(q_t)) * silu(x_t W_g) ]

The factor 1 - momentum makes the momentum an average, so that its strength does not change how far a step goes. Gates
start with a long memory (keep .993). Gradients are taken at the first weights of each chunk of the document, so packed
documents must begin on that grid. State: the change of the weights and the momentum, 2 times the network, float32, per
head; the tokens since the last boundary; the last inputs of the convolution. Persistent tokens are read before a
document, by the memory alone: its convolution still begins with nothing.

TTT (no momentum, no forgetting), LaCT (`SwiGLUNet`, dot loss, read before write) and linear memories are values of
`inner_optimizer`. Source: Titans (Behrouz et al. 2025, arXiv 2501.00663), section 3; convolutions of width 4, gates per matrix
and the network x + LN(W_2 gelu(W_1 x)) as in its NeurIPS version.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from recallax.config import ConfigError, added_field
from recallax.layers.base import LayerInfo, MixerConfig, QueryableMixer
from recallax.layers.dense import Linear, Projections, parameter
from recallax.layers.norm import l2_normalize
from recallax.layers.output_projection import OutputProjection
from recallax.layers.recurrence_gates import split_heads
from recallax.layers.short_convolution import ShortConvolution
from recallax.layers.state_reset import head_dim_of, reset_for_prefill, reset_for_step
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
"""A memory of about 150 tokens, half of a step carried on, and steps that sum to less than a half over a chunk."""
STABLE_CHUNK_LR = 1.6
"""Steps over a chunk that do not overshoot together for keys of a cosine up to .7 (`experiments/inner_stability`)."""


@dataclass(frozen=True, kw_only=True)
class NeuralMemory(MixerConfig):
    """See the head of the file."""

    num_heads: int = 4
    head_dim: int | None = None
    """Width of a memory's inputs and outputs; None is d_model / heads."""
    inner_optimizer: InnerOptimizer = InnerOptimizer()
    max_lr: float | None = None
    """Largest step before the factor 1 - momentum; None is 1 for per-token gradients, else min(1, STABLE / chunk)."""
    forget: bool = True
    """Whether the memory forgets; without, keep is 1."""
    conv_size: int = 4
    """Taps of the short convolution; 0 leaves it out."""
    num_persistent_tokens: int = added_field(0)
    """Learned tokens that the memory has read before a document begins (section 3.3)."""
    norm_eps: float = 1e-5
    """Of the output norm."""

    def __post_init__(self) -> None:
        if self.max_lr is not None and self.max_lr <= 0:
            raise ConfigError(f"max_lr is {self.max_lr}; it must be above 0")
        if self.num_persistent_tokens < 0 or self.num_persistent_tokens % self.grid:
            raise ConfigError(
                f"num_persistent_tokens is {self.num_persistent_tokens} tokens; it must be a multiple of the chunk of {self.grid}, for the "
                "memory learns from whole chunks"
            )

    @property
    def stable_lr(self) -> float:
        """The largest step that keeps alike keys of one chunk from overshooting together."""
        return (
            1.0
            if self.inner_optimizer.gradient != "chunk_start"
            else min(1.0, STABLE_CHUNK_LR / self.inner_optimizer.chunk_size)
        )

    @property
    def grid(self) -> int:
        return self.inner_optimizer.chunk_size if self.inner_optimizer.gradient == "chunk_start" else 1

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "NeuralMemoryMixer":
        return NeuralMemoryMixer(self, d_model, layer, precision=precision, rngs=rngs)


class NeuralMemoryState(NamedTuple):
    """The memory and the last inputs of the convolution (None without one)."""

    neural_state: NeuralState
    conv_state: Float[Array, "B W-1 C"] | None


class NeuralMemoryMixer(QueryableMixer):
    """See the head of the file."""

    def __init__(self, config: NeuralMemory, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        heads = config.num_heads
        self.num_heads, self.inner_optimizer = heads, config.inner_optimizer
        self.head_dim = width = config.head_dim or head_dim_of("neural memory", d_model, heads)
        inner = heads * width
        layers = len(config.inner_optimizer.trainable_shapes(width))
        widths = {"q": inner, "k": inner, "v": inner, "lr": heads * layers}
        widths |= {"momentum": heads * layers} if config.inner_optimizer.momentum else {}
        widths |= {"keep": heads * layers} if config.forget else {}
        self.streams = Projections({n: Linear(d_model, w, precision=precision, rngs=rngs) for n, w in widths.items()})
        self.conv = (
            ShortConvolution(3 * inner, config.conv_size, precision=precision, rngs=rngs) if config.conv_size else None
        )
        starts = {"lr": LR_BIAS, "momentum": MOMENTUM_BIAS, "keep": KEEP_BIAS}
        self.biases = nnx.Dict(
            {
                name: parameter(jnp.full((heads, layers), start, precision.param), (None, None), weight_decay=False)
                for name, start in starts.items()
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
        past = None if self.conv is None else self.conv.init_state(batch)
        return NeuralMemoryState(init_neural_state(self.inner_optimizer, batch, self.num_heads, self.head_dim), past)

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: NeuralMemoryState
    ) -> tuple[Float[Array, "B T D"], NeuralMemoryState, Aux]:
        y, state = self._run(x, seq, *reset_for_prefill(state, seq))
        return y, state, {}

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: NeuralMemoryState
    ) -> tuple[Float[Array, "B D"], NeuralMemoryState]:
        neural, past = reset_for_step(state, info)
        streams, active = self.streams(x), jnp.asarray(info.active)
        joined = self._concat(streams)
        if self.conv is not None and past is not None:
            joined, past = self.conv.step(joined, info, past)
        tokens = self._memory_inputs(joined[:, None], {name: part[:, None] for name, part in streams.items()})
        token = jax.tree.map(lambda part: part[:, 0], tokens)
        fixed = self._initial_memory(active & is_memory_reset(self.inner_optimizer, neural.num_tokens))
        y, neural = neural_memory_step(self.inner_optimizer, token, fixed, neural, active)
        return jnp.where(active[:, None], self.readout(y, x), 0), NeuralMemoryState(neural, past)

    def read_state(self, state: NeuralMemoryState) -> dict[str, Float[Array, "B H I O"]]:
        fixed = self._initial_memory(is_memory_reset(self.inner_optimizer, state.neural_state.num_tokens))
        return current_delta(self.inner_optimizer, fixed, state.neural_state)

    def retrieve(
        self, x: Float[Array, "B N D"], read_state: dict[str, Float[Array, "B H I O"]]
    ) -> Float[Array, "B N D"]:
        """As `read_state` was at its last boundary between chunks; questions pass no convolution, for they need no order."""
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
        segments, streams = jnp.asarray(seq.segment_ids), self.streams(x)
        joined = self._concat(streams)
        if self.conv is not None:
            joined, conv_state = self.conv(joined, segments, conv_state)
        tokens = self._memory_inputs(joined, streams)
        fresh = is_memory_reset(self.inner_optimizer, jnp.asarray(seq.positions)) & (segments > 0)
        fixed = self._initial_memory(None if neural_state is None else fresh)
        y, neural_state = neural_memory(self.inner_optimizer, tokens, fixed, state=neural_state, segment_ids=segments)
        return self.readout(y, x), NeuralMemoryState(neural_state, conv_state)

    def _concat(self, projections: dict[str, Array]) -> Float[Array, "... C"]:
        return jnp.concatenate([projections[name] for name in ("q", "k", "v")], axis=-1)

    def _memory_inputs(self, concatenated: Float[Array, "B T C"], projections: dict[str, Array]) -> MemoryInputs:
        q, k, v = (split_heads(part, self.num_heads) for part in jnp.split(concatenated, 3, axis=-1))
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

    def _initial_memory(self, starts: Bool[Array, "..."] | None) -> OuterParams:
        """What the memory starts from; with what the persistent tokens taught it, where any memory is fresh."""
        fixed = self._initial_weights()
        if self.persistent is None:
            return fixed
        taught = (
            self._persistent_memory
            if starts is None
            else partial(jax.lax.cond, starts.any(), self._persistent_memory, self._zero_memory)
        )
        return fixed._replace(initial_fast_weights=taught())

    def _initial_weights(self) -> OuterParams:
        weights = {name: weight[...] for name, weight in self.weights.items()}
        return OuterParams(weights, self.gain[...], self.offset[...])

    def _persistent_memory(self) -> FastWeights:
        assert self.persistent is not None
        streams = self.streams(self.persistent[...][None])
        joined = self._concat(streams)
        if self.conv is not None:
            joined, _ = self.conv(joined, jnp.ones(joined.shape[:2], jnp.int32), None)
        _, state = neural_memory(self.inner_optimizer, self._memory_inputs(joined, streams), self._initial_weights())
        return jax.tree.map(lambda x: x[0], state.fast_weights)

    def _zero_memory(self) -> FastWeights:
        return jax.tree.map(
            lambda x: x[0], init_neural_state(self.inner_optimizer, 1, self.num_heads, self.head_dim).fast_weights
        )
