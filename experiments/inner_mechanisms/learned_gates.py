"""Learned gates: learning rate, momentum and keep as sigmoids of the token type, on the recall task of `momentum.py`.

Nine logits are fitted by Adam through `neural_memory`; there is no model for `recallax.train` to train.
"""

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
"""Initial arguments of the sigmoids."""


class PairBatch(NamedTuple):
    """Pairs, each followed by cues, and the tokens of the memory."""

    keys: Float[Array, "B N D"]
    values: Float[Array, "B N D"]
    relevant: Float[Array, "B N 1"]
    """1 for pairs that are recalled, 0 for pairs that the cues mark as irrelevant."""
    k: Float[Array, "B T 1 D"]
    v: Float[Array, "B T 1 D"]
    token_type: Float[Array, "B T 3"]
    """Type of the token, one-hot: pair, cue to keep, cue to ignore."""


def measure() -> list[dict]:
    """Train the gates with and without momentum, with each seed.

    Returns:
        Rows with the relative squared error of the relevant pairs, and the learned gates.
    """
    return [{"mechanism": "learned momentum", **train_gates(*setting)} for setting in product((False, True), SEEDS)]


def train_gates(momentum: bool, seed: int, steps: int = STEPS) -> dict:
    """Train the gates of a linear memory by Adam, with new rows in every step.

    Args:
        momentum: Use momentum.
        seed: Seed of the training rows.
        steps: Number of steps.

    Returns:
        The relative squared error on other rows before and after training, and the gates by token type.
    """
    inner_optimizer = InnerOptimizer(
        network=LinearNet(), gradient="token", momentum=momentum, chunk_size=PAIRS * (1 + CUES)
    )
    gates = {name: jnp.full(3, start) for name, start in INITIAL_LOGITS.items()}
    optimizer = optax.adam(ADAM_LR)

    @jax.jit
    def step(gates: dict, moments: optax.OptState, data: PairBatch) -> tuple[optax.Params, optax.OptState]:
        updates, moments = optimizer.update(
            jax.grad(partial(relative_square_error, inner_optimizer))(gates, data), moments
        )
        return optax.apply_updates(gates, updates), moments

    error_fn, unseen = (
        jax.jit(partial(relative_square_error, inner_optimizer)),
        draw_batch(np.random.default_rng(1000), 256),
    )
    rng, moments, before = np.random.default_rng(seed), optimizer.init(gates), float(error_fn(gates, unseen))
    for _ in range(steps):
        gates, moments = step(gates, moments, draw_batch(rng, ROWS))
    after = float(error_fn(gates, unseen))
    learned = {name: [round(float(x), 3) for x in jax.nn.sigmoid(gate)] for name, gate in gates.items()}
    return {"momentum": momentum, "seed": seed, "before": round(before, 4), "error": round(after, 4), "gates": learned}


def draw_batch(rng: np.random.Generator, rows: int) -> PairBatch:
    """Draw rows.

    Args:
        rng: Random generator.
        rows: Number of rows B.

    Returns:
        The rows, float32.
    """
    keys, values, relevant = pairs_and_cues(rng, rows, PAIRS, WIDTH)
    token_type = np.where(relevant, 1, 2)[..., None].repeat(1 + CUES, axis=-1)
    token_type[..., 0] = 0
    k, v = (expand_to_tokens(x)[:, :, None] for x in (keys, values))
    parts = (keys, values, relevant[..., None], k, v, np.eye(3)[token_type.reshape(rows, -1)])
    return PairBatch(*(jnp.asarray(x, jnp.float32) for x in parts))


def relative_square_error(
    inner_optimizer: InnerOptimizer, gates: dict[str, Float[Array, " 3"]], data: PairBatch
) -> Float[Array, ""]:
    """Compute the error of the relevant pairs after the row was read.

    Args:
        inner_optimizer: The memory's inner optimizer.
        gates: Logits of the gates by token type.
        data: The rows.

    Returns:
        The squared error relative to the square of the values.
    """
    lr, momentum, keep = ((data.token_type @ gates[name])[..., None, None] for name in INITIAL_LOGITS)
    logs = (jax.nn.log_sigmoid(momentum), jax.nn.log_sigmoid(keep))
    tokens = MemoryInputs(jnp.zeros_like(data.k), data.k, data.v, jax.nn.sigmoid(lr), *logs)
    no_norm = jnp.zeros((1, WIDTH))
    _, state = neural_memory(
        inner_optimizer, tokens, OuterParams({"w1": jnp.zeros((1, WIDTH, WIDTH))}, no_norm, no_norm)
    )
    reads = jnp.einsum("bni,bio->bno", data.keys, state.fast_weights.delta["w1"][:, 0])
    error, size = (jnp.sum(jnp.square(x) * data.relevant) for x in (reads - data.values, data.values))
    return error / size
