"""Memories of equal bytes on recall with overwrites among noise, trained on 32 tokens and tested on 32, 64 and 128.

Stages: six learning rates for the full neural memory and Gated DeltaNet, three for the others, with one seed; then the
rate that is best on valid with another seed, and the norm of what is held after up to 16 times the length.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.cell import Cell, Row, Stage, best
from recallax.layers import Attention, GatedDeltaNet, MixerConfig, NeuralMemory
from recallax.layers.matrix_memory import MatrixState
from recallax.models.zoology import zoology
from recallax.pallas_kernels.neural_memory import Learner
from recallax.pallas_kernels.neural_memory.inner import Memory
from recallax.pallas_kernels.neural_memory.learner import LinearNet, MLPNet, RandomFeatureNet
from recallax.tasks import OverwriteRecall, Writes
from recallax.train.program import Program
from recallax.train.run import AdamW, Evaluate, RunConfig, Train
from recallax.train.step import TrainState
from recallax.types import whole_rows

LENGTH, KEYS, WRITES = 32, 3, 6
TASK = OverwriteRecall.stretched(length=LENGTH, keys=KEYS, writes=WRITES, vocab_size=20, noise_vocab=4)
FULL = NeuralMemory(heads=1, head_dim=32, learner=Learner(network=MLPNet(expansion=1), chunk=4))
TWICE = replace(FULL.learner, network=MLPNet(expansion=2))
"""Twice the network, for learners that keep half as much for each weight, or learn half of the weights."""
FEATURES = 2 * 32
SIZE = 0.425 * FEATURES
"""Of a random feature vector's square, where keys are of length 1: steps are that much longer than with keys alone."""
MIXERS: dict[str, MixerConfig] = {
    "full": FULL,
    "gated_delta_net": GatedDeltaNet(heads=1, key_dim=62, value_dim=64),
    "no momentum": replace(FULL, learner=replace(TWICE, momentum=False)),
    "no keep": replace(FULL, forget=False),
    "linear": replace(FULL, head_dim=46, learner=Learner(network=LinearNet(), gradient="token", chunk=16)),
    "last layer only": replace(FULL, learner=replace(TWICE, updates=("w2",))),
    "TTT": replace(FULL, learner=replace(TWICE, momentum=False, step="mean"), forget=False, max_lr=1.0),
    "random features": replace(
        FULL, learner=replace(FULL.learner, network=RandomFeatureNet(expansion=2)), max_lr=FULL.stable_lr / SIZE
    ),
    "attention": Attention(),
}
RATES = (4e-3, 8e-3, 1.6e-2)
MORE = ("full", "gated_delta_net")
MORE_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
FURTHER = (1, 4, 16)
"""Times the train length after which the norms are taken."""


def config(name: str, rate: float, seed: int) -> RunConfig:
    return RunConfig(
        task=TASK,
        model=zoology(MIXERS[name], 32),
        optim=AdamW(lr=rate),
        train=Train(steps=1500, batch_size=32, seed=seed, data_seed=seed),
        evaluate=Evaluate(batches=12, batch_size=64),
    )


def norms(program: Program, state: TrainState) -> Row:
    """How far the memory is from where it starts, after rows of each length: root of the mean square over rows."""
    found: dict[str, float] = {}
    for times in FURTHER:
        part = Writes(length=times * LENGTH, keys=KEYS, writes=times * WRITES)
        task = replace(TASK, mixture=(part,), test_mixture=(part,))
        batch = task.batch(0, "test", 0, 32)
        held = jax.jit(held_after, static_argnums=0)(program.graph, state.params, state.statistics, batch.tokens)
        if held.size:
            found[str(part.length)] = round(float(np.sqrt(held.sum() / 32)), 4)
    return {"norms": found}


def held_after(graph: nnx.GraphDef, params: dict, statistics: dict, tokens: jax.Array) -> jax.Array:
    """The sum of squares of what each memory of the model holds."""
    model = nnx.merge(graph, params, statistics)
    size, length = tokens.shape
    _, state, _ = model.prefill(jnp.asarray(tokens), whole_rows(size, length), model.init_state(size, length))
    kinds = Memory | MatrixState
    parts = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds)) if isinstance(x, kinds)]
    held = [x.change if isinstance(x, Memory) else x.memory for x in parts]
    return jnp.asarray([jnp.sum(jnp.square(x)) for x in jax.tree.leaves(held)])


def grid(rows: list[Row]) -> list[Cell]:
    rates = {name: MORE_RATES if name in MORE else RATES for name in MIXERS}
    return [_cell("grid", name, rate, 0) for name in MIXERS for rate in rates[name]]


def second(rows: list[Row]) -> list[Cell]:
    return [_cell("seeds", name, best(rows, "grid", mixer=name)["lr"], 1) for name in MIXERS]


def _cell(stage: str, name: str, rate: float, seed: int) -> Cell:
    labels = {"stage": stage, "mixer": name, "lr": rate, "seed": seed}
    return Cell(labels, config(name, rate, seed), probe=norms if stage == "seeds" else None)


STAGES: tuple[Stage, ...] = (grid, second)
