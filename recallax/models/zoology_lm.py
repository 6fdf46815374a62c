"""The two-layer hybrid of Zoology's recall experiments: a short gated convolution, then the mixer under test.

No position embeddings, an identity channel mixer (r <- r + norm(r)), tied embeddings.
Source: Arora et al. 2023 (Zoology, arXiv 2312.04927), section 4, and the experiments of BASED (arXiv 2402.18668),
figure 2. Differences: RMSNorm where they use LayerNorm; their dropout of .1 on embeddings and attention is left out.
"""

from dataclasses import replace

from recallax.layers import Attention, BaseConv, Identity, MixerConfig, SlidingWindow
from recallax.models.block import Block
from recallax.models.lm import LMConfig

CONV_BLOCK = Block(mixer=BaseConv(conv_size=3), channel=Identity())
"""The short gated convolution that these hybrids begin with."""


def zoology(mixer: MixerConfig, d_model: int) -> LMConfig:
    """`conv mixer` at the given width."""
    return LMConfig(
        d_model=d_model,
        pattern="conv mixer",
        blocks={
            "conv": CONV_BLOCK,
            "mixer": Block(mixer=mixer, channel=Identity()),
        },
    )


def with_attention_blocks(config: LMConfig, window: int = 64) -> LMConfig:
    """The same model, with blocks `attention` and `window` that `--model.pattern` can name."""
    spare = {
        "attention": Block(mixer=Attention(rope_theta=None), channel=Identity()),
        "window": Block(mixer=SlidingWindow(window=window, rope_theta=None), channel=Identity()),
    }
    return replace(config, blocks=config.blocks | spare)
