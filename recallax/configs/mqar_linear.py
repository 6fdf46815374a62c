"""How much of MQAR's standard mixture does plain linear attention (elu + 1) recall?

Width 64. Expected: less than BASED at equal bytes of state; no published number for this width.
Cost: minutes on one H100.

    recallax train mqar_linear
"""

from recallax.layers import LinearAttention
from recallax.models.zoology import zoology
from recallax.tasks import MQAR, Segment
from recallax.train.run import AdamW, Evaluate, RunConfig, Train, tiny


def get_config() -> RunConfig:
    return RunConfig(
        task=MQAR(filler="zoology"),
        model=zoology(LinearAttention(feature_map="elu"), 64),
        optim=AdamW(lr=3e-3),
        train=Train(steps=22_600, batch_size=256, save_every=2000),
        evaluate=Evaluate(every=1000, batches=28, batch_size=32),
    )


def get_tiny() -> RunConfig:
    slices = (Segment(length=16, pairs=2), Segment(length=24, pairs=4))
    task = MQAR(vocab_size=32, mixture=slices, test_mixture=slices, filler="zoology")
    return tiny(get_config(), task=task, model=zoology(LinearAttention(feature_map="elu", heads=2, feature_dim=4), 16))
