"""Linear attention on copying of strings.

Question: does it copy strings longer than those it was trained on? Train lengths 5 to 20, test lengths up to 160
(Jelassi et al. 2024, arXiv 2402.01032). Expected: exact at trained lengths, with lower accuracy beyond them.
Cost: minutes on a GPU.

    recallax train copying_linear
"""

from recallax.layers import LinearAttention
from recallax.models.hybrid_lm import hybrid
from recallax.tasks import Copying
from recallax.train.run_config import AdamW, RunConfig, Train, tiny_run

MIXER = LinearAttention(feature_map="relu", num_heads=2)


def get_config() -> RunConfig:
    return RunConfig(
        task=Copying(), model=hybrid(MIXER, 128), optim=AdamW(lr=1e-3), train=Train(steps=10_000, batch_size=128)
    )


def get_tiny() -> RunConfig:
    return tiny_run(get_config(), task=Copying(train_lengths=(2, 4), test_lengths=(4, 6)), model=hybrid(MIXER, 16))
