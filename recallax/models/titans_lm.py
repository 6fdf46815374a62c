"""Titans' language models at their published sizes (Behrouz et al. 2025, arXiv 2501.00663; sizes from the NeurIPS
version, table 5), in a Llama-like block: RMSNorm, SwiGLU, rotary positions in the attention.

    titans_170m    12 layers of width 768, 16 heads         titans_760m    24 of 1536, 16 heads
    titans_340m    24 of 1024, 16 heads                     titans_1b3     18 of 2048, 8 heads

(The 400M model of the result tables has no published shape.) Variants that combine memory and attention:

    lmm    the memory alone
    mac    memory as context: attention within blocks of 512 tokens and the memory's outputs for these tokens
    mag    memory as gate: window attention and the memory in parallel, multiplied
    mal    memory as layer: a layer of memory, then a layer of window attention, then SwiGLU

Millions of parameters, with tied embeddings of 32,000 ids: lmm 122.3, 378.4, 822.4, 1129.7; mac 150.7, 479.1, 1049.0,
1431.7; mag and mal 151.9, 482.3, 1053.7, 1436.4. The published names agree best with the memory alone.

The memory is one network x + LN(W_2 gelu(W_1 x)) per head, with a hidden width of 4 times the head's, chunks of 16
tokens, gates per matrix, and convolutions of width 4. The paper's equations have a single memory of the whole width,
which would need 67 MB per layer and sequence at width 1024; its table lists heads, so there is one memory per head
here. The window is 2048 tokens. Attention and memory have 128 persistent tokens each; the memory reads its own before
a document starts. (In mac, where the memory reads the attention's output, only the attention has them.)
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
"""Number of layers, width, and number of heads by size."""
WINDOW, BLOCK_SIZE, NUM_PERSISTENT_TOKENS = 2048, 512, 128
"""Window of mag and mal, block of mac, and persistent tokens, in tokens."""

type TitansVariant = Literal["lmm", "mac", "mag", "mal"]


def titans(size: Literal["170m", "340m", "760m", "1b3"], variant: TitansVariant) -> LMConfig:
    """Return a published model.

    Args:
        size: The published size.
        variant: The combination of memory and attention.

    Returns:
        The model config.
    """
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
    """Build the blocks and the pattern of a variant.

    Args:
        variant: The combination of memory and attention.
        memory: The memory.
        attention: The window attention; mac uses its heads within blocks.
        channel_mixer: The channel mixer.
        num_layers: The number of layers; mal has two blocks per layer.
        block_size: Tokens of a block of mac.

    Returns:
        Blocks by name, and the pattern.
    """
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
    """Return a neural memory, its ablations and controls, and related methods, with the same heads and chunk size.

    TTT (Sun et al. 2024, arXiv 2407.04620, section 2) has no momentum and no forgetting, and averages the gradients of
    the chunk so far; its learned biases of the memory and of the averages are left out. LaCT (Zhang et al. 2025, arXiv
    2505.23884, section 3) reads before it writes, has gradients of a dot product, and renormalises every row after a
    chunk; its chunks have 2048 tokens and are beside a window. `random_features` and `last_layer_only` are controls for
    the depth of the network.

    Args:
        memory: The neural memory.

    Returns:
        Configs by name.
    """
    optimizer = memory.inner_optimizer
    ttt = replace(optimizer, momentum=False, gradient_reduction="mean")

    def variant(forget: bool = memory.forget, **changes: object) -> NeuralMemory:
        return replace(memory, inner_optimizer=replace(optimizer, **changes), forget=forget)

    return {
        "lmm": memory,
        "no_momentum": variant(momentum=False),
        "no_forgetting": variant(forget=False),
        "linear": variant(network=LinearNet()),
        "linear_sequential": variant(network=LinearNet(), gradient="token"),
        "last_layer_only": variant(trainable_weights=tuple(optimizer.trainable_shapes(1))[-1:]),
        "random_features": variant(network=RandomFeatureNet()),
        "ttt_linear": replace(memory, inner_optimizer=replace(ttt, network=MLPNet(depth=1)), forget=False),
        "ttt_mlp": replace(memory, inner_optimizer=replace(ttt, network=MLPNet(depth=2)), forget=False),
        "lact": variant(network=SwiGLUNet(), loss="dot", readout="chunk_start", boundary="weight_norm", forget=False),
        "lact_muon": variant(network=SwiGLUNet(), loss="dot", readout="chunk_start", boundary="muon", forget=False),
    }
