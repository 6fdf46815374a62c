"""JRT-RNN, which reads the key-value pairs twice, on the standard mixture of MQAR.

Question: how much more than BASED does it recall? Width 64, the state of `mqar_based`: prefix linear attention over the
pairs, and JRT's masked loss on them with weight 0.25. The block `once` is BASED, which reads them once. Expected: above
`mqar_based` (Just Read Twice, arXiv 2407.05483, has no MQAR at this size). Cost: minutes on one H100.

    recallax train mqar_jrt_rnn
    recallax train mqar_jrt_rnn --model.pattern "conv once"
"""

from dataclasses import replace

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import Based, Identity, PrefixLinear
from recallax.models import Block, LMConfig
from recallax.models.zoology_lm import zoology
from recallax.tasks import MaskedPrefix
from recallax.tasks.masked_prefix import masked_prefix_loss_weights
from recallax.train.run_config import RunConfig


def with_masked_prefix(config: RunConfig, mask_id: int | None = None) -> RunConfig:
    """Return the run with a masked prefix and JRT's loss, with the weights of the published code.

    Args:
        config: The run.
        mask_id: Token id of the mask. None: an id after those of the task.
    """
    task = MaskedPrefix(task=config.task, mask_token_id=mask_id)
    return replace(config, task=task, train=replace(config.train, loss_weights=masked_prefix_loss_weights("code")))


def _prefix_based_model(memory: Based, width: int) -> LMConfig:
    config = zoology(PrefixLinear(memory=memory), width)
    return replace(config, blocks=config.blocks | {"once": Block(mixer=memory, channel=Identity())})


def get_config() -> RunConfig:
    return with_masked_prefix(mqar_standard(_prefix_based_model(Based(feature_dim=16), 64)))


def get_tiny() -> RunConfig:
    return with_masked_prefix(mqar_standard_tiny(_prefix_based_model(Based(feature_dim=4, num_heads=2), 16)))
