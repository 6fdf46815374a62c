"""The neural memory of Titans on recall of overwritten values.

Question: does it recall the last value of every key while the number of older values grows? 16 keys, written 64 times
among noise in 512 tokens; tested at 1, 2 and 4 times the length with as many times the writes. Width 64, after a short
convolution. Expected: no published result. `experiments/overwrites` compares a small version with other memories.
Cost: minutes on one H100.

    recallax train overwrites_neural_memory
    recallax train overwrites_neural_memory --model.pattern "conv attention"      attention
"""

from recallax.configs import mqar_neural_memory
from recallax.tasks import OverwriteRecall
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train, tiny_run


def get_config() -> RunConfig:
    return RunConfig(
        task=OverwriteRecall(),
        model=mqar_neural_memory.get_config().model,
        optim=AdamW(lr=3e-3),
        train=Train(steps=10_000, batch_size=64),
        evaluate=Evaluate(batches=12, batch_size=32),
    )


def get_tiny() -> RunConfig:
    task = OverwriteRecall.length_extrapolation(
        length=24, num_keys=2, num_writes=6, length_factors=(1, 2), vocab_size=32, noise_vocab_size=8
    )
    return tiny_run(get_config(), task=task, model=mqar_neural_memory.get_tiny().model)
