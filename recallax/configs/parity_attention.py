"""Softmax attention on parity, a control that recall cannot solve.

Question: does it generalize to longer rows? Train length 32, test lengths up to 256. Expected: close to chance beyond
the trained length for every mixer without negative eigenvalues in its transition (Grazzi et al. 2024, arXiv
2411.12537). Cost: minutes on a GPU.

    recallax train parity_attention
"""

from recallax.layers import Attention
from recallax.models.hybrid_lm import hybrid
from recallax.tasks import StateTracking
from recallax.train.run_config import AdamW, RunConfig, Train, tiny_run

MIXER = Attention(num_heads=4)


def get_config() -> RunConfig:
    return RunConfig(
        task=StateTracking(group="parity"),
        model=hybrid(MIXER, 128),
        optim=AdamW(lr=1e-3),
        train=Train(steps=10_000, batch_size=128),
    )


def get_tiny() -> RunConfig:
    return tiny_run(
        get_config(), task=StateTracking(group="parity", length=8, test_lengths=(8, 12)), model=hybrid(MIXER, 16)
    )
