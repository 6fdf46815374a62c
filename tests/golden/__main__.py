"""Record the first training steps of the tiny form of every config: `python -m tests.golden [CONFIG...]`.

Run it only if a change is meant to alter the results in `first_step.json`, and state the reason in the commit message.
"""

import importlib
import json
import sys
from pathlib import Path

import jax
import optax

from recallax.cli.config_files import config_names
from recallax.train.program import Program
from recallax.train.run_config import RunConfig

FILE = Path(__file__).with_name("first_step.json")
REWRITE = "python -m tests.golden"


def tiny_config(name: str) -> RunConfig:
    return importlib.import_module(f"recallax.configs.{name}").get_tiny()


def tolerance(name: str) -> float:
    """Return the relative tolerance. In bfloat16 the order of a sum changes the fifth digit."""
    return 1e-5 if tiny_config(name).model.compute_dtype == "float32" else 2e-4


def first_step(name: str) -> dict[str, float]:
    """Return loss, accuracy and gradient norm of the first step, and the parameter norm after the first two steps.

    The warm-up starts from a learning rate of 0, so only the second step changes the parameters.
    """
    jax.config.update("jax_disable_most_optimizations", True)  # XLA optimizations take longer than they save here
    program = Program(tiny_config(name))
    state = program.init_state()
    state, report = program.step(state, program.batch(0))
    norm = float(optax.tree.norm(state.params))
    state, _ = program.step(state, program.batch(1))
    report = jax.device_get(report)
    return {
        "loss": float(report.loss),
        "accuracy": float(report.accuracy.total / report.accuracy.weight),
        "gradient_norm": float(report.gradient_norm),
        "parameter_norm": norm,
        "parameter_norm_after_two": float(optax.tree.norm(state.params)),
    }


if __name__ == "__main__":
    recorded = json.loads(FILE.read_text())
    rows = {config: recorded[config] for config in config_names() if config in recorded}
    for config in sys.argv[1:] or config_names():
        rows[config] = first_step(config)
        print(config, rows[config], flush=True)
    FILE.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
