"""Does a causal model with a small state depend on the order of two sets, and does reading them twice help?

Sets of 4 and 16 out of 60 ids, both orders in training. BASED with d' = 2 and 4, and with d' = 2 also on rows that
repeat the sets (JRT-Prompt) and with prefix linear attention over them (JRT-RNN). The control is not causal and has d'
= 8. Stages: three learning rates with one seed, then the best on valid with two other seeds.
"""

from experiments.set_disjointness.noncausal import NonCausalBased
from experiments.sweep_stages import lr_grid_then_seeds
from recallax.layers import BaseConv, Based, MixerConfig, PrefixLinear, SwiGLU
from recallax.models import Block, LMConfig
from recallax.sweep import ResultRow, SweepStage, Trial
from recallax.tasks import JRTPrompt, SetDisjointness, Task
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


EARLIER_MIXERS: dict[str, MixerConfig] = {
    **{f"causal {width}": Based(feature_dim=width, num_heads=2) for width in (1, 2, 4)},
    **{f"control {width}": NonCausalBased(feature_dim=width, num_heads=2) for width in (2, 4)},
}
"""Mixers of `EARLIER_STAGES`."""


def make_task(sizes: tuple[int, int], vocab_size: int) -> SetDisjointness:
    """Make the task with one pair of set sizes in every split.

    Args:
        sizes: Sizes of the short and the long set.
        vocab_size: Number of token ids.

    Returns:
        The task.
    """
    return SetDisjointness(vocab_size=vocab_size, set_sizes=(sizes,), test_set_sizes=(sizes,))


def config(name: str, rate: float, seed: int) -> RunConfig:
    """Return the run of one of `MIXERS` at a learning rate."""
    task = make_task((4, 16), vocab_size=64)
    return _run(JRTPrompt(task=task) if name.startswith("prompt") else task, MIXERS[name], 3000, rate, seed)


def shorter_training(rows: list[ResultRow]) -> list[Trial]:
    """Return runs of 2500 steps, in which controls of d' = 2 and 4 fail (`unsolved_4_16.jsonl`)."""
    return _earlier_trials(make_task((4, 16), vocab_size=64))


def smaller_sets(rows: list[ResultRow]) -> list[Trial]:
    """Return runs on sets of 2 and 8, which are solved even at d' = 1 (`solved_2_8.jsonl`)."""
    return _earlier_trials(make_task((2, 8), vocab_size=32))


def _earlier_trials(task: Task) -> list[Trial]:
    return [
        Trial(
            {"stage": stage, "mixer": name, "lr": rate, "seed": seed},
            _run(task, mixer, 2500, rate, seed),
        )
        for name, mixer in EARLIER_MIXERS.items()
        for rate in RATES
        for stage, seed in (("grid", 0), ("seeds", 1), ("seeds", 2))
    ]


def _run(task: Task, mixer: MixerConfig, steps: int, rate: float, seed: int) -> RunConfig:
    blocks = {
        "conv": Block(mixer=BaseConv(conv_size=3), channel=SwiGLU(expand=2.0)),
        "mixer": Block(mixer=mixer, channel=SwiGLU(expand=2.0)),
    }
    return RunConfig(
        task=task,
        model=LMConfig(d_model=48, pattern="(conv mixer)*2", blocks=blocks),
        optim=AdamW(lr=rate),
        train=Train(steps=steps, batch_size=64, seed=seed, data_seed=seed),
        evaluate=Evaluate(batches=32),
    )


STAGES: tuple[SweepStage, ...] = lr_grid_then_seeds(MIXERS, RATES, config)
EARLIER_STAGES: tuple[SweepStage, ...] = (shorter_training, smaller_sets)
"""Stages whose rows are kept in files of their own and that the sweep no longer runs."""
