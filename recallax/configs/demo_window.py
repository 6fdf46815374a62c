"""Demo, part 2: a sliding window on the same MQAR, with about as many bytes of state as `demo_based`.

The state of BASED at feature_dim 4 and width 32 is 15 x 33 float32, 1980 bytes; a window of 8 tokens caches 2048 bytes.
Expected: test accuracy about 0.26, the share of queries whose value is within 8 tokens.
Cost: about half a minute on two CPU cores.

    recallax train demo_window
"""

from recallax.configs import mqar_micro
from recallax.layers import SlidingWindow
from recallax.models.zoology_lm import zoology
from recallax.train.run_config import AdamW, RunConfig, Train, tiny_run


def get_config() -> RunConfig:
    return RunConfig(
        task=mqar_micro.get_config().task,
        model=zoology(SlidingWindow(window=8, rope_theta=None), 32),
        optim=AdamW(lr=1.6e-2),
        train=Train(steps=1500, batch_size=64),
    )


def get_tiny() -> RunConfig:
    return tiny_run(get_config(), model=zoology(SlidingWindow(window=5, rope_theta=None), 16))
