"""Does a memory that is too small for MQAR recall more of it if the pairs are read twice?

`mqar_micro` (vocabulary 64, length 32, 4 and 8 pairs, width 32). BASED with d' = 2 and 4, whose state stays the same:
reading once, reading rows that repeat the pairs (JRT-Prompt, which is MQAR in two passes), and with prefix linear
attention over them (JRT-RNN). Attention, reading once, is the control. Stages: three learning rates with one seed, then
the best on valid with two others.
"""

from dataclasses import replace

from experiments.recall_frontier.sweep import mqar_micro_with_mixer
from experiments.sweep_stages import lr_grid_then_seeds
from recallax.layers import Attention, Based, MixerConfig, PrefixLinear
from recallax.sweep import SweepStage
from recallax.tasks import JRTPrompt
from recallax.train.run_config import RunConfig

RATES = (8e-3, 1.6e-2, 3.2e-2)
WIDTHS = (2, 4)
MIXERS: dict[str, MixerConfig] = {
    **{f"once {width}": Based(feature_dim=width) for width in WIDTHS},
    **{f"prompt {width}": Based(feature_dim=width) for width in WIDTHS},
    **{f"prefix {width}": PrefixLinear(memory=Based(feature_dim=width)) for width in WIDTHS},
    "attention": Attention(rope_theta=None),
}


def config(name: str, rate: float, seed: int) -> RunConfig:
    run = mqar_micro_with_mixer(MIXERS[name], rate, seed)
    return replace(run, task=JRTPrompt(task=run.task)) if name.startswith("prompt") else run


STAGES: tuple[SweepStage, ...] = lr_grid_then_seeds(MIXERS, RATES, config)
