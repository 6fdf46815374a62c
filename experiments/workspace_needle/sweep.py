"""Does a workspace retrieve a fact beyond the attention window?

Stages: two learning rates for every pattern with one seed, then the best on valid with a second seed.
"""

from experiments.sweep_stages import lr_grid_then_seeds
from recallax.layers import NoChannelMixer, SlidingWindow, SwiGLU, Workspace
from recallax.models import Block, LMConfig
from recallax.sweep import SweepStage
from recallax.tasks.key_retrieval import KeyRetrieval
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train

RATES = (4e-3, 1e-2)
STEPS = 1500
SIZES = ((32, 1),)
BLOCKS = {
    "near": Block(mixer=SlidingWindow(window=4), channel=SwiGLU(intermediate_size=64)),
    "whole": Block(mixer=SlidingWindow(window=32), channel=SwiGLU(intermediate_size=64)),
    "workspace": Block(mixer=Workspace(num_slots=8, slot_dim=32, chunk_size=4), channel=NoChannelMixer()),
}
PATTERNS = {
    "two windows of 4": "near*2",
    "three windows of 4": "near*3",
    "a workspace between two windows of 4": "near workspace near",
    "two windows of the whole row": "whole*2",
}


def _run(name: str, rate: float, seed: int) -> RunConfig:
    return RunConfig(
        task=KeyRetrieval(num_words=16, num_names=4, train_slices=SIZES, queries_per_fact=1, test_slices=SIZES),
        model=LMConfig(d_model=32, pattern=PATTERNS[name], blocks=BLOCKS),
        optim=AdamW(lr=rate),
        train=Train(steps=STEPS, batch_size=64, seed=seed, data_seed=seed),
        evaluate=Evaluate(every=500, batches=16, batch_size=64),
    )


STAGES: tuple[SweepStage, ...] = lr_grid_then_seeds(PATTERNS, RATES, _run, other_seeds=(1,))
