"""Does LongMamba extend a state-space model trained on 32 tokens to 2, 4, 8 and 16 times that length?

Two layers of width 32 on induction heads (8 symbols: one token to remember among noise) and on MQAR with two pairs and
queries at uniform positions. Every trained model is evaluated at each length without filters, and with filters that are
calibrated for that length, with the thresholds that the paper uses for Mamba-2 and for Mamba.
"""

from dataclasses import replace

from recallax.layers import DiagonalSSM, Mamba2, MixerConfig, NoChannelMixer
from recallax.models import Block, LMConfig
from recallax.sweep import ResultRow, SweepStage, Trial
from recallax.tasks import MQAR, InductionHeads, MixtureSlice, Task
from recallax.train.calibration import CalibrationOptions, calibrate
from recallax.train.program import Program
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train
from recallax.train.step import TrainState

LENGTH = 32
LENGTH_FACTORS = (1, 2, 4, 8, 16)
KEPT_FRACTIONS = (0.05, 1e-30)
MIXERS: dict[str, MixerConfig] = {
    "Mamba-2": Mamba2(state_dim=16, head_dim=16),
    "diagonal SSM": DiagonalSSM(max_timescale=float(LENGTH)),
}
TASK_SETTINGS = {"induction": (tuple(MIXERS), 4e-3, 400), "two pairs": (("Mamba-2",), 8e-3, 700)}
"""Mixers, learning rate and steps of each task."""


def make_task(name: str, length: int) -> Task:
    """Make a task with one length in all splits.

    Args:
        name: A key of `TASK_SETTINGS`.
        length: Row length in tokens.

    Returns:
        The task.
    """
    if name == "induction":
        return InductionHeads(num_symbols=8, length=length, test_lengths=(length,))
    slices = (MixtureSlice(length=length, num_kv_pairs=2),)
    return MQAR(vocab_size=32, mixture=slices, test_mixture=slices, power_a=1.0)


def accuracy_by_length(program: Program, state: TrainState) -> ResultRow:
    """Measure test accuracy at every length, without filters (`plain`) and at each kept fraction."""
    config, accuracy = program.config, {}
    name = "induction" if isinstance(config.task, InductionHeads) else "two pairs"
    for factor in LENGTH_FACTORS:
        length = factor * LENGTH
        longer = replace(config, task=make_task(name, length))
        row = {"plain": Program(longer).evaluate(state, "test")["accuracy"]}
        evaluator: Program | None = None
        for fraction in KEPT_FRACTIONS:
            long, filtered, _ = calibrate(
                program, state, CalibrationOptions(context_length=length, min_retention=fraction)
            )
            evaluator = evaluator or Program(replace(longer, model=long.config.model))
            row[f"{fraction:g}"] = evaluator.evaluate(filtered, "test")["accuracy"]
        accuracy[str(factor)] = row
    return {"lengths": accuracy}


def all_trials(rows: list[ResultRow]) -> list[Trial]:
    """Return every task, mixer and seed."""
    return [
        Trial(
            {"stage": "read", "task": name, "mixer": mixer, "lr": rate, "seed": seed},
            RunConfig(
                task=make_task(name, LENGTH),
                model=LMConfig(
                    d_model=32, pattern="m*2", blocks={"m": Block(mixer=MIXERS[mixer], channel=NoChannelMixer())}
                ),
                optim=AdamW(lr=rate),
                train=Train(steps=steps, batch_size=64, seed=seed, data_seed=seed),
                evaluate=Evaluate(batches=8),
            ),
            accuracy_by_length,
        )
        for name, (mixers, rate, steps) in TASK_SETTINGS.items()
        for mixer in mixers
        for seed in (0, 1)
    ]


STAGES: tuple[SweepStage, ...] = (all_trials,)
