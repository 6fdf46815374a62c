"""JRT-RNN-360M at its published size, on MQAR at the size of language-model pretraining.

Question: what does the model cost, and does it train? 26 layers, width 1024, 356.6M parameters; shape, prefix of up to
1024 tokens, mask id and loss weights of the paper (arXiv 2407.05483). Expected: no published result on this task; tests
check the counts of `recallax show`. Cost: hours on one H100.

    recallax show jrt_rnn_360m
"""

from dataclasses import replace

from recallax.configs.based_360m import mqar_at_pretraining_size, mqar_at_pretraining_size_tiny, tiny_based_blocks
from recallax.configs.mqar_jrt_rnn import with_masked_prefix
from recallax.layers import Based, PrefixLinear
from recallax.models import LMConfig
from recallax.models.jrt_rnn_lm import MASK_TOKEN_ID, jrt_rnn_360m
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return with_masked_prefix(mqar_at_pretraining_size(jrt_rnn_360m()), MASK_TOKEN_ID)


def get_tiny() -> RunConfig:
    blocks = tiny_based_blocks()
    prefix = replace(blocks["based"], mixer=PrefixLinear(memory=Based(feature_dim=4, num_heads=2)))
    model = LMConfig(
        d_model=16, pattern="conv based window", blocks=blocks | {"based": prefix}, compute_dtype="bfloat16"
    )
    return with_masked_prefix(mqar_at_pretraining_size_tiny(get_config(), model))
