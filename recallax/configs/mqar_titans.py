"""Titans, with memory as a context, as a gate and as a layer, on the standard mixture of MQAR.

Question: how much does each combination of memory and attention recall? Width 64, two layers, after a short
convolution; memory as a context has three query sources. Attention covers blocks and windows of 16 tokens, so that the
memory must store the rest. Expected: no published result (the paper has no MQAR). Cost: minutes on one H100.

    recallax train mqar_titans
    recallax train mqar_titans --model.pattern "conv mac_previous"       or mac_learned, mag, "memory window"
"""

from dataclasses import replace

from recallax.configs import mqar_neural_memory
from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import Identity, MemoryAsContext, MixerConfig, NeuralMemory, SlidingWindow
from recallax.models import Block, LMConfig
from recallax.models.titans_lm import titans_blocks
from recallax.models.zoology_lm import zoology
from recallax.pallas_kernels.neural_memory.inner_optimizer import InnerOptimizer, LinearNet
from recallax.train.run_config import RunConfig


def titans_variants(
    memory: MixerConfig, window: SlidingWindow, block_size: int, num_retrieved_tokens: int, d_model: int
) -> LMConfig:
    """Return the model `conv mac`, with a block for each other combination of memory and attention.

    Args:
        memory: The neural memory.
        window: The attention of the gate and of the layer.
        block_size: Tokens of a block of the memory as a context.
        num_retrieved_tokens: Tokens that the memory adds to the context of a block.
        d_model: Width of the model.
    """
    blocks = {}
    for join in ("mac", "mag", "mal"):
        blocks |= titans_blocks(join, memory, window, Identity(), 1, block_size)[0]
    mac = blocks["mac"].mixer
    assert isinstance(mac, MemoryAsContext)
    query_sources = {
        "mac_previous": replace(mac, query_source="previous", num_retrieved_tokens=num_retrieved_tokens),
        "mac_learned": replace(mac, query_source="learned", num_retrieved_tokens=num_retrieved_tokens),
    }
    blocks |= {name: Block(mixer=mixer, channel=Identity()) for name, mixer in query_sources.items()}
    model = zoology(memory, d_model)
    return replace(model, pattern="conv mac", blocks={"conv": model.blocks["conv"]} | blocks)


def get_config() -> RunConfig:
    memory = mqar_neural_memory.get_config().model.blocks["mixer"].mixer
    return mqar_standard(
        titans_variants(
            memory, SlidingWindow(window=16, num_persistent_tokens=4), block_size=16, num_retrieved_tokens=8, d_model=64
        )
    )


def get_tiny() -> RunConfig:
    window = SlidingWindow(window=5, num_heads=2, num_persistent_tokens=3)
    memory = NeuralMemory(num_heads=2, inner_optimizer=InnerOptimizer(network=LinearNet(), chunk_size=2))
    model = titans_variants(memory, window, block_size=4, num_retrieved_tokens=2, d_model=16)
    return mqar_standard_tiny(model)
