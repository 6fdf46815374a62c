"""Does reading the context twice raise recall when the state is too small?

`mqar_micro` (vocabulary 64, length 32, 4 and 8 pairs, width 32). BASED with d' = 2 and 4 is trained on rows with one
copy of the pairs, on rows with two copies (JRT-Prompt), and with prefix linear attention over the pairs (JRT-RNN); its
state has the same size in all three. Attention with one copy is the control. Stages: three learning rates with one
seed, then the best on valid with two other seeds.
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
    """Return the run of one of `MIXERS` at a learning rate."""
    run = mqar_micro_with_mixer(MIXERS[name], rate, seed)
    return replace(run, task=JRTPrompt(task=run.task)) if name.startswith("prompt") else run


STAGES: tuple[SweepStage, ...] = lr_grid_then_seeds(MIXERS, RATES, config)
