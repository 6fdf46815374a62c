"""What is compared: the same small model around three kinds of attention, and how each is trained.

`conv mixer*2` of width 64 without positions: a short convolution and two layers of one head. The landmark reads k
blocks of 15 tokens and its own block; the window has as many slots as that is at k = 4, landmarks included. Training
has two stages, since rows of 256 alone teach nothing for long: rows of 64 tokens with 4 facts, then rows of 256 with 8.
"""

from dataclasses import replace

from experiments.cell import Row
from recallax.config import fingerprint
from recallax.layers import Attention, BaseConv, Identity, Landmark, MixerConfig, SlidingWindow
from recallax.models import Block, LMConfig
from recallax.tasks import KeyRetrieval
from recallax.train.program import Program
from recallax.train.run import AdamW, Evaluate, RunConfig, Train
from recallax.train.step import TrainState

RATES = (4e-3, 8e-3, 1.6e-2)
REAL, TOP_K = 15, 4
ARMS: dict[str, MixerConfig] = {
    "landmark": Landmark(landmark_every=REAL, rotary_base=None, top_k=TOP_K),
    "attention": Attention(rotary_base=None),
    "window": SlidingWindow(window=(TOP_K + 1) * (REAL + 1), rotary_base=None),
}
STEPS = {"landmark": (2000, 400), "attention": (800, 300), "window": (800, 300)}
"""Of the two stages; the landmark has two things to learn, of which full attention needs one."""
LONG = KeyRetrieval(words=32, train=((256, 8),), test=((256, 1), (256, 8)))


def model(mixer: MixerConfig) -> LMConfig:
    """The model around a mixer."""
    blocks = {
        "conv": Block(mixer=BaseConv(width=3), channel=Identity()),
        "mixer": Block(mixer=mixer, channel=Identity()),
    }
    return LMConfig(d_model=64, pattern="conv mixer*2", blocks=blocks)


def stages(arm: str, lr: float, seed: int = 0) -> tuple[RunConfig, RunConfig]:
    """Both runs of an arm at a rate."""
    first, second = STEPS[arm]
    short = replace(LONG, train=((64, 4),), test=((64, 4),))
    run = RunConfig(
        task=short,
        model=model(ARMS[arm]),
        optim=AdamW(lr=lr),
        train=Train(steps=first, batch_size=32, seed=seed, data_seed=seed),
        evaluate=Evaluate(batches=8, batch_size=32),
    )
    longer = replace(run, task=LONG, train=replace(run.train, steps=second, batch_size=16))
    return run, replace(longer, optim=replace(run.optim, lr=lr / 2))


def train(arm: str, lr: float, seed: int = 0) -> tuple[Program, TrainState, Row]:
    """Both stages from scratch: the trained state, and what it scores in its training form."""
    import time

    begin, used = time.monotonic(), time.process_time()
    state, scores, program = None, {}, None
    for number, config in enumerate(stages(arm, lr, seed), 1):
        program = Program(config)
        start = program.initial()
        state = start if state is None else start._replace(params=state.params)
        for index in range(config.train.steps):
            state, _ = program.step(state, program.batch(index))
        scores[f"stage {number}"] = program.evaluate(state, "valid")
    assert program is not None and state is not None
    return (
        program,
        state,
        {
            "arm": arm,
            "lr": lr,
            "seed": seed,
            "config": fingerprint(program.config),
            **scores,
            "skipped": int(state.skipped),
            "seconds": round(time.monotonic() - begin, 1),
            "cpu_seconds": round(time.process_time() - used, 1),
        },
    )


def best_rate(rows: list[Row], arm: str) -> float:
    """The rate whose second stage is best on valid, over rows with one fact and with eight."""
    found = [row for row in rows if row["arm"] == arm]
    if not found:
        raise ValueError(f"no row of arm {arm!r}; run the stage train first")
    return max(found, key=lambda row: row["stage 2"]["accuracy"])["lr"]
