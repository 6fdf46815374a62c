"""Recall of the last value of overwritten keys by different memories, beyond their training length.

The memories have equal bytes of state. They are trained on 32 tokens and tested on 32, 64 and 128. Stages: six learning
rates for the full neural memory and Gated DeltaNet and three for the others, with one seed; then a second seed at the
learning rate that is best on valid, with the norm of the memory after up to 16 times the training length.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.results import best_row
from recallax.layers import Attention, GatedDeltaNet, MixerConfig, NeuralMemory
from recallax.layers.matrix_memory import MatrixState
from recallax.models.zoology_lm import zoology
from recallax.pallas_kernels.neural_memory import InnerOptimizer
from recallax.pallas_kernels.neural_memory.inner_optimizer import LinearNet, MLPNet, RandomFeatureNet
from recallax.pallas_kernels.neural_memory.update_coefficients import FastWeights
from recallax.sweep import ResultRow, SweepStage, Trial
from recallax.tasks import OverwriteRecall, OverwriteSlice
from recallax.train.program import Program
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train
from recallax.train.step import TrainState
from recallax.types import unpacked_seq_info

LENGTH, NUM_KEYS, NUM_WRITES = 32, 3, 6
TASK = OverwriteRecall.length_extrapolation(
    length=LENGTH, num_keys=NUM_KEYS, num_writes=NUM_WRITES, vocab_size=20, noise_vocab_size=4
)
FULL = NeuralMemory(num_heads=1, head_dim=32, inner_optimizer=InnerOptimizer(network=MLPNet(expansion=1), chunk_size=4))
DOUBLED_MEMORY = replace(FULL.inner_optimizer, network=MLPNet(expansion=2))
"""Twice the network, for inner optimizers that store half as much per weight or train half of the weights."""
NUM_FEATURES = 2 * 32
FEATURE_SQUARED_NORM = 0.425 * NUM_FEATURES
"""Mean squared norm of the random features of a unit key, by which an inner step is longer than with keys alone."""
MIXERS: dict[str, MixerConfig] = {
    "full": FULL,
    "gated_delta_net": GatedDeltaNet(num_heads=1, head_k_dim=62, head_v_dim=64),
    "no momentum": replace(FULL, inner_optimizer=replace(DOUBLED_MEMORY, momentum=False)),
    "no keep": replace(FULL, forget=False),
    "linear": replace(
        FULL, head_dim=46, inner_optimizer=InnerOptimizer(network=LinearNet(), gradient="token", chunk_size=16)
    ),
    "last layer only": replace(FULL, inner_optimizer=replace(DOUBLED_MEMORY, trainable_weights=("w2",))),
    "TTT": replace(
        FULL,
        inner_optimizer=replace(DOUBLED_MEMORY, momentum=False, gradient_reduction="mean"),
        forget=False,
        max_lr=1.0,
    ),
    "random features": replace(
        FULL,
        inner_optimizer=replace(FULL.inner_optimizer, network=RandomFeatureNet(expansion=2)),
        max_lr=FULL.stable_lr / FEATURE_SQUARED_NORM,
    ),
    "attention": Attention(),
}
RATES = (4e-3, 8e-3, 1.6e-2)
WIDE_GRID_MIXERS = ("full", "gated_delta_net")
WIDE_GRID_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
NORM_ROWS = 32
"""Rows over which the norms are averaged."""
LENGTH_FACTORS = (1, 4, 16)
"""Lengths, as multiples of the training length, after which the norms are measured."""


def config(name: str, rate: float, seed: int) -> RunConfig:
    """Return the run of one of `MIXERS` at a learning rate."""
    return RunConfig(
        task=TASK,
        model=zoology(MIXERS[name], 32),
        optim=AdamW(lr=rate),
        train=Train(steps=1500, batch_size=32, seed=seed, data_seed=seed),
        evaluate=Evaluate(batches=12, batch_size=64),
    )


def memory_norms(program: Program, state: TrainState) -> ResultRow:
    """Measure the distance of the memory from its start after rows of each length: root mean square over rows."""
    norms: dict[str, float] = {}
    for times in LENGTH_FACTORS:
        part = OverwriteSlice(length=times * LENGTH, num_keys=NUM_KEYS, num_writes=times * NUM_WRITES)
        task = replace(TASK, mixture=(part,), test_mixture=(part,))
        batch = task.batch(0, "test", 0, NORM_ROWS)
        squares = jax.jit(squared_memory_norms, static_argnums=0)(
            program.graphdef, state.params, state.statistics, batch.tokens
        )
        if squares.size:
            norms[str(part.length)] = round(float(np.sqrt(squares.sum() / NORM_ROWS)), 4)
    return {"norms": norms}


def squared_memory_norms(graph: nnx.GraphDef, params: dict, statistics: dict, tokens: jax.Array) -> jax.Array:
    """Compute the squared norm of each recurrent memory of a model after a batch.

    Args:
        graph: Graph of the model.
        params: Parameters of the model.
        statistics: Statistics of the model.
        tokens: Token ids, one document per row.

    Returns:
        The sum of squares of each memory, over all rows.
    """
    model = nnx.merge(graph, params, statistics)
    size, length = tokens.shape
    _, state, _ = model.prefill(jnp.asarray(tokens), unpacked_seq_info(size, length), model.init_state(size, length))
    types = FastWeights | MatrixState
    leaves = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, types)) if isinstance(x, types)]
    memories = [x.delta if isinstance(x, FastWeights) else x.recurrent_state for x in leaves]
    return jnp.asarray([jnp.sum(jnp.square(x)) for x in jax.tree.leaves(memories)])


def grid(rows: list[ResultRow]) -> list[Trial]:
    """Return every mixer at every learning rate with seed 0."""
    rates = {name: WIDE_GRID_RATES if name in WIDE_GRID_MIXERS else RATES for name in MIXERS}
    return [_trial("grid", name, rate, 0) for name in MIXERS for rate in rates[name]]


def seeds(rows: list[ResultRow]) -> list[Trial]:
    """Return a second seed of every mixer at its best learning rate."""
    return [_trial("seeds", name, best_row(rows, "grid", mixer=name)["lr"], 1) for name in MIXERS]


def _trial(stage: str, name: str, rate: float, seed: int) -> Trial:
    labels = {"stage": stage, "mixer": name, "lr": rate, "seed": seed}
    return Trial(labels, config(name, rate, seed), extra_metrics=memory_norms if stage == "seeds" else None)


STAGES: tuple[SweepStage, ...] = (grid, seeds)
