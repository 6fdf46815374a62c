"""How much of MQAR's standard mixture does Titans' neural memory recall?

A two-layer network per head that learns by gradient descent with momentum while it reads. Width 64, behind a short
convolution. Expected: no published number (the paper has no MQAR). Cost: minutes on one H100.

    recallax train mqar_neural_memory
    recallax train mqar_neural_memory --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import standard, standard_tiny
from recallax.layers import NeuralMemory
from recallax.models.zoology import with_attention, zoology
from recallax.pallas_kernels.neural_memory.learner import Learner, MLPNet
from recallax.train.run import RunConfig


def get_config() -> RunConfig:
    return standard(with_attention(zoology(NeuralMemory(heads=1, learner=Learner(network=MLPNet(expansion=2))), 64)))


def get_tiny() -> RunConfig:
    mixer = NeuralMemory(heads=2, learner=Learner(network=MLPNet(expansion=2), chunk=2, reset=6), persistent=4)
    return standard_tiny(with_attention(zoology(mixer, 16), window=5))
