"""Recall accuracy against bytes of state for linear recurrences and MoM, on `mqar_micro`.

`experiments/recall_frontier` has BASED, windows, linear attention and the attention control with the same task,
learning rates and steps; the report shows both. Stages: six learning rates with one seed, then the best on valid with
two other seeds.
"""

from experiments.recall_frontier.sweep import mqar_micro_with_mixer
from experiments.sweep_stages import lr_grid_then_seeds
from recallax.layers import (
    GLA,
    KDA,
    DeltaNet,
    GatedDeltaNet,
    Mamba2,
    MixerConfig,
    MoM,
)
from recallax.sweep import SweepStage
from recallax.train.run_config import RunConfig

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
CELL = GatedDeltaNet(num_heads=1, head_k_dim=8, head_v_dim=16)
MIXERS: dict[str, MixerConfig] = {
    "gla 16x32": GLA(num_heads=1),
    "mamba2 16x64": Mamba2(state_dim=16, head_dim=32),
    "delta_net 8x16": DeltaNet(num_heads=1, head_k_dim=8, head_v_dim=16),
    "delta_net 16x32": DeltaNet(num_heads=1, head_k_dim=16, head_v_dim=32),
    "gated_delta_net 8x16": CELL,
    "gated_delta_net 16x32": GatedDeltaNet(num_heads=1, head_k_dim=16, head_v_dim=32),
    "gated_delta_net 8x52": GatedDeltaNet(num_heads=1, head_k_dim=8, head_v_dim=52),  # as many parameters as `mom`
    "kda 8x16": KDA(num_heads=1, head_k_dim=8, head_v_dim=16),
    "kda 16x32": KDA(num_heads=1, head_k_dim=16, head_v_dim=32),
    "mom 5x8x16": MoM(memory=CELL, num_memories=4, top_k=2),
}


def mqar_micro_config(name: str, rate: float, seed: int) -> RunConfig:
    """Return the run of one of `MIXERS` at a learning rate."""
    return mqar_micro_with_mixer(MIXERS[name], rate, seed)


STAGES: tuple[SweepStage, ...] = lr_grid_then_seeds(MIXERS, RATES, mqar_micro_config)
