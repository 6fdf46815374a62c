"""How much more of MQAR's standard mixture does BASED recall if it reads the pairs twice, ahead and then in order?

Width 64, the state of `mqar_based`: prefix linear attention over the pairs, and JRT's masked loss on them with weight
.25. Other blocks that `--model.pattern` can name: `once` is BASED, which reads them once. Expected: above
`mqar_based` (Just Read Twice, arXiv 2407.05483, has no MQAR at this size). Cost: minutes on one H100.

    recallax train mqar_jrt_rnn
    recallax train mqar_jrt_rnn --model.pattern "conv once"
"""

from dataclasses import replace

from recallax.configs.mqar_based import standard, standard_tiny
from recallax.layers import Based, Identity, Prefix
from recallax.models import Block, LMConfig
from recallax.models.zoology import zoology
from recallax.tasks import MaskedPrefix
from recallax.tasks.masked_prefix import loss_weights
from recallax.train.run import RunConfig


def masked(config: RunConfig, mask_id: int | None = None) -> RunConfig:
    """The run with the prefix masked and JRT's loss, as the published code weighs it."""
    task = MaskedPrefix(task=config.task, mask_id=mask_id)
    return replace(config, task=task, train=replace(config.train, loss_weights=loss_weights("code")))


def _model(memory: Based, width: int) -> LMConfig:
    config = zoology(Prefix(memory=memory), width)
    return replace(config, blocks=config.blocks | {"once": Block(mixer=memory, channel=Identity())})


def get_config() -> RunConfig:
    return masked(standard(_model(Based(feature_dim=16), 64)))


def get_tiny() -> RunConfig:
    return masked(standard_tiny(_model(Based(feature_dim=4, heads=2), 16)))
