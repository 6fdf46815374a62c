"""What does BASED-1.3B cost?

36 layers, width 1792, 1349.5M parameters; the published shape (arXiv 2402.18668) and optimizer settings. Expected:
nothing published on this task; the counts of `recallax show` are tested. Cost: a day on one H100.

    recallax show based_1b3
"""

from recallax.layers import Based, GatedConv, SlidingWindow, SwiGLU
from recallax.models import Block, LMConfig
from recallax.models.based import VOCAB, based_1b3
from recallax.tasks import MQAR, Segment
from recallax.train.run import AdamW, Evaluate, RunConfig, Train, tiny


def get_config() -> RunConfig:
    slices = (Segment(length=2048, pairs=256),)
    return RunConfig(
        task=MQAR(vocab_size=VOCAB, mixture=slices, test_mixture=slices),
        model=based_1b3(),
        optim=AdamW(lr=8e-4, warmup=0.01),
        train=Train(steps=20_000, batch_size=256, accumulate=8, save_every=1000),
        evaluate=Evaluate(every=1000, batches=4, batch_size=32),
    )


def get_tiny() -> RunConfig:
    slices = (Segment(length=16, pairs=2),)
    blocks = {
        "conv": Block(mixer=GatedConv(width=3), channel=SwiGLU(expand=2.0)),
        "based": Block(mixer=Based(feature_dim=4, heads=2), channel=SwiGLU(expand=2.0)),
        "window": Block(mixer=SlidingWindow(window=5, heads=2), channel=SwiGLU(expand=2.0)),
    }
    model = LMConfig(d_model=16, pattern="(conv based window)*2 conv", blocks=blocks, remat="block")
    return tiny(get_config(), task=MQAR(vocab_size=32, mixture=slices, test_mixture=slices), model=model)
