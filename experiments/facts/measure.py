"""How many facts a product-key memory stores, and in how many of its slots: `python -m experiments.facts.measure`
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

from recallax.layers import MixerConfig, ProductKeys, Site, SwiGLU
from recallax.layers.dense import Linear
from recallax.layers.product_keys import ProductKeysMixer
from recallax.train.log import commit
from recallax.train.optimizer import by_rows, tags
from recallax.types import Precision, whole_rows

HERE = Path(__file__).parent
WIDTH, ANSWERS, FACTS, STEPS, RATE = 64, 256, 4096, 400, 3e-3
KEYS = ProductKeys(sub_keys=64, heads=2, key_dim=64, value_dim=64, top_k=8, gate_bias=0.0)
ARMS: dict[str, tuple[MixerConfig, str]] = {
    "product keys": (KEYS, "sparse"),
    "values at the common rate": (replace(KEYS, value_lr=1.0), "sparse"),
    "every row moves (plain Adam)": (KEYS, "dense"),
    "values never learned": (KEYS, "fixed"),
    "a slot per fact and head (top_k 1)": (replace(KEYS, top_k=1), "sparse"),
    "perceptron of as many parameters": (SwiGLU(inner=1500), "sparse"),
}


class Facts(nnx.Module):
    """The layer and a readout."""

    def __init__(self, config: MixerConfig, rngs: nnx.Rngs):
        self.layer = config.build(WIDTH, Site(0, 1), precision=Precision(), rngs=rngs)
        self.readout = Linear(WIDTH, ANSWERS, precision=Precision(), rngs=rngs, std=WIDTH**-0.5)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict]:
        y, told = self.layer(x[None], whole_rows(1, len(x)))
        return self.readout(y[0]), told


def measure(name: str, seed: int) -> dict:
    """Recall of all facts after training on them, and what share of the slots answers them."""
    config, updates = ARMS[name]
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (FACTS, WIDTH))
    answers = jax.random.randint(keys[1], (FACTS,), 0, ANSWERS)
    graph, params, rest = nnx.split(Facts(config, nnx.Rngs(seed)), nnx.Param, ...)
    rates, sparse = (tags(params, lambda p, tag=tag: p.get_metadata()[tag]) for tag in ("lr", "sparse"))
    if updates == "fixed":
        rates = jax.tree.map(lambda rate, own: 0.0 if own else rate, rates, sparse)
    adam = optax.adam(optax.cosine_decay_schedule(RATE, STEPS, 0.1))
    inner = adam if updates == "dense" else by_rows(adam, sparse)
    held = nnx.to_pure_dict(params)
    graph, _, rest = nnx.split(nnx.merge(graph, params, rest), nnx.Param, ...)

    def body(carry, key):
        held, moments = carry
        at = jax.random.randint(key, (FACTS // 8,), 0, FACTS)

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
    return row | {"seconds": round(time.monotonic() - begin, 1), "commit": commit()}


def main() -> None:
    rows = []
    for name in ARMS:
        for seed in (0, 1, 2):
            rows.append(measure(name, seed))
            print(rows[-1], flush=True)
    (HERE / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (HERE / "table.md").write_text(table(rows) + "\n")


def table(rows: list[dict]) -> str:
    """One line per arm, over seeds."""
    head = ["arm", "parameters", "recall, each seed", "slots used", "KL to equal use", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in ARMS:
        own = [row for row in rows if row["arm"] == name]

        def mean(what: str, own=own) -> str:
            return f"{np.mean([row[what] for row in own]):.3g}" if what in own[0] else ""

        recall = " ".join(f"{row['recall']:.4f}" for row in own)
        cells = [name, own[0]["parameters"], recall, mean("slots_used"), mean("slots_kl"), mean("seconds")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
