"""A needle that lies beyond the window, with and without a workspace that was written on the way.

Stages: two learning rates for every arm; then a second seed at the rate that is best on valid.
"""

from experiments.cell import Cell, Row, Stage, best
from recallax.layers import Nothing, SlidingWindow, SwiGLU, Workspace
from recallax.models import Block, LMConfig
from recallax.tasks.key_retrieval import KeyRetrieval
from recallax.train.run import AdamW, Evaluate, RunConfig, Train

RATES = (4e-3, 1e-2)
STEPS = 1500
SIZES = ((32, 1),)
BLOCKS = {
    "near": Block(mixer=SlidingWindow(window=4), channel=SwiGLU(inner=64)),
    "whole": Block(mixer=SlidingWindow(window=32), channel=SwiGLU(inner=64)),
    "workspace": Block(mixer=Workspace(slots=8, rank=32, chunk=4), channel=Nothing()),
}
PATTERNS = {
    "two windows of 4": "near*2",
    "three windows of 4": "near*3",
    "a workspace between two windows of 4": "near workspace near",
    "two windows of the whole row": "whole*2",
}


def grid(rows: list[Row]) -> list[Cell]:
    return [_cell("grid", name, rate, 0) for name in PATTERNS for rate in RATES]


def seeds(rows: list[Row]) -> list[Cell]:
    return [_cell("seeds", name, best(rows, "grid", mixer=name)["lr"], 1) for name in PATTERNS]


def _cell(stage: str, name: str, rate: float, seed: int) -> Cell:
    return Cell({"stage": stage, "mixer": name, "lr": rate, "seed": seed}, _run(name, rate, seed))


def _run(name: str, rate: float, seed: int) -> RunConfig:
    return RunConfig(
        task=KeyRetrieval(words=16, names=4, train=SIZES, asked=1, test=SIZES),
        model=LMConfig(d_model=32, pattern=PATTERNS[name], blocks=BLOCKS),
        optim=AdamW(lr=rate),
        train=Train(steps=STEPS, batch_size=64, seed=seed, data_seed=seed),
        evaluate=Evaluate(every=500, batches=16, batch_size=64),
    )


STAGES: tuple[Stage, ...] = (grid, seeds)
