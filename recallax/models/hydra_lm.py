"""Hydra, the hybrid language model of about 1.6B parameters (arXiv 2508.15099), and its toy model.

A block adds up to three parallel paths to the residual stream: a diagonal state-space model in every block, sparse
global attention in every third block, and a mixture of experts in every second block. A period is six blocks, and the
last one has all three paths. The paper states 1.61B parameters in total and names the parts. The sizes below are
chosen to match, with width 2048, 24 blocks and 50,304 tied ids. Parameters in millions:

    state-space models   24 blocks: 4 d^2 in, d^2 past it                        503.6
    attention             8 blocks: 16 heads of 128, window 256, 512 selected    134.2
    experts              12 blocks: 8 of inner width 1248, 2 per token           736.3     active 184.2
    embedding            tied                                                    103.0
    product keys         512^2 values of 512, 4 heads of which each reads 32     137.9     active   3.7
    workspaces            8: 64 slots of width 128                                 9.1
    total                                                                       1624.2     active 938.0

The paper leaves these choices open: there is a workspace after every block with attention; the product-key memory
occurs once, after three quarters of the blocks, at the end of a repeated period; there is no MLP besides the experts;
experts are selected by the first token of a chunk of 64 tokens, which is also the chunk of the workspaces. Block names
in the pattern:

    ssm, attention, experts, all      a block with these paths besides the state-space model
    workspace, facts                  the two memories, each after its own norm
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
"""Patterns of four state-space blocks with one other part each, and with all parts."""


def hydra_blocks(
    ssm: MixerConfig, attention: MixerConfig, experts: MixerConfig, workspace: MixerConfig, facts: MixerConfig
) -> dict[str, Block]:
    """Build the blocks of a Hydra model.

    Args:
        ssm: The state-space model; any recurrent mixer.
        attention: The sparse global attention.
        experts: The mixture of experts.
        workspace: The workspace memory.
        facts: The product-key memory.

    Returns:
        Blocks by name.
    """
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
    """Return the model of about 1.6B parameters: 24 blocks of width 2048.

    Returns:
        The model config.
    """
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
    """Return the authors' prototype: 8 blocks of width 256, with attention in the fourth and the eighth.

    Returns:
        The model config.
    """
    blocks = hydra_blocks(
        DiagonalSSM(max_timescale=512.0),
        SparseGlobalAttention(num_heads=4),
        ChunkExperts(num_experts=4, intermediate_size=256, chunk_size=32),
        Workspace(chunk_size=32),
        ProductKeys(num_sub_keys=64, num_heads=1, head_k_dim=128, value_dim=128, top_k=4),
    )
    pattern = "ssm experts ssm all workspace facts ssm experts ssm all workspace"
    return LMConfig(d_model=256, vocab_size=4000, pattern=pattern, blocks=blocks)
