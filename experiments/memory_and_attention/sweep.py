"""Titans' ways of joining memory and attention on MQAR, where attention alone cannot see back far enough.

Stages: three learning rates; then, at the rate that is best on valid, another seed, and for memory as a context its
other two ways of asking; and the joins with a deeper memory. Attention over the whole row is the control.
"""

from dataclasses import replace

from experiments.cell import Cell, Row, Stage, best
from recallax.configs import mqar_micro
from recallax.configs.mqar_titans import every_join
from recallax.layers import Attention, Identity, NeuralMemory, SlidingWindow
from recallax.models import Block
from recallax.pallas_kernels.neural_memory.learner import Learner, LinearNet, MLPNet
from recallax.tasks import MQAR, Segment
from recallax.train.run import AdamW, RunConfig

SLICES = (Segment(length=16, pairs=2),)
TASK = MQAR(vocab_size=16, mixture=SLICES, test_mixture=SLICES)
RATES = (7.5e-4, 1.5e-3, 3e-3)
STEPS = 1500
MATRIX = NeuralMemory(heads=1, learner=Learner(network=LinearNet(), gradient="token", chunk=8))
NETWORK = NeuralMemory(heads=1, learner=Learner(network=MLPNet(expansion=2), chunk=4))
CONTROL = Block(mixer=Attention(), channel=Identity())
PATTERNS = {
    "memory as a context": "conv mac",
    "memory as a gate": "conv mag",
    "memory as a layer": "conv memory window",
    "memory alone": "conv memory",
    "window alone": "conv window",
    "attention": "conv attention",
}
ASKING = {"context, asked by the segment before": "conv mac_previous", "context, learned questions": "conv mac_learned"}
SEEDS = (1,)
DEEP = tuple(name for name in PATTERNS if name.startswith("memory as"))


def grid(rows: list[Row]) -> list[Cell]:
    return [_cell("grid", name, rate, 0) for name in PATTERNS for rate in RATES]


def seeds(rows: list[Row]) -> list[Cell]:
    chosen = {name: best(rows, "grid", mixer=name)["lr"] for name in PATTERNS}
    return [_cell("seeds", name, rate, seed) for name, rate in chosen.items() for seed in SEEDS]


def asking(rows: list[Row]) -> list[Cell]:
    rate = best(rows, "grid", mixer="memory as a context")["lr"]
    return [_cell("asking", name, rate, seed) for name in ASKING for seed in SEEDS]


def deep(rows: list[Row]) -> list[Cell]:
    """The joins with a two-layer network for a memory, at the rate that was best with a matrix."""
    chosen = {name: best(rows, "grid", mixer=name)["lr"] for name in DEEP}
    return [_cell("deep", name, rate, SEEDS[0], NETWORK) for name, rate in chosen.items()]


def _cell(stage: str, name: str, rate: float, seed: int, memory: NeuralMemory = MATRIX) -> Cell:
    return Cell({"stage": stage, "mixer": name, "lr": rate, "seed": seed}, _run(name, rate, seed, memory))


def _run(name: str, rate: float, seed: int, memory: NeuralMemory) -> RunConfig:
    base = mqar_micro.get_config()
    train = replace(base.train, steps=STEPS, seed=seed, data_seed=seed)
    model = every_join(memory, SlidingWindow(window=4, persistent=2), segment=4, retrieved=2, d_model=64)
    model = replace(model, pattern=(PATTERNS | ASKING)[name], blocks=model.blocks | {"attention": CONTROL})
    return replace(base, task=TASK, model=model, optim=AdamW(lr=rate), train=train)


STAGES: tuple[Stage, ...] = (grid, seeds, asking, deep)
