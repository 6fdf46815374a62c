"""Do negative eigenvalues turn state tracking from failure into success?

One DeltaNet layer with strengths of at most 1 (eigenvalues in [0, 1]) and at most 2 (in [-1, 1]), without a short
convolution, on parity and on the 120 states of S5 reached by transpositions, one per token. Stages: three learning
rates with one seed, then the best on valid with two others.
"""

from experiments.cell import Stage, rates_then_seeds
from experiments.state_tracking.swaps import Swaps
from recallax.layers import DeltaNet, SwiGLU
from recallax.models import Block, LMConfig, Untied
from recallax.tasks import StateTracking
from recallax.train.run import AdamW, Evaluate, RunConfig, Train

RATES = (1e-3, 3e-3, 1e-2)
TASKS: dict[str, StateTracking] = {
    "parity": StateTracking(group="parity", length=32, test_lengths=(32, 64, 128)),
    "S5": Swaps(group="S5", length=16, test_lengths=(16, 32, 64)),
}
CELLS = {f"{task}, beta <= {beta}": (task, float(beta)) for task in TASKS for beta in (1, 2)}


def config(name: str, rate: float, seed: int) -> RunConfig:
    task, beta = CELLS[name]
    block = Block(mixer=DeltaNet(heads=4, max_beta=beta, conv=0), channel=SwiGLU(expand=4.0))
    return RunConfig(
        task=TASKS[task],
        model=LMConfig(d_model=64, pattern="mixer", blocks={"mixer": block}, readout=Untied()),
        optim=AdamW(lr=rate),
        train=Train(steps=2000, batch_size=64, seed=seed, data_seed=seed),
        evaluate=Evaluate(batches=12),
    )


STAGES: tuple[Stage, ...] = rates_then_seeds(CELLS, RATES, config)
