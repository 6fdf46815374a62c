"""Measure generation against context, with constant states and with attention's cache: tokens per second, bytes.

    python -m benchmarks.generation_speed     measure on one thread, and append rows to results/generate.jsonl

Two layers of width 128 with two heads, 256 ids, float32. A context is read once, in pieces, and forked into rows, which
then generate together. The models run alternately, one generation each.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from benchmarks.machine import describe_machine, one_thread
from recallax.layers import Attention, Based, GatedDeltaNet, Mamba2, MixerConfig, MoM, SlidingWindow
from recallax.models import Block, LMConfig, accounting
from recallax.models.generation import DecodingState, Generator
from recallax.models.prompts import pad_prompts
from recallax.train.log import git_commit

DESCRIPTION = (__doc__ or "").split("\n")[0]
RESULTS = Path(__file__).parent / "results" / "generate.jsonl"
CONTEXTS = (512, 2048, 8192, 32_768)
PREFILL_CHUNK, ROWS, NEW_TOKENS, ROUNDS = 512, 4, 64, 3
WIDTH, VOCAB = 128, 256
CELL = GatedDeltaNet(num_heads=2)
MIXERS: dict[str, MixerConfig] = {
    "attention": Attention(num_heads=2),
    "based": Based(num_heads=2),
    "gated_delta_net": CELL,
    "mamba2": Mamba2(state_dim=64, head_dim=64),
    "mom": MoM(memory=CELL, num_memories=4, top_k=2),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation_speed", description=DESCRIPTION)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    parser.add_argument("--context", type=int, nargs="+", default=CONTEXTS, help="tokens before those generated")
    args = parser.parse_args(argv)
    one_thread()
    for context in args.context:
        for row in measure(context):
            row |= describe_machine() | {"jax": jax.__version__, "commit": git_commit()}
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def measure(context: int) -> list[dict]:
    """Measure all models after one context.

    Args:
        context: Tokens before those generated.

    Returns:
        A row per model, with its ratios to attention in the same rounds.
    """
    generators = {name: Generator(lm_config(name).build(nnx.Rngs(0)), max_len=context + NEW_TOKENS) for name in MIXERS}
    read_seconds, states = {}, {}
    for name, generator in generators.items():
        read_seconds[name], states[name] = timed_prefill(generator, context)
        generator.generate(states[name], NEW_TOKENS)  # compiled
    seconds: dict[str, list[float]] = {name: [] for name in MIXERS}
    for _ in range(ROUNDS):
        for name, generator in generators.items():
            time.sleep(0.3)  # the memory of the last model is freed meanwhile
            begin = time.process_time()
            jax.block_until_ready(generator.generate(states[name], NEW_TOKENS).state)
            seconds[name].append(time.process_time() - begin)
    cache = accounting.state_bytes(lm_config("attention"), context)
    rows = []
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(seconds["attention"], taken, strict=True)]
        state = accounting.state_bytes(lm_config(name), context)
        rows.append(
            {
                "model": name,
                "context": context,
                "tokens_per_second": round(ROWS * NEW_TOKENS / min(taken)),
                "median": round(ROWS * NEW_TOKENS / statistics.median(taken)),
                "times_attention": round(min(seconds["attention"]) / min(taken), 2),
                "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
                "read_tokens_per_second": round(context / read_seconds[name]),
                "state_bytes": state,
                "attention_bytes_ratio": round(cache / state, 1),
            }
        )
    return rows


def lm_config(name: str) -> LMConfig:
    """Return a model of two layers of a mixer in `MIXERS_MODULE`; of BASED one layer and a window of 64 tokens."""
    blocks = {"mixer": Block(mixer=MIXERS[name]), "window": Block(mixer=SlidingWindow(window=64, num_heads=2))}
    pattern = "mixer window" if name == "based" else "mixer*2"
    return LMConfig(d_model=WIDTH, vocab_size=VOCAB, pattern=pattern, blocks=blocks)


def timed_prefill(generator: Generator, context: int) -> tuple[float, DecodingState]:
    """Read a context after compiling.

    Args:
        generator: Of one model.
        context: Tokens.

    Returns:
        CPU seconds, and the state after it, forked into `ROWS` rows.
    """
    tokens = np.random.default_rng(0).integers(VOCAB, size=context)
    jax.block_until_ready(generator.prefill(pad_prompts([tokens[:PREFILL_CHUNK]]), chunk_size=PREFILL_CHUNK))
    begin = time.process_time()
    begun = jax.block_until_ready(generator.prefill(pad_prompts([tokens]), chunk_size=PREFILL_CHUNK))
    return time.process_time() - begin, generator.fork(begun, [0] * ROWS)


if __name__ == "__main__":
    main()
