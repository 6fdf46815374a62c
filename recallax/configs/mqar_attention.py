"""Does softmax attention solve MQAR's standard mixture?

Width 64. Expected: mean test accuracy 1.00 over the seven slices (BASED, arXiv 2402.18668, figure 2).
Cost: minutes on one H100.

    recallax train mqar_attention
"""

from recallax.layers import Attention
from recallax.models.zoology import zoology
from recallax.tasks import MQAR, Segment
from recallax.train.run import AdamW, Evaluate, RunConfig, Train, tiny


def get_config() -> RunConfig:
    return RunConfig(
        task=MQAR(filler="zoology"),
        model=zoology(Attention(rotary_base=None), 64),
        optim=AdamW(lr=3e-3),
        train=Train(steps=22_600, batch_size=256, save_every=2000),
        evaluate=Evaluate(every=1000, batches=28, batch_size=32),
    )


def get_tiny() -> RunConfig:
    slices = (Segment(length=16, pairs=2), Segment(length=24, pairs=4))
    task = MQAR(vocab_size=32, mixture=slices, test_mixture=slices, filler="zoology")
    return tiny(get_config(), task=task, model=zoology(Attention(heads=2, kv_heads=1), 16))
