"""Memories of equal bytes on recall with overwrites among noise, trained on 32 tokens and tested on 32, 64 and 128.

Stages: six learning rates for the full neural memory and Gated DeltaNet, three for the others, with one seed; then the
rate that is best on valid with another seed, and the norm of what is held after up to 16 times the length.
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
"""Twice the network, for learners that keep half as much for each weight, or learn half of the weights."""
NUM_FEATURES = 2 * 32
FEATURE_SQUARED_NORM = 0.425 * NUM_FEATURES
"""Of a random feature vector's square, where keys are of length 1: steps are that much longer than with keys alone."""
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
LENGTH_FACTORS = (1, 4, 16)
"""Times the train length after which the norms are taken."""


def config(name: str, rate: float, seed: int) -> RunConfig:
    return RunConfig(
        task=TASK,
        model=zoology(MIXERS[name], 32),
        optim=AdamW(lr=rate),
        train=Train(steps=1500, batch_size=32, seed=seed, data_seed=seed),
        evaluate=Evaluate(batches=12, batch_size=64),
    )


def memory_norms(program: Program, state: TrainState) -> ResultRow:
    """How far the memory is from where it starts, after rows of each length: root of the mean square over rows."""
    found: dict[str, float] = {}
    for times in LENGTH_FACTORS:
        part = OverwriteSlice(length=times * LENGTH, num_keys=NUM_KEYS, num_writes=times * NUM_WRITES)
        task = replace(TASK, mixture=(part,), test_mixture=(part,))
        batch = task.batch(0, "test", 0, 32)
        held = jax.jit(squared_memory_norms, static_argnums=0)(
            program.graphdef, state.params, state.statistics, batch.tokens
        )
        if held.size:
            found[str(part.length)] = round(float(np.sqrt(held.sum() / 32)), 4)
    return {"norms": found}


def squared_memory_norms(graph: nnx.GraphDef, params: dict, statistics: dict, tokens: jax.Array) -> jax.Array:
    """The sum of squares of what each memory of the model holds."""
    model = nnx.merge(graph, params, statistics)
    size, length = tokens.shape
    _, state, _ = model.prefill(jnp.asarray(tokens), unpacked_seq_info(size, length), model.init_state(size, length))
    kinds = FastWeights | MatrixState
    parts = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds)) if isinstance(x, kinds)]
    held = [x.delta if isinstance(x, FastWeights) else x.recurrent_state for x in parts]
    return jnp.asarray([jnp.sum(jnp.square(x)) for x in jax.tree.leaves(held)])


def grid(rows: list[ResultRow]) -> list[Trial]:
    rates = {name: WIDE_GRID_RATES if name in WIDE_GRID_MIXERS else RATES for name in MIXERS}
    return [_cell("grid", name, rate, 0) for name in MIXERS for rate in rates[name]]


def seeds(rows: list[ResultRow]) -> list[Trial]:
    return [_cell("seeds", name, best_row(rows, "grid", mixer=name)["lr"], 1) for name in MIXERS]


def _cell(stage: str, name: str, rate: float, seed: int) -> Trial:
    labels = {"stage": stage, "mixer": name, "lr": rate, "seed": seed}
    return Trial(labels, config(name, rate, seed), extra_metrics=memory_norms if stage == "seeds" else None)


STAGES: tuple[SweepStage, ...] = (grid, seeds)
