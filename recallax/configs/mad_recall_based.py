"""How does BASED do at MAD's in-context recall?

Vocabulary 16, length 128 (Poli et al. 2024, arXiv 2403.17844). Expected: above 90 %, as the linear attentions
of the published tables. Cost: minutes on a GPU.

    recallax train mad_recall_based
"""

from recallax.layers import Based, GatedConv, SwiGLU
from recallax.models import Block, LMConfig
from recallax.tasks import InContextRecall
from recallax.train.run import AdamW, RunConfig, Train, tiny


def model(d_model: int) -> LMConfig:
    blocks = {
        "conv": Block(mixer=GatedConv(width=3), channel=SwiGLU()),
        "mixer": Block(mixer=Based(feature_dim=8, heads=4), channel=SwiGLU()),
    }
    return LMConfig(d_model=d_model, pattern="(conv mixer)*2", blocks=blocks)


def get_config() -> RunConfig:
    return RunConfig(
        task=InContextRecall(), model=model(128), optim=AdamW(lr=1e-3), train=Train(steps=10_000, batch_size=128)
    )


def get_tiny() -> RunConfig:
    return tiny(get_config(), task=InContextRecall(vocab_size=8, length=16), model=model(16))
