"""The neural memory of Titans on the standard mixture of MQAR.

Question: how much does it recall? The memory is a two-layer network per head that is trained by gradient descent with
momentum while it reads. Width 64, after a short convolution. Expected: no published result (the paper has no MQAR).
Cost: minutes on one H100.

    recallax train mqar_neural_memory
    recallax train mqar_neural_memory --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import NeuralMemory
from recallax.models.zoology_lm import with_attention_blocks, zoology
from recallax.pallas_kernels.neural_memory.inner_optimizer import InnerOptimizer, MLPNet
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_standard(
        with_attention_blocks(
            zoology(NeuralMemory(num_heads=1, inner_optimizer=InnerOptimizer(network=MLPNet(expansion=2))), 64)
        )
    )


def get_tiny() -> RunConfig:
    mixer = NeuralMemory(
        num_heads=2,
        inner_optimizer=InnerOptimizer(network=MLPNet(expansion=2), chunk_size=2, reset_interval=6),
        num_persistent_tokens=4,
    )
    return mqar_standard_tiny(with_attention_blocks(zoology(mixer, 16), window=5))
