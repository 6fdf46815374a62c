"""Softmax attention on induction heads.

Question: does it find the token after the last occurrence of a special token, at other lengths? Train length 256, test
lengths 64 to 1024 (Gu & Dao 2023, Mamba, arXiv 2312.00752, section 4.1.2). Expected: exact up to about twice the
trained length. Cost: minutes on a GPU.

    recallax train induction_attention
"""

from recallax.layers import Attention
from recallax.models.hybrid_lm import hybrid
from recallax.tasks import InductionHeads
from recallax.train.run_config import AdamW, RunConfig, Train, tiny_run

MIXER = Attention(num_heads=4)


def get_config() -> RunConfig:
    return RunConfig(
        task=InductionHeads(), model=hybrid(MIXER, 128), optim=AdamW(lr=1e-3), train=Train(steps=10_000, batch_size=128)
    )


def get_tiny() -> RunConfig:
    return tiny_run(get_config(), task=InductionHeads(length=16, test_lengths=(8, 16)), model=hybrid(MIXER, 16))
