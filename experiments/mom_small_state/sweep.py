"""Is MoM better than one memory of equal parameters when keys are short?

On `mqar_micro`, with keys of width 4 for up to 8 pairs. Stages: four learning rates with two seeds each, then two other
seeds at the learning rate with the best mean on valid.
"""

import numpy as np

from experiments.recall_frontier.sweep import mqar_micro_with_mixer
from recallax.layers import GatedDeltaNet, MixerConfig, MoM
from recallax.sweep import ResultRow, SweepStage, Trial

RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
MIXERS: dict[str, MixerConfig] = {
    "mom 5x4x16": MoM(memory=GatedDeltaNet(num_heads=1, head_k_dim=4, head_v_dim=16), num_memories=4, top_k=2),
    "gated_delta_net 4x46": GatedDeltaNet(num_heads=1, head_k_dim=4, head_v_dim=46),  # 1 % more parameters than `mom`
}


def grid(rows: list[ResultRow]) -> list[Trial]:
    """Return both mixers at every learning rate with two seeds."""
    return [_trial("grid", name, rate, seed) for name in MIXERS for rate in RATES for seed in (0, 1)]


def seeds(rows: list[ResultRow]) -> list[Trial]:
    """Return two other seeds of both mixers at their best learning rates."""
    return [_trial("seeds", name, best_rate(rows, name), seed) for name in MIXERS for seed in (2, 3)]


def best_rate(rows: list[ResultRow], name: str) -> float:
    """Select a mixer's learning rate by the mean accuracy of the grid's two seeds on valid.

    Args:
        rows: Rows with those of the stage `grid`.
        name: A key of `MIXERS`.

    Returns:
        The best learning rate.
    """
    own = [row for row in rows if row["stage"] == "grid" and row["mixer"] == name]
    return max(RATES, key=lambda rate: np.mean([row["valid"]["accuracy"] for row in own if row["lr"] == rate]))


def _trial(stage: str, name: str, rate: float, seed: int) -> Trial:
    return Trial(
        {"stage": stage, "mixer": name, "lr": rate, "seed": seed}, mqar_micro_with_mixer(MIXERS[name], rate, seed)
    )


STAGES: tuple[SweepStage, ...] = (grid, seeds)
