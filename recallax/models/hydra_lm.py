"""Hydra, the hybrid language model of about 1.6B parameters (arXiv 2508.15099), and its toy.

A block adds three parallel paths to the stream: a diagonal state-space model in every block, sparse global attention in
every third, a mixture of experts in every other one; so a period is six blocks, of which the last has all three. Of
the model the paper gives 1.61B parameters in all and names the parts; the split below is chosen, from width 2048, 24
blocks and 50,304 tied ids. In millions:

    state-space models   24 blocks: 4 d^2 in, d^2 past it                        503.6
    attention             8 blocks: 16 heads of 128, window 256, 512 chosen      134.2
    experts              12 blocks: 8 of inner width 1248, 2 per token           736.3     active 184.2
    embedding            tied                                                    103.0
    product keys         512^2 values of 512, 4 heads of which each reads 32     137.9     active   3.7
    workspaces            8: 64 slots of width 128                                 9.1
    total                                                                       1624.2     active 938.0

Left open and chosen: a workspace after every block with attention; the product-key memory once, after three quarters
of the blocks, where a repeated period ends; no perceptron besides the experts; experts are routed by a chunk's first
token, in chunks of 64, as long as the workspaces'. Both of `mixer`'s kinds of names are blocks, so that `pattern` says
which parts a model has:

    ssm, attention, experts, all      a block with the paths of that name besides the state-space model
    workspace, facts                  the two memories, each behind a norm of its own
"""

from recallax.layers import (
    ChunkExperts,
    DiagonalSSM,
    MixerConfig,
    NoChannelMixer,
    Parallel,
    ProductKeys,
    SparseGlobalAttention,
    Workspace,
)
from recallax.models.block import Block
from recallax.models.lm import LMConfig

PERIOD = "ssm experts attention workspace experts ssm all workspace"
ABLATIONS = {
    "ssm": "ssm*4",
    "attention": "(ssm attention)*2",
    "experts": "(ssm experts)*2",
    "workspace": "(ssm*2 workspace)*2",
    "facts": "ssm*3 facts ssm",
    "all": "ssm all workspace facts ssm all workspace",
}
"""Four blocks of the state-space model with each other part alone, and with all of them."""


def hydra_blocks(
    ssm: MixerConfig, attention: MixerConfig, experts: MixerConfig, workspace: MixerConfig, facts: MixerConfig
) -> dict[str, Block]:
    """The blocks of these parts; any recurrent mixer may be the state-space model."""
    mixers = {
        "ssm": Parallel(ssm=ssm),
        "attention": Parallel(ssm=ssm, attention=attention),
        "experts": Parallel(ssm=ssm, experts=experts),
        "all": Parallel(ssm=ssm, attention=attention, experts=experts),
        "workspace": workspace,
        "facts": facts,
    }
    return {name: Block(mixer=mixer, channel=NoChannelMixer()) for name, mixer in mixers.items()}


def hydra_1b6() -> LMConfig:
    """See the head of the file."""
    blocks = hydra_blocks(
        DiagonalSSM(max_timescale=2048.0),
        SparseGlobalAttention(num_heads=16),
        ChunkExperts(),
        Workspace(),
        ProductKeys(),
    )
    pattern = f"({PERIOD})*3 facts ({PERIOD})*1"
    return LMConfig(
        d_model=2048, vocab_size=50_304, pattern=pattern, blocks=blocks, compute_dtype="bfloat16", remat="block"
    )


def hydra_toy() -> LMConfig:
    """The sizes of the authors' prototype: 8 blocks of width 256, attention in the fourth and the eighth."""
    blocks = hydra_blocks(
        DiagonalSSM(max_timescale=512.0),
        SparseGlobalAttention(num_heads=4),
        ChunkExperts(num_experts=4, intermediate_size=256, chunk_size=32),
        Workspace(chunk_size=32),
        ProductKeys(num_sub_keys=64, num_heads=1, head_k_dim=128, value_dim=128, top_k=4),
    )
    pattern = "ssm experts ssm all workspace facts ssm experts ssm all workspace"
    return LMConfig(d_model=256, vocab_size=4000, pattern=pattern, blocks=blocks)
