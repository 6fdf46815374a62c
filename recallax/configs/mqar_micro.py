"""BASED on the smallest MQAR that separates mixers.

Question: how much does it recall? Vocabulary 64, length 32, 4 and 8 pairs, width 32: the size of the learning-rate
grids in `experiments/recall_frontier`. Expected: test accuracy above 0.95. Cost: about 20 seconds on two CPU cores.

    recallax train mqar_micro
"""

from recallax.layers import Based
from recallax.models.zoology_lm import zoology
from recallax.tasks import MQAR, MixtureSlice
from recallax.train.run_config import AdamW, RunConfig, Train, tiny_run

SLICES = (MixtureSlice(length=32, num_kv_pairs=4), MixtureSlice(length=32, num_kv_pairs=8))


def get_config() -> RunConfig:
    return RunConfig(
        task=MQAR(vocab_size=64, mixture=SLICES, test_mixture=SLICES),
        model=zoology(Based(feature_dim=8), 32),
        optim=AdamW(lr=1e-2),
        train=Train(steps=2000, batch_size=64),
    )


def get_tiny() -> RunConfig:
    return tiny_run(get_config(), model=zoology(Based(feature_dim=4, num_heads=2), 16))
