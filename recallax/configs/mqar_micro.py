"""How does BASED do at the smallest MQAR that still separates mixers?

Vocabulary 64, length 32, 4 and 8 pairs, d 32: the size of the learning-rate grids in `experiments/recall_frontier`.
Expected: accuracy above .95 at the rate chosen there. Cost: about 20 seconds on two CPU cores.

    recallax train mqar_micro
"""

import dataclasses

from recallax.layers import BaseConv, Based, Identity
from recallax.models import Block, LMConfig
from recallax.tasks import MQAR
from recallax.tasks.mqar import Segment
from recallax.train.run import AdamW, Evaluate, RunConfig, Train

SLICES = (Segment(length=32, pairs=4), Segment(length=32, pairs=8))


def get_config() -> RunConfig:
    return RunConfig(
        task=MQAR(vocab_size=64, mixture=SLICES, test_mixture=SLICES),
        model=LMConfig(
            d_model=32,
            pattern="conv based",
            blocks={
                "conv": Block(mixer=BaseConv(width=3), channel=Identity()),
                "based": Block(mixer=Based(feature_dim=8), channel=Identity()),
            },
        ),
        optim=AdamW(lr=1e-2),
        train=Train(steps=2000, batch_size=64),
        evaluate=Evaluate(every=500, batches=16),
    )


def get_tiny() -> RunConfig:
    config = get_config()
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=4, batch_size=8, log_every=2, save_every=2),
        evaluate=Evaluate(every=2, batches=2, batch_size=4),
    )
