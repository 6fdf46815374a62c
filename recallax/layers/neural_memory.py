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
`learner`. Source: Titans (Behrouz et al. 2025, arXiv 2501.00663), section 3; convolutions of width 4, gates per matrix
and the network x + LN(W_2 gelu(W_1 x)) as in its NeurIPS version.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from recallax.config import ConfigError, added
from recallax.layers.base import MixerConfig, RecallMixer, Site
from recallax.layers.continuation import continued, divide_heads, started
from recallax.layers.dense import Linear, Streams, parameter
from recallax.layers.gates import heads_of
from recallax.layers.norm import unit
from recallax.layers.readout import Readout
from recallax.layers.short_convolution import ShortConvolution
from recallax.pallas_kernels.neural_memory import (
    Fixed,
    Learner,
    Memory,
    NeuralState,
    Tokens,
    begins,
    found,
    init_state,
    neural_memory,
    neural_memory_read,
    neural_memory_step,
)
from recallax.types import Aux, Precision, SeqInfo, StepInfo

KEEP_BIAS, MOMENTUM_BIAS, LR_BIAS = 5.0, 0.0, 0.0
"""A memory of about 150 tokens, half of a step carried on, and steps that sum to less than a half over a chunk."""
STABLE = 1.6
"""Steps over a chunk that do not overshoot together for keys of a cosine up to .7 (`experiments/inner_stability`)."""


