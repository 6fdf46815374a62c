"""Does a causal model with a small state depend on which of two sets comes first?

And does it help to read twice, at the same state? Sets of 4 and 16 out of 60 ids, both orders in training. BASED with
d' = 2 and 4, and with d' = 2 also on rows that repeat the sets (JRT-Prompt) and with prefix linear attention over them
(JRT-RNN); as control, d' = 8 with every token seeing the whole row. Stages: three learning rates with one seed, then
the best on valid with two others.
"""

from experiments.set_disjointness.noncausal import NonCausalBased
from experiments.train_cell import SweepStage, lr_grid_then_seeds
from recallax.layers import BaseConv, Based, MixerConfig, PrefixLinear, SwiGLU
from recallax.models import Block, LMConfig
from recallax.tasks import JRTPrompt, SetDisjointness
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train

RATES = (2e-3, 4e-3, 8e-3)
SMALL_BASED = Based(feature_dim=2, num_heads=2)
MIXERS: dict[str, MixerConfig] = {
    "causal 2": SMALL_BASED,
    "causal 4": Based(feature_dim=4, num_heads=2),
    "prompt 2": SMALL_BASED,
    "prefix 2": PrefixLinear(memory=SMALL_BASED),
    "control 8": NonCausalBased(feature_dim=8, num_heads=2),
}


def config(name: str, rate: float, seed: int) -> RunConfig:
    blocks = {
        "conv": Block(mixer=BaseConv(conv_size=3), channel=SwiGLU(expand=2.0)),
        "mixer": Block(mixer=MIXERS[name], channel=SwiGLU(expand=2.0)),
    }
    task = SetDisjointness(vocab_size=64, set_sizes=((4, 16),), test_set_sizes=((4, 16),))
    return RunConfig(
        task=JRTPrompt(task=task) if name.startswith("prompt") else task,
        model=LMConfig(d_model=48, pattern="(conv mixer)*2", blocks=blocks),
        optim=AdamW(lr=rate),
        train=Train(steps=3000, batch_size=64, seed=seed, data_seed=seed),
        evaluate=Evaluate(batches=32),
    )


STAGES: tuple[SweepStage, ...] = lr_grid_then_seeds(MIXERS, RATES, config)
