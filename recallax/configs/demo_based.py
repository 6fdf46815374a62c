"""Demo, part 1: BASED on a small MQAR, with about as many bytes of state as `demo_window`.

Expected: test accuracy above 0.9. Cost: about half a minute on two CPU cores.

    recallax train demo_based
"""

from recallax.configs import mqar_micro
from recallax.layers import Based
from recallax.models.zoology_lm import zoology
from recallax.train.run_config import AdamW, RunConfig, Train, tiny_run


def get_config() -> RunConfig:
    return RunConfig(
        task=mqar_micro.get_config().task,
        model=zoology(Based(feature_dim=4), 32),
        optim=AdamW(lr=1.6e-2),
        train=Train(steps=1500, batch_size=64),
    )


def get_tiny() -> RunConfig:
    return tiny_run(get_config(), model=zoology(Based(feature_dim=4, num_heads=2), 16))
