"""What each part of Hydra buys: on `mqar_micro`, and on eight needles that lie beyond its window and selection.

Stages: three learning rates for every arm; then a second seed at the rate that is best on valid. All arms begin with
the short convolution of Zoology's hybrids and have as many parameters: what a part does not take, a perceptron gets.
"""

from dataclasses import replace
from functools import cache

from experiments.cell import Cell, Row, Stage, best
from recallax.configs import mqar_micro
from recallax.layers import (
    AskedTokens,
    Attention,
    ChunkExperts,
    DiagonalSSM,
    KeyScore,
    MixerConfig,
    Nothing,
    Parallel,
    ProductKeys,
    SlidingWindow,
    SparseGlobalAttention,
    SwiGLU,
    Workspace,
)
from recallax.models import Block, LMConfig, accounting
from recallax.models.hydra import hydra_blocks
from recallax.models.zoology import CONV
from recallax.tasks import Task
from recallax.tasks.key_retrieval import KeyRetrieval
from recallax.train.run import AdamW, RunConfig

RATES = (4e-3, 1e-2, 2.5e-2)
SEEDS = (1,)
STEPS = 1500
NEEDLES = ((48, 8),)
TASKS: dict[str, tuple[Task, int]] = {
    "mqar": (mqar_micro.get_config().task, 8),
    "needles": (KeyRetrieval(words=16, names=8, train=NEEDLES, asked=1, test=NEEDLES), 4),
}
"""With the number of tokens that the window, the selection and a chunk have."""
PARTS = {
    "state-space model": "conv ssm",
    "+ sparse attention": "conv attention",
    "+ experts": "conv experts",
    "+ workspace": "conv ssm workspace",
    "+ workspace in front": "conv workspace ssm",
    "+ product keys": "conv ssm facts",
    "all parts": "conv all workspace facts",
}
CONTROLS = {
    "+ window of as many": "conv wider",
    "+ attention to all": "conv everything",
}
OTHERS = {"+ window alone": "conv window", "+ tokens asked for": "conv asked", "+ key selection": "conv keys"}
PATTERNS = PARTS | CONTROLS | OTHERS
ARMS = {"mqar": tuple(PATTERNS), "needles": (*PARTS, *CONTROLS)}
WIDTH, INNER = 32, 16
"""INNER: of the perceptron in the model with all parts; the others' are wider."""


def grid(rows: list[Row]) -> list[Cell]:
    return [_cell("grid", task, name, rate, 0) for task, names in ARMS.items() for name in names for rate in RATES]


def seeds(rows: list[Row]) -> list[Cell]:
    found = {(task, name): best(rows, "grid", task=task, mixer=name) for task, names in ARMS.items() for name in names}
    return [_cell("seeds", *arm, row["lr"], seed) for arm, row in found.items() for seed in SEEDS]


def _cell(stage: str, task: str, name: str, rate: float, seed: int) -> Cell:
    labels = {"stage": stage, "task": task, "mixer": name, "lr": rate, "seed": seed}
    return Cell(labels, _run(task, name, rate, seed))


def _run(task: str, name: str, rate: float, seed: int) -> RunConfig:
    base = mqar_micro.get_config()
    train = replace(base.train, steps=STEPS, seed=seed, data_seed=seed)
    return replace(base, task=TASKS[task][0], model=matched(task, name), optim=AdamW(lr=rate), train=train)


@cache
def matched(task: str, name: str) -> LMConfig:
    """The arm with a perceptron as wide as makes up for what it lacks beside all parts."""
    vocab = TASKS[task][0].vocab_size
    least, more = (accounting.parameters(_model(task, name, inner), vocab) for inner in (1, 2))
    wanted = accounting.parameters(_model(task, "all parts", INNER), vocab)
    return _model(task, name, 1 + round((wanted - least) / (more - least)))


def _model(task: str, name: str, inner: int) -> LMConfig:
    few = TASKS[task][1]
    ssm = DiagonalSSM(longest=32.0)
    sparse = SparseGlobalAttention(window=few, chosen=few, block=4, rotary_base=None)
    attentions: dict[str, MixerConfig] = {
        "window": SlidingWindow(window=few, rotary_base=None),
        "wider": SlidingWindow(window=2 * few, rotary_base=None),
        "everything": Attention(rotary_base=None),
        "asked": replace(sparse, selector=AskedTokens(width=16), cache="every token"),
        "keys": replace(sparse, selector=KeyScore(hidden=32)),
    }
    blocks = hydra_blocks(
        ssm,
        sparse,
        ChunkExperts(experts=4, inner=16, chunk=few),
        Workspace(slots=16, rank=32, chunk=few),
        ProductKeys(sub_keys=8, heads=2, key_dim=16, value_dim=32, top_k=4),
    ) | {key: Block(mixer=Parallel(ssm=ssm, attention=part), channel=Nothing()) for key, part in attentions.items()}
    filled = next(key for key in PATTERNS[name].split() if key not in ("conv", "workspace", "facts"))
    blocks[filled] = replace(blocks[filled], channel=SwiGLU(inner=inner))
    return LMConfig(d_model=WIDTH, pattern=PATTERNS[name], blocks=blocks | {"conv": CONV})


STAGES: tuple[Stage, ...] = (grid, seeds)
