"""How many facts a product-key memory stores, and in how many of its slots: `python -m experiments.product_key_capacity.measure`
rewrites results.jsonl and table.md.

A fact is a random vector of width 64 and one of 256 answers, drawn at random, so nothing but storing helps. The layer
is all there is between the vector and a learned linear readout; every step sees a random eighth of the facts.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

from recallax.layers import LayerInfo, MixerConfig, ProductKeys, SwiGLU
from recallax.layers.dense import Linear
from recallax.layers.product_keys import ProductKeysMixer
from recallax.train.log import git_commit
from recallax.train.optimizer import map_parameters, skip_zero_gradient_rows
from recallax.types import Precision, unpacked_seq_info

FOLDER = Path(__file__).parent
WIDTH, NUM_ANSWERS, NUM_FACTS, STEPS, RATE = 64, 256, 4096, 400, 3e-3
KEYS = ProductKeys(num_sub_keys=64, num_heads=2, head_k_dim=64, value_dim=64, top_k=8, gate_bias_init=0.0)
VARIANTS: dict[str, tuple[MixerConfig, str]] = {
    "product keys": (KEYS, "sparse"),
    "values at the common rate": (replace(KEYS, value_lr_multiplier=1.0), "sparse"),
    "every row moves (plain Adam)": (KEYS, "dense"),
    "values never learned": (KEYS, "fixed"),
    "a slot per fact and head (top_k 1)": (replace(KEYS, top_k=1), "sparse"),
    "perceptron of as many parameters": (SwiGLU(intermediate_size=1500), "sparse"),
}


class FactModel(nnx.Module):
    """The layer and a readout."""

    def __init__(self, config: MixerConfig, rngs: nnx.Rngs):
        self.layer = config.build(WIDTH, LayerInfo(0, 1), precision=Precision(), rngs=rngs)
        self.readout = Linear(WIDTH, NUM_ANSWERS, precision=Precision(), rngs=rngs, std=WIDTH**-0.5)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict]:
        y, told = self.layer(x[None], unpacked_seq_info(1, len(x)))
        return self.readout(y[0]), told


def train_variant(name: str, seed: int) -> dict:
    """Recall of all facts after training on them, and what share of the slots answers them."""
    config, updates = VARIANTS[name]
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (NUM_FACTS, WIDTH))
    answers = jax.random.randint(keys[1], (NUM_FACTS,), 0, NUM_ANSWERS)
    graph, params, rest = nnx.split(FactModel(config, nnx.Rngs(seed)), nnx.Param, ...)
    rates, sparse = (map_parameters(params, lambda p, tag=tag: p.get_metadata()[tag]) for tag in ("lr", "sparse"))
    if updates == "fixed":
        rates = jax.tree.map(lambda rate, own: 0.0 if own else rate, rates, sparse)
    adam = optax.adam(optax.cosine_decay_schedule(RATE, STEPS, 0.1))
    inner = adam if updates == "dense" else skip_zero_gradient_rows(adam, sparse)
    held = nnx.to_pure_dict(params)
    graph, _, rest = nnx.split(nnx.merge(graph, params, rest), nnx.Param, ...)

    def body(carry, key):
        held, moments = carry
        at = jax.random.randint(key, (NUM_FACTS // 8,), 0, NUM_FACTS)

        def loss(held):
            logits, _ = nnx.merge(graph, held, rest)(x[at])
            return optax.softmax_cross_entropy_with_integer_labels(logits, answers[at]).mean()

        value, slopes = jax.value_and_grad(loss)(held)
        moved, moments = inner.update(slopes, moments, held)
        moved = jax.tree.map(lambda m, rate: m * rate, moved, rates)
        return (optax.apply_updates(held, moved), moments), value

    begin = time.monotonic()
    train = jax.jit(lambda held: jax.lax.scan(body, (held, inner.init(held)), jax.random.split(keys[2], STEPS)))
    (held, _), losses = train(held)
    model = nnx.merge(graph, held, rest)
    logits, _ = jax.jit(lambda x: model(x))(x)
    row = {"arm": name, "seed": seed, "recall": float((logits.argmax(axis=1) == answers).mean())}
    row |= {"loss": round(float(losses[-50:].mean()), 4), "parameters": sum(p.size for p in jax.tree.leaves(held))}
    if isinstance(model.layer, ProductKeysMixer):
        _, told = model(x)
        row |= {name: round(float(told[f"diagnostic/{name}"].total), 4) for name in ("slots_used", "slots_kl")}
    return row | {"seconds": round(time.monotonic() - begin, 1), "commit": git_commit()}


def main() -> None:
    rows = []
    for name in VARIANTS:
        for seed in (0, 1, 2):
            rows.append(train_variant(name, seed))
            print(rows[-1], flush=True)
    (FOLDER / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (FOLDER / "table.md").write_text(table(rows) + "\n")


def table(rows: list[dict]) -> str:
    """One line per arm, over seeds."""
    head = ["arm", "parameters", "recall, each seed", "slots used", "KL to equal use", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in VARIANTS:
        own = [row for row in rows if row["arm"] == name]

        def mean(what: str, own=own) -> str:
            return f"{np.mean([row[what] for row in own]):.3g}" if what in own[0] else ""

        recall = " ".join(f"{row['recall']:.4f}" for row in own)
        cells = [name, own[0]["parameters"], recall, mean("slots_used"), mean("slots_kl"), mean("seconds")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
