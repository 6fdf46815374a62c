"""Train the variants, then measure recall, traffic and time: `python -m experiments.key_retrieval.measure [STAGE...]`.

The stages are train (run folders in `runs/key_retrieval`), recall, offload and time. Each appends its missing rows to
results.jsonl. The process uses one thread.
"""

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

from experiments.key_retrieval.variants import (
    LONG_TASK,
    RATES,
    TOP_K,
    VARIANTS,
    best_rate,
    lm_config,
    stage_configs,
    train_variant,
)
from experiments.results import read_rows
from recallax.layers import Landmark, MixerConfig
from recallax.models import LM, LMConfig
from recallax.models.offload import OffloadedLM
from recallax.pallas_kernels.landmark_attention import landmark_attention
from recallax.pallas_kernels.window_attention import window_attention
from recallax.sweep import ResultRow, encode_row
from recallax.tasks import KeyRetrieval
from recallax.train.log import environment, git_commit
from recallax.train.loop import restore_run
from recallax.train.program import Program
from recallax.train.step import select_labelled

FOLDER, RUNS = Path(__file__).parent, Path("runs") / "key_retrieval"
ROWS_PER_LENGTH = {256: 64, 1024: 32, 4096: 16, 8192: 16}
"""Number of test rows at each length."""
TOP_KS = (1, 2, 4, 8, 16)
"""Numbers of blocks that landmark attention reads."""
TOKENS_PER_BATCH = 4096
REPETITIONS = 5
"""Timed calls of each attention, of which the fastest counts."""


def append_row(row: ResultRow) -> None:
    """Append a row to results.jsonl, with the host and the commit, and print it."""
    host = {name: environment()[name] for name in ("device", "cpus", "jax")}
    with (FOLDER / "results.jsonl").open("a") as file:
        file.write(encode_row(row | host | {"commit": git_commit()}) + "\n")
    print(row, flush=True)


def stage_rows(stage: str) -> list[ResultRow]:
    """Return the rows of a stage."""
    return [row for row in read_rows(FOLDER) if row["stage"] == stage]


def train_variants() -> None:
    """Train every variant at every learning rate that has no row yet."""
    done = {(row["arm"], row["lr"]) for row in stage_rows("train")}
    for variant, lr in product(VARIANTS, RATES):
        if (variant, lr) not in done:
            append_row({"stage": "train"} | train_variant(variant, lr, _runs_of(variant, lr)))


def load_variant(variant: str, mixer: MixerConfig) -> tuple[LMConfig, LM]:
    """Load a variant's best run, with a mixer that has the same parameters and may read otherwise.

    Args:
        variant: A key of `VARIANTS`.
        mixer: The mixer to put the trained parameters into.

    Returns:
        The model's config and the model.
    """
    rate = best_rate(stage_rows("train"), variant)
    _, trained = restore_run(_runs_of(variant, rate) / "stage_2")
    program = Program(replace(stage_configs(variant, rate)[1], model=lm_config(mixer)))
    return program.config.model, nnx.merge(program.graphdef, trained.state.params, trained.state.statistics)


def _runs_of(variant: str, lr: float) -> Path:
    return RUNS / f"{variant}_{lr:g}"


def retrieval_variants() -> dict[tuple[str, int | None], MixerConfig]:
    """Return the mixers whose recall is measured.

    Returns:
        Mixers by variant and number of blocks; None reads all blocks, and 0 reads the token's own block only.
    """
    landmark = VARIANTS["landmark"]
    assert isinstance(landmark, Landmark)
    mixers: dict[tuple[str, int | None], MixerConfig] = {}
    mixers[("landmark", 0)] = replace(landmark, top_k=1, min_probability=1.0)
    for top_k in (*TOP_KS, None):
        mixers[("landmark", top_k)] = replace(landmark, top_k=top_k)
    for variant in ("attention", "window"):
        mixers[(variant, None)] = VARIANTS[variant]
    return mixers


def measure_recall() -> None:
    """Measure test accuracy by length and number of blocks."""
    done = {(row["arm"], row["top_k"], row["length"], row["keys"]) for row in stage_rows("recall")}
    for (variant, top_k), mixer in retrieval_variants().items():
        _, lm = load_variant(variant, mixer)
        graph, weights = nnx.split(lm)

        @jax.jit
        def logits(weights: Any, tokens: Any, seq: Any, at: Any, graph: Any = graph, mixer: Any = mixer) -> jax.Array:
            lm = nnx.merge(graph, weights)
            if isinstance(mixer, Landmark) and mixer.top_k is not None:
                return lm.prefill(tokens, seq, lm.init_state(*tokens.shape), at)[0]
            return lm(tokens, seq, at)[0]

        for (length, num_rows), keys in product(ROWS_PER_LENGTH.items(), (8, 1)):
            if (variant, top_k, length, keys) in done or (keys == 1 and top_k in (8, 16)):
                continue
            task = replace(LONG_TASK, test_slices=((length, keys),))
            accuracy = _test_accuracy(lambda *batch: logits(weights, *batch), task, length, num_rows)  # noqa: B023
            labels = {"arm": variant, "top_k": top_k, "length": length, "keys": keys, "rows": num_rows}
            append_row({"stage": "recall", **labels, "accuracy": accuracy})


