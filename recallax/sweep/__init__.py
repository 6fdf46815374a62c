"""Sweeps: many runs from one Python file, trained in processes of this machine, on Ray or on SLURM.

A sweep file has `STAGES`, a list of functions from the rows so far to trials:

```python
def grid(rows: list[ResultRow]) -> list[Trial]:
    return [Trial({"lr": lr}, config(lr)) for lr in (1e-3, 3e-3, 1e-2)]


STAGES = [grid]
```

`recallax sweep FILE` calls `run_sweep`, which trains each trial in its own run folder and collects one row per run in
`results.jsonl`.
"""

from recallax.sweep.backends.backend import Backend
from recallax.sweep.backends.factory import BackendName, ResourceOptions, make_backend
from recallax.sweep.backends.local import LocalBackend
from recallax.sweep.learning_rates import refine_learning_rates
from recallax.sweep.results import encode_row, read_results, result_row, write_results
from recallax.sweep.runner import run_sweep
from recallax.sweep.sweep_file import load_stages
from recallax.sweep.trial import ResultRow, SweepStage, Trial

__all__ = [
    "Backend",
    "BackendName",
    "LocalBackend",
    "ResourceOptions",
    "ResultRow",
    "SweepStage",
    "Trial",
    "encode_row",
    "load_stages",
    "make_backend",
    "read_results",
    "refine_learning_rates",
    "result_row",
    "run_sweep",
    "write_results",
]
