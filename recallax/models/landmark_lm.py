"""Landmark attention's published language models (Mohtashami & Jaggi 2023, arXiv 2305.16300; sizes from section 4).

    landmark_pg19      12 layers of width 1024, 8 heads of 128: from scratch on books, blocks of 50 tokens, 202.5M
    landmark_llama     LLaMA-7B, fine-tuned: blocks of 63 tokens (a block and its landmark are 64), 6738.4M

`landmark_pg19` replaces the paper's feed-forward width of 4096 by a SwiGLU with as many parameters (inner width 2731).
It has tied embeddings of GPT-2's ids padded to 50,304, and rotary positions. In both models each head and token reads
the four blocks that it selects, with compressed positions: distances are at most k + 2 = 6 blocks, which training on
rows of 512 and 2048 tokens covers. The landmark's embedding is counted as a parameter; the published models use an id
of the vocabulary for it.
"""

from recallax.layers import Landmark, SwiGLU
from recallax.models.block import Block
from recallax.models.lm import LMConfig
from recallax.models.lm_head import Untied


def landmark_pg19(top_k: int = 4) -> LMConfig:
    """Return the model for PG-19: 12 layers of width 1024.

    Args:
        top_k: Blocks that each head and token reads.

    Returns:
        The model config.
    """
    mixer = Landmark(block_size=50, num_heads=8, top_k=top_k)
    return LMConfig(
        d_model=1024,
        vocab_size=50_304,
        pattern="mark*12",
        blocks={"mark": Block(mixer=mixer, channel=SwiGLU(intermediate_size=2731))},
        compute_dtype="bfloat16",
    )


def landmark_llama(top_k: int = 4) -> LMConfig:
    """Return LLaMA-7B with landmark attention: 32 layers of width 4096.

    Args:
        top_k: Blocks that each head and token reads.

    Returns:
        The model config.
    """
    mixer = Landmark(block_size=63, num_heads=32, top_k=top_k)
    return LMConfig(
        d_model=4096,
        vocab_size=32_000,
        pattern="mark*32",
        blocks={"mark": Block(mixer=mixer, channel=SwiGLU(intermediate_size=11_008))},
        lm_head=Untied(),
        compute_dtype="bfloat16",
        norm_eps=1e-6,
    )
