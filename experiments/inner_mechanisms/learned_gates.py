"""The same recall with gates that are learned: rate, momentum and keep as sigmoids of what a token is."""

from functools import partial
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments.inner_mechanisms.momentum import CUES, expand_to_tokens, pairs_and_cues
from recallax.pallas_kernels.neural_memory import InnerOptimizer, MemoryInputs, OuterParams, neural_memory
from recallax.pallas_kernels.neural_memory.inner_optimizer import LinearNet

PAIRS, WIDTH, ROWS, STEPS, ADAM_LR, SEEDS = 12, 8, 32, 350, 0.05, (0, 1, 2)
INITIAL_LOGITS = {"lr": 0.0, "momentum": 0.0, "keep": 4.0}
"""Of the sigmoids' arguments."""


class PairBatch(NamedTuple):
    keys: Float[Array, "B N D"]
    values: Float[Array, "B N D"]
    relevant: Float[Array, "B N 1"]
    k: Float[Array, "B T 1 D"]
    v: Float[Array, "B T 1 D"]
    token_type: Float[Array, "B T 3"]
    """What a token is, one-hot: pair, cue to keep, cue to ignore."""


def measure() -> list[dict]:
    """A row per momentum and seed: the error of what is read with the keys that matter, and the learned gates."""
    return [{"mechanism": "learned momentum", **train_gates(*setting)} for setting in product((False, True), SEEDS)]


def train_gates(momentum: bool, seed: int, steps: int = STEPS) -> dict:
    """Train the gates of a linear memory by Adam on fresh rows; errors are the share of squares missed on others."""
    learner = InnerOptimizer(network=LinearNet(), gradient="token", momentum=momentum, chunk_size=PAIRS * (1 + CUES))
    gates = {name: jnp.full(3, start) for name, start in INITIAL_LOGITS.items()}
    optimizer = optax.adam(ADAM_LR)

    @jax.jit
    def step(gates: dict, moments: optax.OptState, data: PairBatch) -> tuple[optax.Params, optax.OptState]:
        updates, moments = optimizer.update(jax.grad(partial(relative_square_error, learner))(gates, data), moments)
        return optax.apply_updates(gates, updates), moments

    measured, unseen = jax.jit(partial(relative_square_error, learner)), draw_batch(np.random.default_rng(1000), 256)
    rng, moments, before = np.random.default_rng(seed), optimizer.init(gates), float(measured(gates, unseen))
    for _ in range(steps):
        gates, moments = step(gates, moments, draw_batch(rng, ROWS))
    after = float(measured(gates, unseen))
    learned = {name: [round(float(x), 3) for x in jax.nn.sigmoid(gate)] for name, gate in gates.items()}
    return {"momentum": momentum, "seed": seed, "before": round(before, 4), "error": round(after, 4), "gates": learned}


def draw_batch(rng: np.random.Generator, rows: int) -> PairBatch:
    keys, values, matters = pairs_and_cues(rng, rows, PAIRS, WIDTH)
    kind = np.where(matters, 1, 2)[..., None].repeat(1 + CUES, axis=-1)
    kind[..., 0] = 0
    k, v = (expand_to_tokens(x)[:, :, None] for x in (keys, values))
    parts = (keys, values, matters[..., None], k, v, np.eye(3)[kind.reshape(rows, -1)])
    return PairBatch(*(jnp.asarray(x, jnp.float32) for x in parts))


def relative_square_error(
    learner: InnerOptimizer, gates: dict[str, Float[Array, " 3"]], data: PairBatch
) -> Float[Array, ""]:
    """The share of the values' squares that is missed, over the pairs that matter."""
    lr, momentum, keep = ((data.token_type @ gates[name])[..., None, None] for name in INITIAL_LOGITS)
    logs = (jax.nn.log_sigmoid(momentum), jax.nn.log_sigmoid(keep))
    tokens = MemoryInputs(jnp.zeros_like(data.k), data.k, data.v, jax.nn.sigmoid(lr), *logs)
    nothing = jnp.zeros((1, WIDTH))
    _, state = neural_memory(learner, tokens, OuterParams({"w1": jnp.zeros((1, WIDTH, WIDTH))}, nothing, nothing))
    reads = jnp.einsum("bni,bio->bno", data.keys, state.fast_weights.delta["w1"][:, 0])
    miss, size = (jnp.sum(jnp.square(x) * data.relevant) for x in (reads - data.values, data.values))
    return miss / size
