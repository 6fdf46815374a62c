"""BASED on the in-context recall task of MAD.

Question: how much does it recall? Vocabulary 16, length 128 (Poli et al. 2024, arXiv 2403.17844). Expected: accuracy
above 0.9, as linear attention in the published tables. Cost: minutes on a GPU.

    recallax train mad_recall_based
"""

from recallax.layers import Based
from recallax.models.hybrid_lm import hybrid
from recallax.tasks import InContextRecall
from recallax.train.run_config import AdamW, RunConfig, Train, tiny_run

MIXER = Based(feature_dim=8, num_heads=4)


def get_config() -> RunConfig:
    return RunConfig(
        task=InContextRecall(),
        model=hybrid(MIXER, 128),
        optim=AdamW(lr=1e-3),
        train=Train(steps=10_000, batch_size=128),
    )


def get_tiny() -> RunConfig:
    return tiny_run(get_config(), task=InContextRecall(vocab_size=8, length=16), model=hybrid(MIXER, 16))
