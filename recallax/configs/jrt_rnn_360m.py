"""What does JRT-RNN-360M cost, and does it train at MQAR of language-model size?

26 layers, width 1024, 356.6M parameters; the published shape (arXiv 2407.05483), prefix of up to 1024 tokens, mask id
and loss weights. Expected: nothing published on this task; the counts of `recallax show` are tested. Cost: hours on one
H100.

    recallax show jrt_rnn_360m
"""

from dataclasses import replace

from recallax.configs.based_360m import language_model_size, tiny_blocks, tiny_stack
from recallax.configs.mqar_jrt_rnn import masked
from recallax.layers import Based, Prefix
from recallax.models import LMConfig
from recallax.models.jrt_rnn import MASK, jrt_rnn_360m
from recallax.train.run import RunConfig


def get_config() -> RunConfig:
    return masked(language_model_size(jrt_rnn_360m()), MASK)


def get_tiny() -> RunConfig:
    blocks = tiny_blocks()
    prefix = replace(blocks["based"], mixer=Prefix(memory=Based(feature_dim=4, heads=2)))
    model = LMConfig(d_model=16, pattern="conv based window", blocks=blocks | {"based": prefix}, compute="bfloat16")
    return masked(tiny_stack(get_config(), model))
