"""One trained config of a sweep, and the row it leaves; what the questions' sweeps have in common."""

from collections.abc import Callable, Iterable

from recallax.config import ConfigError, fingerprint
from recallax.models import LMConfig, accounting
from recallax.train.log import commit, environment
from recallax.train.program import Program
from recallax.train.run import RunConfig
from recallax.train.sweep import Cell, Row, Stage


def measure(cell: Cell) -> Row:
    """Train a cell from scratch, without a folder or checkpoints, and evaluate it on valid and test."""
    import time

    begin = time.monotonic()
    if cell.config.curriculum is not None:
        raise ConfigError("a cell of experiments/ trains without stages; `recallax sweep` takes a curriculum")
    config, program = cell.config, Program(cell.config)
    state = program.initial()
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
        "parameters": accounting.parameters(config.model, vocab),
        "state_bytes": _state_bytes(config.model, context, vocab),
        **(cell.probe(program, state) if cell.probe else {}),
        "seconds": round(time.monotonic() - begin, 1),
        **{name: host[name] for name in ("device", "cpus", "jax")},
        "commit": commit(),
    }


def _state_bytes(model: LMConfig, context: int, vocab: int) -> int | None:
    """None for a model that has no state to speak of, such as a non-causal control."""
    try:
        return accounting.state_bytes(model, context, vocab)
    except TypeError:
        return None


def best(rows: list[Row], stage: str, **labels: str | int | float) -> Row:
    """The row of a stage with these labels whose accuracy on the valid split is highest."""
    found = [r for r in rows if r["stage"] == stage and all(r[k] == v for k, v in labels.items())]
    if not found:
        raise ValueError(f"no row of stage {stage!r} has {labels}; run the sweep first")
    return max(found, key=lambda r: r["valid"]["accuracy"])


def rates_then_seeds(
    names: Iterable[str],
    rates: Iterable[float],
    config: Callable[[str, float, int], RunConfig],
    others: tuple[int, ...] = (1, 2),
) -> tuple[Stage, Stage]:
    """Two stages: every mixer at every rate with seed 0, then the rate that is best on valid with the other seeds."""

    def grid(rows: list[Row]) -> list[Cell]:
        return [_cell("grid", name, rate, 0, config) for name in names for rate in rates]

    def seeds(rows: list[Row]) -> list[Cell]:
        return at_best_rate("seeds", names, config, rows, others)

    return grid, seeds


def at_best_rate(
    stage: str,
    names: Iterable[str],
    config: Callable[[str, float, int], RunConfig],
    rows: list[Row],
    others: tuple[int, ...] = (1, 2),
) -> list[Cell]:
    """Other seeds of each mixer, at the rate that its grid found best on valid."""
    chosen = {name: best(rows, "grid", mixer=name)["lr"] for name in names}
    return [_cell(stage, name, rate, seed, config) for name, rate in chosen.items() for seed in others]


def _cell(stage: str, name: str, rate: float, seed: int, config: Callable[[str, float, int], RunConfig]) -> Cell:
    return Cell({"stage": stage, "mixer": name, "lr": rate, "seed": seed}, config(name, rate, seed))
