"""Landmark attention's published language models (Mohtashami & Jaggi 2023, arXiv 2305.16300; sizes from section 4).

    landmark_pg19      12 layers of width 1024, 8 heads of 128: from scratch on books, blocks of 50 tokens, 202.5M
    landmark_llama     LLaMA-7B, fine-tuned: blocks of 63 tokens (so that a block and its landmark are 64), 6738.4M

The first has the paper's feed-forward width of 4096 as SwiGLU of as many parameters (inner width 2731), tied embeddings
of GPT-2's ids padded to 50,304, rotary positions. Both read the four blocks that each head and token chooses, at stingy
distances; with a training length of 512 and 2048, blocks up to k + 2 = 6 apart are distances that training has seen.
The landmark's embedding counts to the parameters; the published models give it an id of the vocabulary instead.
"""

from recallax.layers import Landmark, SwiGLU
from recallax.models.block import Block
from recallax.models.lm import LMConfig
from recallax.models.lm_head import Untied


def landmark_pg19(top_k: int = 4) -> LMConfig:
    """12 layers, width 1024."""
    mixer = Landmark(block_size=50, num_heads=8, top_k=top_k)
    return LMConfig(
        d_model=1024,
        vocab_size=50_304,
        pattern="mark*12",
        blocks={"mark": Block(mixer=mixer, channel=SwiGLU(intermediate_size=2731))},
        compute_dtype="bfloat16",
    )


def landmark_llama(top_k: int = 4) -> LMConfig:
    """LLaMA-7B's 32 layers of width 4096."""
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
