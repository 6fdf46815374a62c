"""Titans' ways of joining memory and attention on `mqar_micro`, where a window alone cannot see back far enough.

Stages: three learning rates; then, at the rate that is best on valid, a second seed, and for memory as a context its
other two ways of asking.
"""

from dataclasses import replace

from experiments.cell import Cell, Row, Stage, best
from recallax.configs import mqar_micro
from recallax.configs.mqar_titans import every_join
from recallax.layers import NeuralMemory, SlidingWindow
from recallax.pallas_kernels.neural_memory.learner import Learner, MLPNet
from recallax.train.run import AdamW, RunConfig

RATES = (4e-3, 8e-3, 1.6e-2)
STEPS = 1500
MEMORY = NeuralMemory(heads=1, learner=Learner(network=MLPNet(expansion=2), chunk=4))
MODEL = every_join(MEMORY, SlidingWindow(window=8, persistent=2), segment=8, retrieved=4, d_model=32)
PATTERNS = {
    "memory as a context": "conv mac",
    "memory as a gate": "conv mag",
    "memory as a layer": "conv memory window",
    "memory alone": "conv memory",
    "window alone": "conv window",
}
ASKING = {"context, asked by the segment before": "conv mac_previous", "context, learned questions": "conv mac_learned"}


def grid(rows: list[Row]) -> list[Cell]:
    return [_cell("grid", name, rate, 0) for name in PATTERNS for rate in RATES]


def seeds(rows: list[Row]) -> list[Cell]:
    return [_cell("seeds", name, best(rows, "grid", mixer=name)["lr"], 1) for name in PATTERNS]


def asking(rows: list[Row]) -> list[Cell]:
    rate = best(rows, "grid", mixer="memory as a context")["lr"]
    return [_cell("asking", name, rate, seed) for name in ASKING for seed in (0, 1)]


def _cell(stage: str, name: str, rate: float, seed: int) -> Cell:
    return Cell({"stage": stage, "mixer": name, "lr": rate, "seed": seed}, _run(name, rate, seed))


def _run(name: str, rate: float, seed: int) -> RunConfig:
    base = mqar_micro.get_config()
    train = replace(base.train, steps=STEPS, seed=seed, data_seed=seed)
    model = replace(MODEL, pattern=(PATTERNS | ASKING)[name])
    return replace(base, model=model, optim=AdamW(lr=rate), train=train)


STAGES: tuple[Stage, ...] = (grid, seeds, asking)
