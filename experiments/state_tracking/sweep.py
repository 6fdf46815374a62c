"""Do negative eigenvalues enable state tracking?

One DeltaNet layer with beta of at most 1 (eigenvalues in [0, 1]) and of at most 2 (in [-1, 1]), without a short
convolution, on parity and on the 120 states of S5 with one transposition per token. Stages: three learning rates with
one seed, then the best on valid with two other seeds.
"""

from experiments.state_tracking.transpositions import TranspositionTracking
from experiments.sweep_stages import lr_grid_then_seeds
from recallax.layers import DeltaNet, SwiGLU
from recallax.models import Block, LMConfig, Untied
from recallax.sweep import SweepStage
from recallax.tasks import StateTracking
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train

RATES = (1e-3, 3e-3, 1e-2)
TASKS: dict[str, StateTracking] = {
    "parity": StateTracking(group="parity", length=32, test_lengths=(32, 64, 128)),
    "S5": TranspositionTracking(group="S5", length=16, test_lengths=(16, 32, 64)),
}
VARIANTS = {f"{task}, beta <= {beta}": (task, beta == 2) for task in TASKS for beta in (1, 2)}


def config(name: str, rate: float, seed: int) -> RunConfig:
    """Return the run of one of `VARIANTS` at a learning rate."""
    task, negative = VARIANTS[name]
    block = Block(mixer=DeltaNet(num_heads=4, allow_neg_eigval=negative, conv_size=0), channel=SwiGLU(expand=4.0))
    return RunConfig(
        task=TASKS[task],
        model=LMConfig(d_model=64, pattern="mixer", blocks={"mixer": block}, lm_head=Untied()),
        optim=AdamW(lr=rate),
        train=Train(steps=2000, batch_size=64, seed=seed, data_seed=seed),
        evaluate=Evaluate(batches=12),
    )


STAGES: tuple[SweepStage, ...] = lr_grid_then_seeds(VARIANTS, RATES, config)
