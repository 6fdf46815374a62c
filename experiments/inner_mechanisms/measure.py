"""Measure every mechanism: `python -m experiments.inner_mechanisms.measure` rewrites results.jsonl.

No model is trained here, so no part uses `recallax.train`: the gradient descent that is measured happens inside
`neural_memory`, while it reads a sequence, and `learned_gates` fits nine gate logits to that.
"""

import time
from pathlib import Path

from experiments.inner_mechanisms import decay, depth, learned_gates, momentum
from recallax.sweep import write_results
from recallax.train.log import git_commit

FOLDER = Path(__file__).parent
MECHANISMS = (decay, momentum, learned_gates, depth)


def main() -> None:
    """Run all measurements, a few minutes on one CPU core."""
    rows = []
    for mechanism in MECHANISMS:
        start = time.monotonic()
        measured = mechanism.measure()
        rows += [row | {"commit": git_commit()} for row in measured]
        print(*measured, f"{time.monotonic() - start:.0f} s", sep="\n", flush=True)
    write_results(rows, FOLDER)


if __name__ == "__main__":
    main()
