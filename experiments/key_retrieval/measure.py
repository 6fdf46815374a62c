"""Train the arms, then measure recall, traffic and time: `python -m experiments.key_retrieval.measure [STAGE...]`.

Stages: train (weights go to `runs/key_retrieval`), recall, offload, time. Rows are added to results.jsonl; `report.py`
makes the tables from them. One thread.
"""

import json
import os
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

os.environ |= {"PJRT_NPROC": "1", "OMP_NUM_THREADS": "1"}  # read by jax when it is imported

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.key_retrieval.variants import LONG_TASK, RATES, TOP_K, VARIANTS, best_rate, lm_config, train_variant
from experiments.train_cell import ResultRow
from recallax.layers import Landmark, MixerConfig
from recallax.layers.base import Statistic
from recallax.models import LM, LMConfig
from recallax.models.offload import OffloadedLM
from recallax.pallas_kernels.landmark_attention import landmark_attention
from recallax.pallas_kernels.window_attention import window_attention
from recallax.train.log import environment, git_commit
from recallax.train.step import select_labelled

FOLDER = Path(__file__).parent
RESULTS, WEIGHTS_FOLDER = FOLDER / "results.jsonl", Path("runs") / "key_retrieval"
ROWS_PER_LENGTH = {256: 64, 1024: 32, 4096: 16, 8192: 16}
"""Lengths of the test, and rows of each."""
TOP_KS = (1, 2, 4, 8, 16)
"""Of blocks that are read."""


def append_row(row: ResultRow) -> None:
    """Add a row."""
    host = {name: environment()[name] for name in ("device", "cpus", "jax")}
    with RESULTS.open("a") as file:
        file.write(json.dumps(row | host | {"commit": git_commit()}) + "\n")
    print(row, flush=True)


def stage_rows(stage: str) -> list[ResultRow]:
    """What a stage has measured."""
    found = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return [row for row in found if row["stage"] == stage]


def train_variants() -> None:
    """Every arm at every rate that has no row yet."""
    done = {(row["arm"], row["lr"]) for row in stage_rows("train")}
    WEIGHTS_FOLDER.mkdir(parents=True, exist_ok=True)
    for arm, lr in product(VARIANTS, RATES):
        if (arm, lr) not in done:
            _, state, row = train_variant(arm, lr)
            np.savez(WEIGHTS_FOLDER / f"{arm}_{lr:g}.npz", *(np.asarray(x) for x in jax.tree.leaves(state.params)))
            append_row({"stage": "train"} | row)


def load_variant(variant: str, mixer: MixerConfig) -> tuple[LMConfig, LM]:
    """The arm at the rate that is best on valid, with another mixer of the same parameters."""
    config = lm_config(mixer)
    graph, params, rest = nnx.split(config.build(nnx.Rngs(0), LONG_TASK.vocab_size), nnx.Param, Statistic)
    held = np.load(WEIGHTS_FOLDER / f"{variant}_{best_rate(stage_rows('train'), variant):g}.npz")
    leaves, tree = jax.tree.flatten(params)
    values = [jnp.asarray(held[f"arr_{i}"]) for i in range(len(leaves))]
    return config, nnx.merge(graph, jax.tree.unflatten(tree, values), rest)


def retrieval_variants() -> dict[tuple[str, int | None], MixerConfig]:
    """Every way of reading, by arm and number of blocks; None reads all, and 0 only the own block."""
    landmark = VARIANTS["landmark"]
    assert isinstance(landmark, Landmark)
    ways: dict[tuple[str, int | None], MixerConfig] = {}
    ways[("landmark", 0)] = replace(landmark, top_k=1, min_probability=1.0)
    for count in (*TOP_KS, None):
        ways[("landmark", count)] = replace(landmark, top_k=count)
    for arm in ("attention", "window"):
        ways[(arm, None)] = VARIANTS[arm]
    return ways


