"""A small BASED on text that recallax contains; no download.

Question: which perplexity does it reach, and which on tokens that it can recall? Shakespeare as bytes in rows of 256;
733k parameters, 5 epochs of 466 kB. Recall tokens end an n-gram of six bytes that occurred earlier in the row, and at
most 50 times in the train split: 1.6 % of the targets of the test split. Expected on test: perplexity 4.5 (2.17 bits
per byte), on recall tokens 3.2; on valid it falls from 6.3 at step 150 to 4.75. Cost: two minutes on two CPU cores.

    recallax train text_based
"""

from recallax.configs import demo_based
from recallax.layers import Based, GatedConv, MixerConfig, SlidingWindow, SwiGLU
from recallax.models import Block, LMConfig
from recallax.tasks import Text
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train, tiny_run


def small_based(width: int, heads: int, window: int) -> LMConfig:
    """Return a small model with the published order of layers of BASED.

    Args:
        width: Width of the model.
        heads: Number of heads of both mixers.
        window: Tokens of the sliding window.
    """

    def block(mixer: MixerConfig) -> Block:
        return Block(mixer=mixer, channel=SwiGLU(expand=2.0))

    return LMConfig(
        d_model=width,
        pattern="conv based window conv",
        blocks={
            "conv": block(GatedConv(conv_size=3)),
            "based": block(Based(feature_dim=8, num_heads=heads)),
            "window": block(SlidingWindow(window=window, num_heads=heads)),
        },
    )


def get_config() -> RunConfig:
    return RunConfig(
        task=Text(length=256, ngram_size=6, max_ngram_count=50),
        model=small_based(128, 4, 32),
        optim=AdamW(lr=4e-3),
        train=Train(steps=600, batch_size=16),
        evaluate=Evaluate(every=150, batches=10, batch_size=16),
    )


def tiny_text(length: int) -> Text:
    """Return the task with rows of `length` bytes, for tests."""
    return Text(length=length, ngram_size=3, max_ngram_count=1250)


def get_tiny() -> RunConfig:
    return tiny_run(get_config(), task=tiny_text(16), model=demo_based.get_tiny().model)
