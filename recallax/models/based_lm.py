"""BASED's published language models (Arora et al. 2024, arXiv 2402.18668; layer lists from the released configs).

Layers without Taylor linear attention or a sliding window have a gated convolution. All layers have a SwiGLU of inner
width 2 d. Embeddings are tied. The only position embeddings are the rotary ones of the windows. The `window_size` 256
of the released configs is 128 tokens back and the current token.
"""

from recallax.layers import Based, GatedConv, MixerConfig, SlidingWindow, SwiGLU
from recallax.models.block import Block
from recallax.models.lm import LMConfig

VOCAB_SIZE = 50_264
"""GPT-2's 50,257 ids, padded to a multiple of 8."""


def based_360m() -> LMConfig:
    """Return BASED-360M: 27 layers of width 1024, 362.6M parameters (363M in the paper).

    Returns:
        The model config.
    """
    return _based(1024, "conv (based window conv*3)*5 conv")


def based_1b3() -> LMConfig:
    """Return BASED-1.3B: 36 layers of width 1792, 1349.5M parameters (1.35B in the paper).

    Returns:
        The model config.
    """
    return _based(1792, "conv (based window conv*3)*4 based window conv*4 (based window conv*4) based window conv")


def _based(d_model: int, pattern: str) -> LMConfig:
    def block(mixer: MixerConfig) -> Block:
        return Block(mixer=mixer, channel=SwiGLU(expand=2.0, multiple_of=256))

    return LMConfig(
        d_model=d_model,
        vocab_size=VOCAB_SIZE,
        pattern=pattern,
        blocks={
            "conv": block(GatedConv(conv_size=3)),
            "based": block(Based(feature_dim=16, num_heads=16)),
            "window": block(SlidingWindow(window=129, num_heads=16)),
        },
        compute_dtype="bfloat16",
    )
