"""Titans' language models at their published sizes (Behrouz et al. 2025, arXiv 2501.00663; sizes from the NeurIPS
version, table 5), in a Llama-like block: RMSNorm, SwiGLU, rotary positions in the attention.

    titans_170m    12 layers of width 768, 16 heads         titans_760m    24 of 1536, 16 heads
    titans_340m    24 of 1024, 16 heads                     titans_1b3     18 of 2048, 8 heads

(The 400M of the result tables has no published shape.) Ways of joining memory and attention:

    lmm    the memory alone
    mac    attention within segments of 512 that also reads what the memory answers to the segment's tokens
    mag    a window of attention, gated by the memory: parallel branches
    mal    a layer of memory, then a layer of window attention, then SwiGLU

Millions of parameters, with tied embeddings of 32,000 ids: lmm 122.3, 378.4, 822.4, 1129.7; mac 150.7, 479.1, 1049.0,
1431.7; mag and mal 151.9, 482.3, 1053.7, 1436.4. The published names are nearest to the memory alone.

The memory: one network x + LN(W_2 gelu(W_1 x)) per head, hidden width 4 times the head's, chunks of 16, gates per
matrix, convolutions of width 4. The paper's equations have a single memory of the whole width, which would hold 67 MB
per layer and sequence at width 1024; its table lists heads, and a memory per head is what is built here. The window is
2048 tokens. 128 persistent ones are seen by the attention and have been read by the memory before a document begins,
each its own. (Where the memory reads what the attention found, as in mac, the attention alone has them.)
"""

from dataclasses import replace
from typing import Literal

from recallax.layers import (
    MemoryAsContext,
    MemoryAsGate,
    MixerConfig,
    NeuralMemory,
    NoChannelMixer,
    SlidingWindow,
    SwiGLU,
)
from recallax.models.block import Block
from recallax.models.lm import LMConfig
from recallax.pallas_kernels.neural_memory.inner_optimizer import LinearNet, MLPNet, RandomFeatureNet, SwiGLUNet

VOCAB_SIZE = 32_000
"""Ids of Llama 2's tokenizer."""
MODEL_SIZES = {"170m": (12, 768, 16), "340m": (24, 1024, 16), "760m": (24, 1536, 16), "1b3": (18, 2048, 8)}
"""Layers, width, heads."""
WINDOW, BLOCK_SIZE, NUM_PERSISTENT_TOKENS = 2048, 512, 128

type TitansVariant = Literal["lmm", "mac", "mag", "mal"]


def titans(size: Literal["170m", "340m", "760m", "1b3"], variant: TitansVariant) -> LMConfig:
    """The model of that size."""
    layers, d_model, heads = MODEL_SIZES[size]
    window = SlidingWindow(window=WINDOW, num_heads=heads, num_persistent_tokens=NUM_PERSISTENT_TOKENS)
    memory = NeuralMemory(num_heads=heads, num_persistent_tokens=0 if variant == "mac" else NUM_PERSISTENT_TOKENS)
    blocks, pattern = titans_blocks(variant, memory, window, SwiGLU(), layers)
    return LMConfig(d_model=d_model, vocab_size=VOCAB_SIZE, pattern=pattern, blocks=blocks, compute_dtype="bfloat16")


def titans_blocks(
    variant: TitansVariant,
    memory: MixerConfig,
    attention: SlidingWindow,
    channel_mixer: MixerConfig,
    num_layers: int,
    block_size: int = BLOCK_SIZE,
) -> tuple[dict[str, Block], str]:
    """The blocks and the pattern of `num_layers` layers; mac attends within segments as `attention` does in its window."""
    if variant == "mal":
        blocks = {
            "memory": Block(mixer=memory, channel=NoChannelMixer()),
            "window": Block(mixer=attention, channel=channel_mixer),
        }
        return blocks, f"(memory window)*{num_layers}"
    mixer = {
        "lmm": memory,
        "mac": MemoryAsContext(
            memory=memory,
            block_size=block_size,
            num_persistent_tokens=attention.num_persistent_tokens,
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            rope_theta=attention.rope_theta,
        ),
        "mag": MemoryAsGate(attention=attention, memory=memory),
    }[variant]
    return {variant: Block(mixer=mixer, channel=channel_mixer)}, f"{variant}*{num_layers}"


def neural_memory_variants(memory: NeuralMemory) -> dict[str, NeuralMemory]:
    """A neural memory, its ablations and controls, and its relatives, at the same heads and chunk.

    TTT (Sun et al. 2024, arXiv 2407.04620, section 2): neither momentum nor forgetting, the mean over the chunk so far;
    its learned biases of the memory and of the mean's weights are left out. LaCT (Zhang et al. 2025, arXiv 2505.23884,
    section 3): reads before it writes, gradients of a dot product, every row back to its norm after a chunk; its chunks
    are of 2048 tokens and stand beside a window. `random features` and `last layer only` tell what depth is worth.
    """
    learner = memory.inner_optimizer
    ttt = replace(learner, momentum=False, gradient_reduction="mean")

    def learns(forget: bool = memory.forget, **choices: object) -> NeuralMemory:
        return replace(memory, inner_optimizer=replace(learner, **choices), forget=forget)

    return {
        "lmm": memory,
        "no momentum": learns(momentum=False),
        "no forgetting": learns(forget=False),
        "linear": learns(network=LinearNet()),
        "exact linear": learns(network=LinearNet(), gradient="token"),
        "last layer only": learns(trainable_weights=tuple(learner.trainable_shapes(1))[-1:]),
        "random features": learns(network=RandomFeatureNet()),
        "TTT-Linear": replace(memory, inner_optimizer=replace(ttt, network=MLPNet(depth=1)), forget=False),
        "TTT-MLP": replace(memory, inner_optimizer=replace(ttt, network=MLPNet(depth=2)), forget=False),
        "LaCT": learns(network=SwiGLUNet(), loss="dot", readout="chunk_start", boundary="weight_norm", forget=False),
        "LaCT with Muon": learns(network=SwiGLUNet(), loss="dot", readout="chunk_start", boundary="muon", forget=False),
    }
