"""Measure how many facts a product-key memory stores, and in how many of its slots.

`python -m experiments.product_key_capacity.measure` rewrites results.jsonl. A fact is a random vector of width 64 with
one of 256 answers, drawn at random, so only storing helps. The layer and a learned linear readout are the whole model,
and every step sees a random eighth of the facts.

`recallax.train` does not run this: its models read token ids, and an embedding table would store the facts beside the
layer that is measured. All 400 steps are one `lax.scan`.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import optax
from flax import nnx
from jaxtyping import Array, Float

from recallax.layers import LayerInfo, MixerConfig, ProductKeys, SwiGLU
from recallax.layers.dense import Linear
from recallax.layers.product_keys import ProductKeysMixer
from recallax.train.log import git_commit
from recallax.train.optimizer import map_parameters, skip_zero_gradient_rows
from recallax.types import Precision, unpacked_seq_info

type UpdateRule = Literal["sparse", "dense", "fixed"]
"""Rows of the value table that Adam updates: those with a gradient, all, or none."""

FOLDER = Path(__file__).parent
WIDTH, NUM_ANSWERS, NUM_FACTS, STEPS, RATE = 64, 256, 4096, 400, 3e-3
KEYS = ProductKeys(num_sub_keys=64, num_heads=2, head_k_dim=64, value_dim=64, top_k=8, gate_bias_init=0.0)
VARIANTS: dict[str, tuple[MixerConfig, UpdateRule]] = {
    "product keys": (KEYS, "sparse"),
    "values at the common rate": (replace(KEYS, value_lr_multiplier=1.0), "sparse"),
    "every row moves (plain Adam)": (KEYS, "dense"),
    "values never learned": (KEYS, "fixed"),
    "a slot per fact and head (top_k 1)": (replace(KEYS, top_k=1), "sparse"),
    "perceptron of as many parameters": (SwiGLU(intermediate_size=1500), "sparse"),
}


class FactModel(nnx.Module):
    """The layer and a linear readout."""

    def __init__(self, config: MixerConfig, rngs: nnx.Rngs):
        self.layer = config.build(WIDTH, LayerInfo(0, 1), precision=Precision(), rngs=rngs)
        self.readout = Linear(WIDTH, NUM_ANSWERS, precision=Precision(), rngs=rngs, std=WIDTH**-0.5)

    def __call__(self, x: Float[Array, "N D"]) -> tuple[Float[Array, "N A"], dict]:
        y, aux = self.layer(x[None], unpacked_seq_info(1, len(x)))
        return self.readout(y[0]), aux


def train_variant(name: str, seed: int) -> dict:
    """Train a variant on all facts.

    Args:
        name: A key of `VARIANTS`.
        seed: Seed of the facts, the parameters and the batches.

    Returns:
        The share of the facts that it recalls, the mean loss of the last 50 steps in nats, the number of parameters,
        the share of slots that answer, and the wall time in seconds.
    """
    config, updates = VARIANTS[name]
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (NUM_FACTS, WIDTH))
    answers = jax.random.randint(keys[1], (NUM_FACTS,), 0, NUM_ANSWERS)
    graph, variables, rest = nnx.split(FactModel(config, nnx.Rngs(seed)), nnx.Param, ...)
    optimizer, lr_factors = _make_optimizer(variables, updates)
    params = nnx.to_pure_dict(variables)
    graph, _, rest = nnx.split(nnx.merge(graph, variables, rest), nnx.Param, ...)

    def step(carry, key):
        params, moments = carry
        at = jax.random.randint(key, (NUM_FACTS // 8,), 0, NUM_FACTS)

        def loss_fn(params):
            logits, _ = nnx.merge(graph, params, rest)(x[at])
            return optax.softmax_cross_entropy_with_integer_labels(logits, answers[at]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        steps, moments = optimizer.update(grads, moments, params)
        steps = jax.tree.map(lambda step, factor: step * factor, steps, lr_factors)
        return (optax.apply_updates(params, steps), moments), loss

    start = time.monotonic()
    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(keys[2], STEPS)))
    (params, _), losses = run(params)
    model = nnx.merge(graph, params, rest)
    logits, _ = jax.jit(lambda x: model(x))(x)
    row = {"arm": name, "seed": seed, "recall": float((logits.argmax(axis=1) == answers).mean())}
    row |= {"loss": round(float(losses[-50:].mean()), 4), "parameters": sum(p.size for p in jax.tree.leaves(params))}
    if isinstance(model.layer, ProductKeysMixer):
        _, aux = model(x)
        row |= {name: round(float(aux[f"diagnostic/{name}"].total), 4) for name in ("slots_used", "slots_kl")}
    return row | {"seconds": round(time.monotonic() - start, 1), "commit": git_commit()}


def _make_optimizer(variables: nnx.State, updates: UpdateRule) -> tuple[optax.GradientTransformation, Any]:
    """Adam on a cosine schedule, and the learning-rate factor of each parameter."""
    lr_factors, sparse = (
        map_parameters(variables, lambda p, tag=tag: p.get_metadata()[tag]) for tag in ("lr", "sparse")
    )
    if updates == "fixed":
        lr_factors = jax.tree.map(lambda factor, is_sparse: 0.0 if is_sparse else factor, lr_factors, sparse)
    adam = optax.adam(optax.cosine_decay_schedule(RATE, STEPS, 0.1))
    return adam if updates == "dense" else skip_zero_gradient_rows(adam, sparse), lr_factors


def main() -> None:
    """Measure every variant with three seeds."""
    rows = []
    for name in VARIANTS:
        for seed in (0, 1, 2):
            rows.append(train_variant(name, seed))
            print(rows[-1], flush=True)
    (FOLDER / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
