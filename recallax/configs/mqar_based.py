"""BASED with 16-dimensional queries and keys on the standard mixture of MQAR.

Question: how much does it recall? Width 64. Expected: mean test accuracy 0.91 over the seven slices (BASED, arXiv
2402.18668, figure 2; 0.72 at feature_dim 8 and 0.97 at 24), with the best of the learning rates 1e-3, 3.2e-3, 1e-2 and
3.2e-2. Cost: minutes on one H100.

    recallax train mqar_based
"""

from recallax.layers import Based
from recallax.models import LMConfig
from recallax.models.zoology_lm import zoology
from recallax.tasks import MQAR, MixtureSlice
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train, tiny_run


def mqar_standard(model: LMConfig) -> RunConfig:
    """Return a run of a model on the standard mixture, with the published number of steps and rows."""
    return RunConfig(
        task=MQAR(filler="zoology"),
        model=model,
        optim=AdamW(lr=3e-3),
        train=Train(steps=22_600, batch_size=256, save_every=2000),
        evaluate=Evaluate(every=1000, batches=28, batch_size=32),
    )


def mqar_standard_tiny(model: LMConfig) -> RunConfig:
    """Return the tiny form of such a run."""
    slices = (MixtureSlice(length=16, num_kv_pairs=2), MixtureSlice(length=24, num_kv_pairs=4))
    return tiny_run(
        mqar_standard(model),
        task=MQAR(vocab_size=32, mixture=slices, test_mixture=slices, filler="zoology"),
        model=model,
    )


def get_config() -> RunConfig:
    return mqar_standard(zoology(Based(feature_dim=16), 64))


def get_tiny() -> RunConfig:
    return mqar_standard_tiny(zoology(Based(feature_dim=4, num_heads=2), 16))