def _test_accuracy(logits: Any, task: KeyRetrieval, length: int, num_rows: int) -> float:
    correct, weight = 0.0, 0.0
    batch_size = max(1, TOKENS_PER_BATCH // length)
    for index in range(num_rows // batch_size):
        batch = task.batch(0, "test", index, batch_size)
        at, targets, weights, *_ = select_labelled(task, "test", batch)
        answers = logits(batch.tokens, batch.seq, at).argmax(axis=-1)
        correct += float(jnp.sum((answers == targets) * weights))
        weight += float(jnp.sum(weights))
    return correct / weight


def measure_offload() -> None:
    """Measure the bytes fetched by k, and the bytes on device and host by context length, for one row."""
    done = {(row["top_k"], row["length"]) for row in stage_rows("offload")}
    settings = [(k, 2048) for k in TOP_KS] + [(TOP_K, length) for length in (1024, 4096, 8192)]
    for top_k, length in settings:
        if (top_k, length) not in done:
            append_row({"stage": "offload", "top_k": top_k, "length": length} | _offload_traffic(top_k, length))


def _offload_traffic(top_k: int, length: int) -> ResultRow:
    landmark = VARIANTS["landmark"]
    assert isinstance(landmark, Landmark)
    config, lm = load_variant("landmark", replace(landmark, top_k=top_k))
    batch = replace(LONG_TASK, test_slices=((length, 8),)).batch(0, "test", 0, 1)
    tokens, labelled = np.asarray(batch.tokens), batch.weights[0] > 0
    model = OffloadedLM(config, lm, 1, length)
    prompt_length, correct = length - 2 * 8, 0
    model.prefill(tokens[:, :prompt_length])
    before = model.stats()
    for t in range(prompt_length, length):
        answer = int(model.prefill(tokens[:, t : t + 1]).argmax())
        correct += bool(labelled[t]) and answer == int(batch.targets[0, t])
    after = model.stats()
    return {
        "right": correct,
        "asked": int(labelled.sum()),
        "fetched_per_token": (after.fetched_bytes - before.fetched_bytes) / (length - prompt_length),
        "fetched_by_prompt": before.fetched_bytes,
        "host_bytes": after.host_bytes,
        "device_bytes": after.device_bytes,
    }


def measure_time() -> None:
    """Time landmark attention and full attention, interleaved: CPU time in ms, the smallest of `REPETITIONS` calls."""
    done = {(row["length"], row["real"], row["gradient"]) for row in stage_rows("time")}
    for length, block_size, gradient in product((1024, 2048, 4096, 8192), (15, 63), (False, True)):
        if (length, block_size, gradient) in done:
            continue
        rng = np.random.default_rng(0)
        qkv = [jnp.asarray(rng.normal(size=(1, length, 4, 64)), jnp.float32) for _ in range(3)]
        functions = {
            n: jax.jit(_with_gradient(f) if gradient else f) for n, f in _attentions(length, block_size).items()
        }
        best = {name: _cpu_seconds(function, *qkv) for name, function in functions.items()}
        for _ in range(REPETITIONS):
            best = {name: min(best[name], _cpu_seconds(function, *qkv)) for name, function in functions.items()}
        labels = {"length": length, "real": block_size, "gradient": gradient}
        append_row({"stage": "time", **labels, **{name: round(1e3 * value, 2) for name, value in best.items()}})


def _attentions(length: int, block_size: int) -> dict[str, Any]:
    positions, segments = jnp.arange(length)[None], jnp.ones((1, length), jnp.int32)

    def landmark(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return landmark_attention(q, k, v, block_size=block_size, positions=positions, segment_ids=segments)

    def full(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return window_attention(q, k, v, segment_ids=segments)[0]

    return {"landmark": landmark, "full": full}


def _with_gradient(attention: Any) -> Any:
    return jax.grad(lambda q, k, v: (attention(q, k, v) ** 2).sum(), (0, 1, 2))


def _cpu_seconds(attention: Any, *inputs: jax.Array) -> float:
    start = time.process_time()
    jax.block_until_ready(attention(*inputs))
    return time.process_time() - start


STAGES = {"train": train_variants, "recall": measure_recall, "offload": measure_offload, "time": measure_time}

if __name__ == "__main__":
    for stage in sys.argv[1:] or STAGES:
        STAGES[stage]()
