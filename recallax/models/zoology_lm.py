"""The two-layer hybrid of Zoology's recall experiments: a short gated convolution, then the mixer under test.

It has no position embeddings, an identity channel mixer (r <- r + norm(r)), and tied embeddings.
Source: Arora et al. 2023 (Zoology, arXiv 2312.04927), section 4, and the experiments of BASED (arXiv 2402.18668),
figure 2. Differences: RMSNorm instead of LayerNorm, and no dropout (0.1 on embeddings and attention there).
"""

from dataclasses import replace

from recallax.layers import Attention, BaseConv, Identity, MixerConfig, SlidingWindow
from recallax.models.block import Block
from recallax.models.lm import LMConfig

CONV_BLOCK = Block(mixer=BaseConv(conv_size=3), channel=Identity())
"""The short gated convolution of the first layer."""


def zoology(mixer: MixerConfig, d_model: int) -> LMConfig:
    """Return the model `conv mixer`.

    Args:
        mixer: The mixer under test.
        d_model: The model's width.

    Returns:
        The model config.
    """
    return LMConfig(
        d_model=d_model,
        pattern="conv mixer",
        blocks={
            "conv": CONV_BLOCK,
            "mixer": Block(mixer=mixer, channel=Identity()),
        },
    )


def with_attention_blocks(config: LMConfig, window: int = 64) -> LMConfig:
    """Add the blocks `attention` and `window`, so that `--model.pattern` can use them.

    Args:
        config: The model config.
        window: Width of the sliding window in tokens.

    Returns:
        The model config with two more blocks.
    """
    extra = {
        "attention": Block(mixer=Attention(rope_theta=None), channel=Identity()),
        "window": Block(mixer=SlidingWindow(window=window, rope_theta=None), channel=Identity()),
    }
    return replace(config, blocks=config.blocks | extra)
