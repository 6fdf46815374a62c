"""BASED on set disjointness.

Question: does the order of two sets matter to a model that reads them once? The published sizes (Arora et al. 2024,
JRT, arXiv 2407.05483, section 3). Expected: higher accuracy with the short set first;
`experiments/set_disjointness` measures the difference at a smaller size. Cost: an hour on a GPU.

    recallax train set_disjointness_based
"""

from recallax.layers import Based
from recallax.models.hybrid_lm import hybrid
from recallax.tasks import SetDisjointness
from recallax.train.run_config import AdamW, RunConfig, Train, tiny_run

MIXER = Based(feature_dim=4, num_heads=2)


def get_config() -> RunConfig:
    return RunConfig(
        task=SetDisjointness(),
        model=hybrid(MIXER, 128),
        optim=AdamW(lr=8e-4),
        train=Train(steps=40_000, batch_size=128),
    )


def get_tiny() -> RunConfig:
    return tiny_run(
        get_config(),
        task=SetDisjointness(vocab_size=32, set_sizes=((2, 6),), test_set_sizes=((2, 6),)),
        model=hybrid(MIXER, 16),
    )
