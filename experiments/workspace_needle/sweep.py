"""A needle that lies beyond the window, with and without a workspace that was written on the way.

Stages: two learning rates for every arm; then a second seed at the rate that is best on valid.
"""

from experiments.cell import Stage, rates_then_seeds
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


def _run(name: str, rate: float, seed: int) -> RunConfig:
    return RunConfig(
        task=KeyRetrieval(words=16, names=4, train=SIZES, asked=1, test=SIZES),
        model=LMConfig(d_model=32, pattern=PATTERNS[name], blocks=BLOCKS),
        optim=AdamW(lr=rate),
        train=Train(steps=STEPS, batch_size=64, seed=seed, data_seed=seed),
        evaluate=Evaluate(every=500, batches=16, batch_size=64),
    )


STAGES: tuple[Stage, ...] = rates_then_seeds(PATTERNS, RATES, _run, others=(1,))
