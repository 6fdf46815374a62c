"""Capacity of a product-key memory: the facts that it stores, and the slots that it uses.

4,096 facts: a random vector of width 64 each with one of 256 answers, drawn at random, so only storing helps. The layer
and a learned linear readout are the whole model. 400 steps of Adam, each on an eighth of the facts, at one learning
rate and with three seeds.
"""

from dataclasses import dataclass, replace

from flax import nnx

from experiments.product_key_capacity.facts import RandomFacts, fact_model
from recallax.layers import LayerInfo, MixerConfig, ProductKeys, SwiGLU
from recallax.layers.product_keys import ProductKeysMixer
from recallax.sweep import ResultRow, SweepStage, Trial
from recallax.train.program import Program
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train
from recallax.train.step import TrainState, predict
from recallax.types import DIAGNOSTIC_PREFIX, Precision

WIDTH, STEPS, RATE, SEEDS = 64, 400, 3e-3, (0, 1, 2)
TASK = RandomFacts(num_facts=4096, num_answers=256)
NO_CLIPPING = 1e6
"""A maximum gradient norm that no gradient reaches."""


@dataclass(frozen=True, kw_only=True)
class DenselyUpdatedKeys(ProductKeys):
    """Product keys of which Adam updates all values in every step, also those without a gradient."""

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> ProductKeysMixer:
        mixer = super().build(d_model, layer, precision=precision, rngs=rngs)
        mixer.values.set_metadata("sparse", False)
        return mixer


KEYS = ProductKeys(num_sub_keys=64, num_heads=2, head_k_dim=64, value_dim=64, top_k=8, gate_bias_init=0.0)
VARIANTS: dict[str, MixerConfig] = {
    "product keys": KEYS,
    "values at the common rate": replace(KEYS, value_lr_multiplier=1.0),
    "all values updated (plain Adam)": DenselyUpdatedKeys(**vars(KEYS)),
    "values not trained": replace(KEYS, value_lr_multiplier=0.0),
    "one slot per fact and head (top_k 1)": replace(KEYS, top_k=1),
    "MLP of as many parameters": SwiGLU(intermediate_size=1500),
}


def run_config(variant: str, seed: int, steps: int = STEPS) -> RunConfig:
    """Return the run of a variant.

    Args:
        variant: A key of `VARIANTS`.
        seed: Seed of the vectors, the parameters and the batches.
        steps: Number of steps.

    Returns:
        The run.
    """
    batch_size = TASK.num_facts // 8
    return RunConfig(
        task=TASK,
        model=fact_model(VARIANTS[variant], WIDTH, TASK.num_answers),
        optim=AdamW(lr=RATE, weight_decay=0.0, b2=0.999, warmup_ratio=0.0, max_grad_norm=NO_CLIPPING),
        train=Train(steps=steps, batch_size=batch_size, seed=seed, data_seed=seed),
        evaluate=Evaluate(batches=8, batch_size=batch_size),
    )


def slot_use(program: Program, state: TrainState) -> ResultRow:
    """Measure the share of slots that any fact reads, and the KL divergence in nats of their use from uniform."""
    all_facts = TASK.batch(0, "test", 0, TASK.num_facts)
    _, aux, _ = predict(program.graphdef, state.params, state.statistics, all_facts, None, None)
    return {name.removeprefix(DIAGNOSTIC_PREFIX): float(mean.total) for name, mean in aux.items()}


def all_trials(rows: list[ResultRow]) -> list[Trial]:
    """Return every variant with every seed."""
    return [
        Trial({"stage": "variants", "mixer": name, "seed": seed}, run_config(name, seed), slot_use)
        for name in VARIANTS
        for seed in SEEDS
    ]


STAGES: tuple[SweepStage, ...] = (all_trials,)