@dataclass(frozen=True, kw_only=True)
class NeuralMemory(MixerConfig):
    """See the head of the file."""

    heads: int = 4
    head_dim: int | None = None
    """Width of a memory's inputs and outputs; None is d_model / heads."""
    learner: Learner = Learner()
    max_lr: float | None = None
    """Largest step before the factor 1 - momentum; None is 1 for per-token gradients, else min(1, STABLE / chunk)."""
    forget: bool = True
    """Whether the memory forgets; without, keep is 1."""
    conv: int = 4
    """Taps of the short convolution; 0 leaves it out."""
    persistent: int = added(0)
    """Learned tokens that the memory has read before a document begins (section 3.3)."""
    eps: float = 1e-5
    """Of the output norm."""

    def __post_init__(self) -> None:
        if self.max_lr is not None and self.max_lr <= 0:
            raise ConfigError(f"max_lr is {self.max_lr}; it must be above 0")
        if self.persistent < 0 or self.persistent % self.grid:
            raise ConfigError(
                f"persistent is {self.persistent} tokens; it must be a multiple of the chunk of {self.grid}, for the "
                "memory learns from whole chunks"
            )

    @property
    def stable_lr(self) -> float:
        """The largest step that keeps alike keys of one chunk from overshooting together."""
        return 1.0 if self.learner.gradient != "chunk_start" else min(1.0, STABLE / self.learner.chunk)

    @property
    def grid(self) -> int:
        return self.learner.chunk if self.learner.gradient == "chunk_start" else 1

    def build(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "NeuralMemoryMixer":
        return NeuralMemoryMixer(self, d_model, site, precision=precision, rngs=rngs)


class NeuralMemoryState(NamedTuple):
    """The memory and the last inputs of the convolution (None without one)."""

    neural: NeuralState
    past: Float[Array, "B W-1 C"] | None


class NeuralMemoryMixer(RecallMixer):
    """See the head of the file."""

    def __init__(self, config: NeuralMemory, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs):
        heads = config.heads
        self.heads, self.learner = heads, config.learner
        self.width = width = config.head_dim or divide_heads("neural memory", d_model, heads)
        inner = heads * width
        layers = len(config.learner.learned(width))
        widths = {"q": inner, "k": inner, "v": inner, "lr": heads * layers}
        widths |= {"momentum": heads * layers} if config.learner.momentum else {}
        widths |= {"keep": heads * layers} if config.forget else {}
        self.streams = Streams({n: Linear(d_model, w, precision=precision, rngs=rngs) for n, w in widths.items()})
        self.conv = ShortConvolution(3 * inner, config.conv, precision=precision, rngs=rngs) if config.conv else None
        starts = {"lr": LR_BIAS, "momentum": MOMENTUM_BIAS, "keep": KEEP_BIAS}
        self.biases = nnx.Dict(
            {
                name: parameter(jnp.full((heads, layers), start, precision.param), (None, None), decay=False)
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
                    decay=False,
                )
                for name, shape in config.learner.network.shapes(width).items()
            }
        )
        self.gain = parameter(jnp.ones((heads, width), precision.param), ("heads", None), decay=False)
        self.offset = parameter(jnp.zeros((heads, width), precision.param), ("heads", None), decay=False)
        tokens = jax.random.normal(rngs.params(), (config.persistent, d_model), precision.param)
        self.persistent = parameter(tokens, (None, "embed"), decay=False) if config.persistent else None
        gate = Linear(d_model, inner, precision=precision, rngs=rngs)
        self.readout = Readout(
            inner, d_model, site, groups=heads, gate=gate, eps=config.eps, precision=precision, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        y, _ = self._run(x, seq, None, None)
        return y, {}

    def init_state(self, batch: int, max_len: int) -> NeuralMemoryState:
        past = None if self.conv is None else self.conv.init_state(batch)
        return NeuralMemoryState(init_state(self.learner, batch, self.heads, self.width), past)

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: NeuralMemoryState
    ) -> tuple[Float[Array, "B T D"], NeuralMemoryState, Aux]:
        y, state = self._run(x, seq, *continued(state, seq))
        return y, state, {}

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: NeuralMemoryState
    ) -> tuple[Float[Array, "B D"], NeuralMemoryState]:
        neural, past = started(state, info)
        streams, active = self.streams(x), jnp.asarray(info.active)
        joined = self._joined(streams)
        if self.conv is not None and past is not None:
            joined, past = self.conv.step(joined, info, past)
        tokens = self._tokens(joined[:, None], {name: part[:, None] for name, part in streams.items()})
        token = jax.tree.map(lambda part: part[:, 0], tokens)
        fixed = self._fixed(active & begins(self.learner, neural.count))
        y, neural = neural_memory_step(self.learner, token, fixed, neural, active)
        return jnp.where(active[:, None], self.readout(y, x), 0), NeuralMemoryState(neural, past)

    def held(self, state: NeuralMemoryState) -> dict[str, Float[Array, "B H I O"]]:
        fixed = self._fixed(begins(self.learner, state.neural.count))
        return found(self.learner, fixed, state.neural)

    def recall(self, x: Float[Array, "B N D"], held: dict[str, Float[Array, "B H I O"]]) -> Float[Array, "B N D"]:
        """As `held` was at its last boundary between chunks; questions pass no convolution, for they need no order."""
        q = self.streams.parts["q"](x)
        q = unit(heads_of(q if self.conv is None else self.conv.activation(q), self.heads))
        return self.readout(neural_memory_read(self.learner, self._weights(), held, q), x)

    def _run(
        self, x: Float[Array, "B T D"], seq: SeqInfo, neural: NeuralState | None, past: Float[Array, "B P C"] | None
    ) -> tuple[Float[Array, "B T D"], NeuralMemoryState]:
        segments, streams = jnp.asarray(seq.segments), self.streams(x)
        joined = self._joined(streams)
        if self.conv is not None:
            joined, past = self.conv(joined, segments, past)
        tokens = self._tokens(joined, streams)
        fresh = begins(self.learner, jnp.asarray(seq.positions)) & (segments > 0)
        fixed = self._fixed(None if neural is None else fresh)
        y, neural = neural_memory(self.learner, tokens, fixed, state=neural, segments=segments)
        return self.readout(y, x), NeuralMemoryState(neural, past)

    def _joined(self, streams: dict[str, Array]) -> Float[Array, "... C"]:
        return jnp.concatenate([streams[name] for name in ("q", "k", "v")], axis=-1)

    def _tokens(self, joined: Float[Array, "B T C"], streams: dict[str, Array]) -> Tokens:
        q, k, v = (heads_of(part, self.heads) for part in jnp.split(joined, 3, axis=-1))
        gates = {name: self._gate(name, streams[name]) for name in self.biases}
        lr = self.max_lr * jax.nn.sigmoid(gates["lr"])
        log_momentum = log_keep = jnp.zeros_like(lr)
        if "momentum" in gates:
            log_momentum, lr = jax.nn.log_sigmoid(gates["momentum"]), lr * jax.nn.sigmoid(-gates["momentum"])
        if "keep" in gates:
            log_keep = jax.nn.log_sigmoid(gates["keep"])
        return Tokens(unit(q), unit(k), v, lr, log_momentum, log_keep)

    def _gate(self, name: str, x: Float[Array, "B T W"]) -> Float[Array, "B T H L"]:
        return heads_of(x.astype(jnp.float32), self.heads) + self.biases[name][...][None, None]

    def _fixed(self, fresh: Bool[Array, "..."] | None) -> Fixed:
        """What the memory starts from; with what the persistent tokens taught it, where any memory is fresh."""
        fixed = self._weights()
        if self.persistent is None:
            return fixed
        taught = self._taught if fresh is None else partial(jax.lax.cond, fresh.any(), self._taught, self._nothing)
        return fixed._replace(start=taught())

    def _weights(self) -> Fixed:
        weights = {name: weight[...] for name, weight in self.weights.items()}
        return Fixed(weights, self.gain[...], self.offset[...])

    def _taught(self) -> Memory:
        assert self.persistent is not None
        streams = self.streams(self.persistent[...][None])
        joined = self._joined(streams)
        if self.conv is not None:
            joined, _ = self.conv(joined, jnp.ones(joined.shape[:2], jnp.int32), None)
        _, state = neural_memory(self.learner, self._tokens(joined, streams), self._weights())
        return jax.tree.map(lambda x: x[0], state.memory)

    def _nothing(self) -> Memory:
        return jax.tree.map(lambda x: x[0], init_state(self.learner, 1, self.heads, self.width).memory)
