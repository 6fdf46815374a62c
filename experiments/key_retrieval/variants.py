"""What is compared: the same small model around three kinds of attention, and how each is trained.

`conv mixer*2` of width 64 without positions: a short convolution and two layers of one head. The landmark reads k
blocks of 15 tokens and its own block; the window has as many slots as that is at k = 4, landmarks included. Training
has two stages, since rows of 256 alone teach nothing for long: rows of 64 tokens with 4 facts, then rows of 256 with 8.
"""

from dataclasses import replace

from experiments.train_cell import ResultRow
from recallax.config import fingerprint
from recallax.layers import Attention, BaseConv, Identity, Landmark, MixerConfig, SlidingWindow
from recallax.models import Block, LMConfig
from recallax.tasks import KeyRetrieval
from recallax.train.program import Program
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train
from recallax.train.step import TrainState

RATES = (4e-3, 8e-3, 1.6e-2)
BLOCK_TOKENS, TOP_K = 15, 4
VARIANTS: dict[str, MixerConfig] = {
    "landmark": Landmark(block_size=BLOCK_TOKENS, rope_theta=None, top_k=TOP_K),
    "attention": Attention(rope_theta=None),
    "window": SlidingWindow(window=(TOP_K + 1) * (BLOCK_TOKENS + 1), rope_theta=None),
}
STEPS = {"landmark": (2000, 400), "attention": (800, 300), "window": (800, 300)}
"""Of the two stages; the landmark has two things to learn, of which full attention needs one."""
LONG_TASK = KeyRetrieval(num_words=32, train_slices=((256, 8),), test_slices=((256, 1), (256, 8)))


def lm_config(mixer: MixerConfig) -> LMConfig:
    """The model around a mixer."""
    blocks = {
        "conv": Block(mixer=BaseConv(conv_size=3), channel=Identity()),
        "mixer": Block(mixer=mixer, channel=Identity()),
    }
    return LMConfig(d_model=64, pattern="conv mixer*2", blocks=blocks)


def stage_configs(variant: str, lr: float, seed: int = 0) -> tuple[RunConfig, RunConfig]:
    """Both runs of an arm at a rate."""
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


def train_variant(variant: str, lr: float, seed: int = 0) -> tuple[Program, TrainState, ResultRow]:
    """Both stages from scratch: the trained state, and what it scores in its training form."""
    import time

    begin, used = time.monotonic(), time.process_time()
    state, scores, program = None, {}, None
    for number, config in enumerate(stage_configs(variant, lr, seed), 1):
        program = Program(config)
        start = program.init_state()
        state = start if state is None else start._replace(params=state.params)
        for index in range(config.train.steps):
            state, _ = program.step(state, program.batch(index))
        scores[f"stage {number}"] = program.evaluate(state, "valid")
    assert program is not None and state is not None
    return (
        program,
        state,
        {
            "arm": variant,
            "lr": lr,
            "seed": seed,
            "config": fingerprint(program.config),
            **scores,
            "skipped": int(state.skipped),
            "seconds": round(time.monotonic() - begin, 1),
            "cpu_seconds": round(time.process_time() - used, 1),
        },
    )


def best_rate(rows: list[ResultRow], variant: str) -> float:
    """The rate whose second stage is best on valid, over rows with one fact and with eight."""
    found = [row for row in rows if row["arm"] == variant]
    if not found:
        raise ValueError(f"no row of arm {variant!r}; run the stage train first")
    return max(found, key=lambda row: row["stage 2"]["accuracy"])["lr"]
