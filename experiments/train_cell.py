"""One trained config of a sweep, and the row it leaves; what the questions' sweeps have in common."""

from collections.abc import Callable, Iterable

from recallax.config import ConfigError, fingerprint
from recallax.models import LMConfig, accounting
from recallax.sweep.runner import ResultRow, SweepStage, Trial
from recallax.train.log import environment, git_commit
from recallax.train.program import Program
from recallax.train.run_config import RunConfig


def train_and_evaluate(cell: Trial) -> ResultRow:
    """Train a cell from scratch, without a folder or checkpoints, and evaluate it on valid and test."""
    import time

    begin = time.monotonic()
    if cell.config.curriculum is not None:
        raise ConfigError("a cell of experiments/ trains without stages; `recallax sweep` takes a curriculum")
    config, program = cell.config, Program(cell.config)
    state = program.init_state()
    for index in range(config.train.steps):
        state, _ = program.step(state, program.batch(index))
    vocab, context = config.task.vocab_size, max(config.task.lengths("test"))
    host = environment()
    return {
        **cell.labels,
        "config": fingerprint(config),
        "valid": program.evaluate(state, "valid"),
        "test": program.evaluate(state, "test"),
        "skipped": int(state.skipped),
        "chance": config.task.chance(),
        "parameters": accounting.count_parameters(config.model, vocab),
        "state_bytes": _state_bytes(config.model, context, vocab),
        **(cell.extra_metrics(program, state) if cell.extra_metrics else {}),
        "seconds": round(time.monotonic() - begin, 1),
        **{name: host[name] for name in ("device", "cpus", "jax")},
        "commit": git_commit(),
    }


def _state_bytes(model: LMConfig, context: int, vocab: int) -> int | None:
    """None for a model that has no state to speak of, such as a non-causal control."""
    try:
        return accounting.state_bytes(model, context, vocab)
    except TypeError:
        return None


def best_row(rows: list[ResultRow], stage: str, **labels: str | int | float) -> ResultRow:
    """The row of a stage with these labels whose accuracy on the valid split is highest."""
    found = [r for r in rows if r["stage"] == stage and all(r[k] == v for k, v in labels.items())]
    if not found:
        raise ValueError(f"no row of stage {stage!r} has {labels}; run the sweep first")
    return max(found, key=lambda r: r["valid"]["accuracy"])


def lr_grid_then_seeds(
    names: Iterable[str],
    learning_rates: Iterable[float],
    config: Callable[[str, float, int], RunConfig],
    other_seeds: tuple[int, ...] = (1, 2),
) -> tuple[SweepStage, SweepStage]:
    """Two stages: every mixer at every rate with seed 0, then the rate that is best on valid with the other seeds."""

    def grid(rows: list[ResultRow]) -> list[Trial]:
        return [_cell("grid", name, rate, 0, config) for name in names for rate in learning_rates]

    def seeds(rows: list[ResultRow]) -> list[Trial]:
        return seeds_at_best_lr("seeds", names, config, rows, other_seeds)

    return grid, seeds


def seeds_at_best_lr(
    stage: str,
    names: Iterable[str],
    config: Callable[[str, float, int], RunConfig],
    rows: list[ResultRow],
    other_seeds: tuple[int, ...] = (1, 2),
) -> list[Trial]:
    """Other seeds of each mixer, at the rate that its grid found best on valid."""
    chosen = {name: best_row(rows, "grid", mixer=name)["lr"] for name in names}
    return [_cell(stage, name, rate, seed, config) for name, rate in chosen.items() for seed in other_seeds]


def _cell(stage: str, name: str, rate: float, seed: int, config: Callable[[str, float, int], RunConfig]) -> Trial:
    return Trial({"stage": stage, "mixer": name, "lr": rate, "seed": seed}, config(name, rate, seed))
