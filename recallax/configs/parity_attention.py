"""The control that recall should not solve: parity, where every bit counts.

Train length 32, test lengths up to 256. Expected: near chance beyond the trained length for every mixer here; it
takes a transition with negative eigenvalues (Grazzi et al. 2024, arXiv 2411.12537). Cost: minutes on a GPU.

    recallax train parity_attention
"""

from recallax.layers import Attention, GatedConv, SwiGLU
from recallax.models import Block, LMConfig
from recallax.tasks import StateTracking
from recallax.train.run import AdamW, RunConfig, Train, tiny


def model(d_model: int) -> LMConfig:
    blocks = {
        "conv": Block(mixer=GatedConv(width=3), channel=SwiGLU()),
        "mixer": Block(mixer=Attention(heads=4), channel=SwiGLU()),
    }
    return LMConfig(d_model=d_model, pattern="(conv mixer)*2", blocks=blocks)


def get_config() -> RunConfig:
    return RunConfig(
        task=StateTracking(group="parity"),
        model=model(128),
        optim=AdamW(lr=1e-3),
        train=Train(steps=10_000, batch_size=128),
    )


def get_tiny() -> RunConfig:
    return tiny(get_config(), task=StateTracking(group="parity", length=8, test_lengths=(8, 12)), model=model(16))