def measure_recall() -> None:
    """Accuracy on the test split against length and the number of blocks."""
    done = {(row["arm"], row["top_k"], row["length"], row["keys"]) for row in stage_rows("recall")}
    for (arm, top_k), mixer in retrieval_variants().items():
        _, lm = load_variant(arm, mixer)
        graph, weights = nnx.split(lm)

        @jax.jit
        def logits(weights: Any, tokens: Any, seq: Any, at: Any, graph: Any = graph, mixer: Any = mixer) -> jax.Array:
            lm = nnx.merge(graph, weights)
            if isinstance(mixer, Landmark) and mixer.top_k is not None:
                return lm.prefill(tokens, seq, lm.init_state(*tokens.shape), at)[0]
            return lm(tokens, seq, at)[0]

        for (length, count), keys in product(ROWS_PER_LENGTH.items(), (8, 1)):
            if (arm, top_k, length, keys) in done or (keys == 1 and top_k in (8, 16)):
                continue
            task, right, weight = replace(LONG_TASK, test_slices=((length, keys),)), 0.0, 0.0
            at_once = max(1, 4096 // length)
            for index in range(count // at_once):
                batch = task.batch(0, "test", index, at_once)
                at, targets, weights_of, *_ = select_labelled(task, "test", batch)
                answers = logits(weights, batch.tokens, batch.seq, at).argmax(axis=-1)
                right += float(jnp.sum((answers == targets) * weights_of))
                weight += float(jnp.sum(weights_of))
            found = {"arm": arm, "top_k": top_k, "length": length, "keys": keys, "rows": count}
            append_row({"stage": "recall", **found, "accuracy": right / weight})


def measure_offload() -> None:
    """Bytes fetched against k, and bytes on device and host against context, for one row."""
    landmark = VARIANTS["landmark"]
    assert isinstance(landmark, Landmark)
    done = {(row["top_k"], row["length"]) for row in stage_rows("offload")}
    wanted = [(k, 2048) for k in TOP_KS] + [(TOP_K, length) for length in (1024, 4096, 8192)]
    for top_k, length in wanted:
        if (top_k, length) in done:
            continue
        config, lm = load_variant("landmark", replace(landmark, top_k=top_k))
        task = replace(LONG_TASK, test_slices=((length, 8),))
        batch = task.batch(0, "test", 0, 1)
        tokens = np.asarray(batch.tokens)
        driver = OffloadedLM(config, lm, 1, length)
        begun, asked = length - 2 * 8, batch.weights[0] > 0
        driver.prefill(tokens[:, :begun])
        before, right = driver.stats(), 0
        for t in range(begun, length):
            answer = int(driver.prefill(tokens[:, t : t + 1]).argmax())
            right += bool(asked[t]) and answer == int(batch.targets[0, t])
        after = driver.stats()
        steps = length - begun
        append_row(
            {
                "stage": "offload",
                "top_k": top_k,
                "length": length,
                "right": right,
                "asked": int(asked.sum()),
                "fetched_per_token": (after.fetched_bytes - before.fetched_bytes) / steps,
                "fetched_by_prompt": before.fetched_bytes,
                "host_bytes": after.host_bytes,
                "device_bytes": after.device_bytes,
            }
        )


def measure_time() -> None:
    """Landmark attention against full attention, in turns: CPU seconds, smallest of five."""
    done = {(row["length"], row["real"], row["gradient"]) for row in stage_rows("time")}
    for length, real, gradient in product((1024, 2048, 4096, 8192), (15, 63), (False, True)):
        if (length, real, gradient) in done:
            continue
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.normal(size=(1, length, 4, 64)), jnp.float32) for _ in range(3))
        where = {"positions": jnp.arange(length)[None], "segments": jnp.ones((1, length), jnp.int32)}

        def landmark(q: jax.Array, k: jax.Array, v: jax.Array, real: int = real, where: Any = where) -> jax.Array:
            return landmark_attention(q, k, v, block_size=real, **where)

        def full(q: jax.Array, k: jax.Array, v: jax.Array, where: Any = where) -> jax.Array:
            return window_attention(q, k, v, segment_ids=where["segments"])[0]

        both = (("landmark", landmark), ("full", full))
        forms = {name: jax.jit(_grad(f) if gradient else f) for name, f in both}
        best = {name: _seconds(form, q, k, v) for name, form in forms.items()}
        for _ in range(5):
            best = {name: min(best[name], _seconds(form, q, k, v)) for name, form in forms.items()}
        found = {"length": length, "real": real, "gradient": gradient}
        append_row({"stage": "time", **found, **{name: round(1e3 * value, 2) for name, value in best.items()}})


def _grad(attention: Any) -> Any:
    return jax.grad(lambda q, k, v: (attention(q, k, v) ** 2).sum(), (0, 1, 2))


def _seconds(attention: Any, *inputs: jax.Array) -> float:
    begin = time.process_time()
    jax.block_until_ready(attention(*inputs))
    return time.process_time() - begin


STAGES = {"train": train_variants, "recall": measure_recall, "offload": measure_offload, "time": measure_time}

if __name__ == "__main__":
    for stage in sys.argv[1:] or STAGES:
        STAGES[stage]()
