"""What does BASED-360M cost, and does it train at MQAR of language-model size?

27 layers, width 1024, 362.6M parameters; the published shape (arXiv 2402.18668) and optimizer settings. Expected:
nothing published on this task; the counts of `recallax show` are tested. Cost: hours on one H100.

    recallax show based_360m
"""

from recallax.layers import Based, GatedConv, MixerConfig, SlidingWindow, SwiGLU
from recallax.models import Block, LMConfig
from recallax.models.based import VOCAB, based_360m
from recallax.tasks import MQAR, Segment
from recallax.train.run import AdamW, Evaluate, RunConfig, Train, tiny


def language_model_size(model: LMConfig) -> RunConfig:
    """A model on MQAR with the vocabulary, length, rows and optimizer of the published pretraining."""
    slices = (Segment(length=2048, pairs=256),)
    return RunConfig(
        task=MQAR(vocab_size=model.vocab_size or VOCAB, mixture=slices, test_mixture=slices),
        model=model,
        optim=AdamW(lr=8e-4, warmup=0.01),
        train=Train(steps=20_000, batch_size=256, accumulate=8, save_every=1000),
        evaluate=Evaluate(every=1000, batches=4, batch_size=32),
    )


def tiny_stack(config: RunConfig, model: LMConfig) -> RunConfig:
    slices = (Segment(length=16, pairs=2),)
    return tiny(config, task=MQAR(vocab_size=32, mixture=slices, test_mixture=slices), model=model)


def tiny_blocks() -> dict[str, Block]:
    def block(mixer: MixerConfig) -> Block:
        return Block(mixer=mixer, channel=SwiGLU(expand=2.0))

    return {
        "conv": block(GatedConv(width=3)),
        "based": block(Based(feature_dim=4, heads=2)),
        "window": block(SlidingWindow(window=5, heads=2)),
    }


def get_config() -> RunConfig:
    return language_model_size(based_360m())


def get_tiny() -> RunConfig:
    pattern = "conv (based window conv*3)*2 conv"
    model = LMConfig(d_model=16, pattern=pattern, blocks=tiny_blocks(), remat="block", compute="bfloat16")
    return tiny_stack(get_config(), model)
