"""The compared models and their training: one small model around three kinds of attention.

`conv mixer*2` of width 64 without positions: a short convolution and two layers of one head. Landmark attention reads k
blocks of 15 tokens and its own block. The window has as many slots as that at k = 4, landmarks included. A model is
trained in two runs, because training on rows of 256 tokens alone improves very slowly: first on rows of 64 tokens with
4 facts, then on rows of 256 tokens with 8.
"""

import time
from dataclasses import replace
from pathlib import Path

from recallax.config import fingerprint
from recallax.layers import Attention, BaseConv, Identity, Landmark, MixerConfig, SlidingWindow
from recallax.models import Block, LMConfig
from recallax.sweep import ResultRow, Trial, result_row
from recallax.tasks import KeyRetrieval
from recallax.train.loop import restore_run, train
from recallax.train.program import Program
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train
from recallax.train.training_run import initialize_run

RATES = (4e-3, 8e-3, 1.6e-2)
BLOCK_TOKENS, TOP_K = 15, 4
VARIANTS: dict[str, MixerConfig] = {
    "landmark": Landmark(block_size=BLOCK_TOKENS, rope_theta=None, top_k=TOP_K),
    "attention": Attention(rope_theta=None),
    "window": SlidingWindow(window=(TOP_K + 1) * (BLOCK_TOKENS + 1), rope_theta=None),
}
STEPS = {"landmark": (2000, 400), "attention": (800, 300), "window": (800, 300)}
"""Steps of the two runs. Landmark attention must learn what a block holds and which block to read, so it has more."""
LONG_TASK = KeyRetrieval(num_words=32, train_slices=((256, 8),), test_slices=((256, 1), (256, 8)))


def lm_config(mixer: MixerConfig) -> LMConfig:
    """Return the model around a mixer."""
    blocks = {
        "conv": Block(mixer=BaseConv(conv_size=3), channel=Identity()),
        "mixer": Block(mixer=mixer, channel=Identity()),
    }
    return LMConfig(d_model=64, pattern="conv mixer*2", blocks=blocks)


def stage_configs(variant: str, lr: float, seed: int = 0) -> tuple[RunConfig, RunConfig]:
    """Return the two runs of a variant.

    Args:
        variant: A key of `VARIANTS`.
        lr: Peak learning rate of the first run; the second has half of it.
        seed: Seed of the parameters and of the data.

    Returns:
        The runs on short and on long rows.
    """
    first, second = STEPS[variant]
    short = replace(LONG_TASK, train_slices=((64, 4),), test_slices=((64, 4),))
    run = RunConfig(
        task=short,
        model=lm_config(VARIANTS[variant]),
        optim=AdamW(lr=lr),
        train=Train(steps=first, batch_size=32, seed=seed, data_seed=seed),
        evaluate=Evaluate(batches=8, batch_size=32),
    )
    longer = replace(run, task=LONG_TASK, train=replace(run.train, steps=second, batch_size=16))
    return run, replace(longer, optim=replace(run.optim, lr=lr / 2))


def train_variant(variant: str, lr: float, folder: Path, seed: int = 0) -> ResultRow:
    """Train both runs of a variant, the second from the parameters of the first.

    Args:
        variant: A key of `VARIANTS`.
        lr: Peak learning rate of the first run.
        folder: Parent of the run folders `stage_1` and `stage_2`.
        seed: Seed of the parameters and of the data.

    Returns:
        The metrics of both runs on the valid split, in the training form, and the time spent in seconds.
    """
    start, cpu_start, metrics, rows = time.monotonic(), time.process_time(), {}, []
    configs = stage_configs(variant, lr, seed)
    for number, config in enumerate(configs, 1):
        if number == 2:
            _, first = restore_run(folder / "stage_1")
            state = first.state
            initialize_run(folder / "stage_2", Program(config), state.params, state.statistics, exist_ok=True)
        train(config, folder / f"stage_{number}", name=f"{variant} {lr:g} stage {number}")
        rows.append(result_row(Trial({}, config), folder / f"stage_{number}"))
        metrics[f"stage {number}"] = rows[-1]["valid"]
    return {
        "arm": variant,
        "lr": lr,
        "seed": seed,
        "config": fingerprint(configs[-1]),
        **metrics,
        "skipped": rows[-1]["skipped"],
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu_start, 1),
    }


def best_rate(rows: list[ResultRow], variant: str) -> float:
    """Select a variant's learning rate.

    Args:
        rows: Rows of the stage `train`.
        variant: A key of `VARIANTS`.

    Returns:
        The learning rate whose second run is best on the valid split, over rows with one fact and with eight.

    Raises:
        ValueError: The variant has no row.
    """
    own = [row for row in rows if row["arm"] == variant]
    if not own:
        raise ValueError(f"no row has the variant {variant!r}; run the stage train first")
    return max(own, key=lambda row: row["stage 2"]["accuracy"])["lr"]
