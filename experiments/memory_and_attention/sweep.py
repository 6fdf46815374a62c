"""Titans' combinations of a memory and attention, on MQAR with a short attention window.

Stages: three learning rates with one seed; then, at the learning rate that is best on valid, a second seed, the two
other query sources of memory as a context, and the combinations with a two-layer memory. Attention over the whole row
is the control.
"""

from dataclasses import replace

from experiments.results import best_row
from recallax.configs import mqar_micro
from recallax.configs.mqar_titans import titans_variants
from recallax.layers import Attention, Identity, NeuralMemory, SlidingWindow
from recallax.models import Block
from recallax.pallas_kernels.neural_memory.inner_optimizer import InnerOptimizer, LinearNet, MLPNet
from recallax.sweep import ResultRow, SweepStage, Trial
from recallax.tasks import MQAR, MixtureSlice
from recallax.train.run_config import AdamW, RunConfig

SLICES = (MixtureSlice(length=16, num_kv_pairs=2),)
TASK = MQAR(vocab_size=16, mixture=SLICES, test_mixture=SLICES)
RATES = (7.5e-4, 1.5e-3, 3e-3)
STEPS = 1500
LINEAR_MEMORY = NeuralMemory(
    num_heads=1, inner_optimizer=InnerOptimizer(network=LinearNet(), gradient="token", chunk_size=8)
)
MLP_MEMORY = NeuralMemory(num_heads=1, inner_optimizer=InnerOptimizer(network=MLPNet(expansion=2), chunk_size=4))
CONTROL = Block(mixer=Attention(), channel=Identity())
PATTERNS = {
    "memory as a context": "conv mac",
    "memory as a gate": "conv mag",
    "memory as a layer": "conv memory window",
    "memory alone": "conv memory",
    "window alone": "conv window",
    "attention": "conv attention",
}
QUERY_VARIANTS = {
    "context, asked by the segment before": "conv mac_previous",
    "context, learned questions": "conv mac_learned",
}
SEEDS = (1,)
MLP_PATTERNS = tuple(name for name in PATTERNS if name.startswith("memory as"))


def grid(rows: list[ResultRow]) -> list[Trial]:
    """Return every pattern at every learning rate with seed 0."""
    return [_trial("grid", name, rate, 0) for name in PATTERNS for rate in RATES]


def seeds(rows: list[ResultRow]) -> list[Trial]:
    """Return a second seed of every pattern at its best learning rate."""
    best = {name: best_row(rows, "grid", mixer=name)["lr"] for name in PATTERNS}
    return [_trial("seeds", name, rate, seed) for name, rate in best.items() for seed in SEEDS]


def query_variants(rows: list[ResultRow]) -> list[Trial]:
    """Return the other query sources of memory as a context, at its best learning rate."""
    rate = best_row(rows, "grid", mixer="memory as a context")["lr"]
    return [_trial("asking", name, rate, seed) for name in QUERY_VARIANTS for seed in SEEDS]


def mlp_memories(rows: list[ResultRow]) -> list[Trial]:
    """Return the combinations with a two-layer memory, at the learning rate that was best with a matrix memory."""
    best = {name: best_row(rows, "grid", mixer=name)["lr"] for name in MLP_PATTERNS}
    return [_trial("deep", name, rate, SEEDS[0], MLP_MEMORY) for name, rate in best.items()]


def _trial(stage: str, name: str, rate: float, seed: int, memory: NeuralMemory = LINEAR_MEMORY) -> Trial:
    return Trial({"stage": stage, "mixer": name, "lr": rate, "seed": seed}, _run(name, rate, seed, memory))


def _run(name: str, rate: float, seed: int, memory: NeuralMemory) -> RunConfig:
    base = mqar_micro.get_config()
    train = replace(base.train, steps=STEPS, seed=seed, data_seed=seed)
    model = titans_variants(
        memory, SlidingWindow(window=4, num_persistent_tokens=2), block_size=4, num_retrieved_tokens=2, d_model=64
    )
    model = replace(model, pattern=(PATTERNS | QUERY_VARIANTS)[name], blocks=model.blocks | {"attention": CONTROL})
    return replace(base, task=TASK, model=model, optim=AdamW(lr=rate), train=train)


STAGES: tuple[SweepStage, ...] = (grid, seeds, query_variants, mlp_memories)
