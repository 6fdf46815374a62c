"""Stages that several sweeps share: a grid of learning rates, then further seeds at the best rate."""

from collections.abc import Callable, Iterable

from experiments.results import best_row
from recallax.sweep import ResultRow, SweepStage, Trial
from recallax.train.run_config import RunConfig

type ConfigFactory = Callable[[str, float, int], RunConfig]
"""A run's config from the name of its mixer, its learning rate and its seed."""


def lr_grid_then_seeds(
    names: Iterable[str],
    learning_rates: Iterable[float],
    make_config: ConfigFactory,
    other_seeds: tuple[int, ...] = (1, 2),
) -> tuple[SweepStage, SweepStage]:
    """Make the two stages of most sweeps.

    Args:
        names: Names of the mixers that are compared.
        learning_rates: The grid, which every mixer is trained at with seed 0.
        make_config: See `ConfigFactory`.
        other_seeds: Seeds at the learning rate that is best on the valid split.

    Returns:
        The stages `grid` and `seeds`.
    """

    def grid(rows: list[ResultRow]) -> list[Trial]:
        return [_trial("grid", name, rate, 0, make_config) for name in names for rate in learning_rates]

    def seeds(rows: list[ResultRow]) -> list[Trial]:
        return seeds_at_best_lr("seeds", names, make_config, rows, other_seeds)

    return grid, seeds


def seeds_at_best_lr(
    stage: str,
    names: Iterable[str],
    make_config: ConfigFactory,
    rows: list[ResultRow],
    other_seeds: tuple[int, ...] = (1, 2),
) -> list[Trial]:
    """List trials of further seeds at each mixer's best learning rate.

    Args:
        stage: Name of the stage.
        names: Names of the mixers.
        make_config: See `ConfigFactory`.
        rows: Rows so far, with those of the stage `grid`.
        other_seeds: Seeds of the trials.

    Returns:
        A trial per mixer and seed.

    Raises:
        ValueError: A mixer has no row in the stage `grid`.
    """
    best = {name: best_row(rows, "grid", mixer=name)["lr"] for name in names}
    return [_trial(stage, name, rate, seed, make_config) for name, rate in best.items() for seed in other_seeds]


def _trial(stage: str, name: str, rate: float, seed: int, make_config: ConfigFactory) -> Trial:
    return Trial({"stage": stage, "mixer": name, "lr": rate, "seed": seed}, make_config(name, rate, seed))
