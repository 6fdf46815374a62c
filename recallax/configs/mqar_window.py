"""How much of MQAR's standard mixture lies within a sliding window of 64 tokens?

Width 128. Expected: mean test accuracy .51 over the seven slices (.145 at window 16, .80 at 256): the share of
queries whose value is in reach, so this checks generator and window at once. Cost: minutes on one H100.

    recallax train mqar_window
"""

from recallax.layers import SlidingWindow
from recallax.models.zoology import zoology
from recallax.tasks import MQAR, Segment
from recallax.train.run import AdamW, Evaluate, RunConfig, Train, tiny


def get_config() -> RunConfig:
    return RunConfig(
        task=MQAR(filler="zoology"),
        model=zoology(SlidingWindow(window=64, rotary_base=None), 128),
        optim=AdamW(lr=3e-3),
        train=Train(steps=22_600, batch_size=256, save_every=2000),
        evaluate=Evaluate(every=1000, batches=28, batch_size=32),
    )


def get_tiny() -> RunConfig:
    slices = (Segment(length=16, pairs=2), Segment(length=24, pairs=4))
    task = MQAR(vocab_size=32, mixture=slices, test_mixture=slices, filler="zoology")
    return tiny(get_config(), task=task, model=zoology(SlidingWindow(window=5, rotary_base=None), 16))
