"""Tokens per second and bytes of state per sequence against context: the constant states beside attention's cache.

    python -m benchmarks.generate     measure on one thread, and append rows to results/generate.jsonl

Two layers of width 128 with two heads, 256 ids, float32. A context is read once, in pieces, and forked into rows, which
then write together; a model's turn is one generation, and the models take turns.
"""

import json
import os
import statistics
import time
from pathlib import Path

os.environ |= {"PJRT_NPROC": "1", "NPROC": "1", "OMP_NUM_THREADS": "1"}

import jax
import numpy as np
from flax import nnx

from benchmarks.machine import described
from recallax.layers import Attention, Based, GatedDeltaNet, Mamba2, MixerConfig, MoM, SlidingWindow
from recallax.models import Block, LMConfig, accounting
from recallax.models.generation import Generator, Standing
from recallax.models.prompts import padded
from recallax.train.log import commit

RESULTS = Path(__file__).parent / "results" / "generate.jsonl"
CONTEXTS = (512, 2048, 8192, 32_768)
PIECE, ROWS, NEW, ROUNDS = 512, 4, 64, 3
WIDTH, VOCAB = 128, 256
CELL = GatedDeltaNet(heads=2)
MIXERS: dict[str, MixerConfig] = {
    "attention": Attention(heads=2),
    "based": Based(heads=2),
    "gated_delta_net": CELL,
    "mamba2": Mamba2(state_dim=64, head_dim=64),
    "mom": MoM(memory=CELL, num_memories=4, top_k=2),
}


def main() -> None:
    for context in CONTEXTS:
        for row in measure(context):
            row |= described() | {"jax": jax.__version__, "commit": commit()}
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def measure(context: int) -> list[dict]:
    """A row per model, with its ratios to attention in the same turns."""
    generators = {name: Generator(config(name).build(nnx.Rngs(0)), max_len=context + NEW) for name in MIXERS}
    read, begun = {}, {}
    for name, generator in generators.items():
        read[name], begun[name] = reading(generator, context)
        generator.generate(begun[name], NEW)  # compiled
    seconds: dict[str, list[float]] = {name: [] for name in MIXERS}
    for _ in range(ROUNDS):
        for name, generator in generators.items():
            time.sleep(0.3)  # what the last one held is given back meanwhile, and not on this one's account
            begin = time.process_time()
            jax.block_until_ready(generator.generate(begun[name], NEW).after)
            seconds[name].append(time.process_time() - begin)
    cache = accounting.state_bytes(config("attention"), context)
    rows = []
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(seconds["attention"], taken, strict=True)]
        state = accounting.state_bytes(config(name), context)
        rows.append(
            {
                "model": name,
                "context": context,
                "tokens_per_second": round(ROWS * NEW / min(taken)),
                "median": round(ROWS * NEW / statistics.median(taken)),
                "times_attention": round(min(seconds["attention"]) / min(taken), 2),
                "by_turns": [round(min(ratios), 2), round(max(ratios), 2)],
                "read_tokens_per_second": round(context / read[name]),
                "state_bytes": state,
                "attention_bytes_ratio": round(cache / state, 1),
            }
        )
    return rows


def config(name: str) -> LMConfig:
    """The model whose layers are that mixer; BASED's are one and a window of 64 tokens."""
    blocks = {"mixer": Block(mixer=MIXERS[name]), "window": Block(mixer=SlidingWindow(window=64, heads=2))}
    pattern = "mixer window" if name == "based" else "mixer*2"
    return LMConfig(d_model=WIDTH, vocab_size=VOCAB, pattern=pattern, blocks=blocks)


def reading(generator: Generator, context: int) -> tuple[float, Standing]:
    """CPU seconds of reading the context, compiled already, and where it leaves `ROWS` rows."""
    tokens = np.random.default_rng(0).integers(VOCAB, size=context)
    jax.block_until_ready(generator.prefill(padded([tokens[:PIECE]]), piece=PIECE))
    begin = time.process_time()
    begun = jax.block_until_ready(generator.prefill(padded([tokens]), piece=PIECE))
    return time.process_time() - begin, generator.fork(begun, [0] * ROWS)


if __name__ == "__main__":
    main()
