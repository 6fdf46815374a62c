"""Recall with and without each part of Hydra.

The tasks are `mqar_micro`, and eight needles that are beyond the attention window and selection. Stages: three learning
rates for every variant with one seed, then the best on valid with a second seed. All variants start with the short
convolution of Zoology's hybrids and have equal numbers of parameters: an MLP is made wider for parts that are missing.
"""

from dataclasses import replace
from functools import cache

from experiments.results import best_row
from recallax.configs import mqar_micro
from recallax.layers import (
    Attention,
    ChunkExperts,
    DiagonalSSM,
    KeyScore,
    MixerConfig,
    NoChannelMixer,
    Parallel,
    ProductKeys,
    QueryDependentSelector,
    SlidingWindow,
    SparseGlobalAttention,
    SwiGLU,
    Workspace,
)
from recallax.models import Block, LMConfig, accounting
from recallax.models.hydra_lm import hydra_blocks
from recallax.models.zoology_lm import CONV_BLOCK
from recallax.sweep import ResultRow, SweepStage, Trial
from recallax.tasks import Task
from recallax.tasks.key_retrieval import KeyRetrieval
from recallax.train.run_config import AdamW, RunConfig

RATES = (4e-3, 1e-2, 2.5e-2)
SEEDS = (1,)
STEPS = 1500
NEEDLES = ((48, 8),)
TASKS: dict[str, tuple[Task, int]] = {
    "mqar": (mqar_micro.get_config().task, 8),
    "needles": (
        KeyRetrieval(num_words=16, num_names=8, train_slices=NEEDLES, queries_per_fact=1, test_slices=NEEDLES),
        4,
    ),
}
"""Task, and the number of tokens of the window, the selection and a chunk."""
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
OTHER_VARIANTS = {"+ window alone": "conv window", "+ tokens asked for": "conv asked", "+ key selection": "conv keys"}
PATTERNS = PARTS | CONTROLS | OTHER_VARIANTS
VARIANTS = {"mqar": tuple(PATTERNS), "needles": (*PARTS, *CONTROLS)}
WIDTH, INTERMEDIATE_SIZE = 32, 16
"""Model width, and MLP width of the variant with all parts; other variants have wider MLPs."""


def grid(rows: list[ResultRow]) -> list[Trial]:
    """Return every variant at every learning rate with seed 0."""
    return [_trial("grid", task, name, rate, 0) for task, names in VARIANTS.items() for name in names for rate in RATES]


def seeds(rows: list[ResultRow]) -> list[Trial]:
    """Return other seeds of every variant at its best learning rate."""
    best = {
        (task, name): best_row(rows, "grid", task=task, mixer=name)
        for task, names in VARIANTS.items()
        for name in names
    }
    return [_trial("seeds", *variant, row["lr"], seed) for variant, row in best.items() for seed in SEEDS]


def _trial(stage: str, task: str, name: str, rate: float, seed: int) -> Trial:
    labels = {"stage": stage, "task": task, "mixer": name, "lr": rate, "seed": seed}
    return Trial(labels, _run(task, name, rate, seed))


def _run(task: str, name: str, rate: float, seed: int) -> RunConfig:
    base = mqar_micro.get_config()
    train = replace(base.train, steps=STEPS, seed=seed, data_seed=seed)
    return replace(base, task=TASKS[task][0], model=parameter_matched(task, name), optim=AdamW(lr=rate), train=train)


@cache
def parameter_matched(task: str, name: str) -> LMConfig:
    """Return a variant with the MLP width that gives the number of parameters of the variant with all parts.

    Args:
        task: A key of `TASKS`.
        name: A key of `PATTERNS`.

    Returns:
        The model.
    """
    vocab_size = TASKS[task][0].vocab_size
    smallest, next_larger = (accounting.count_parameters(_model(task, name, width), vocab_size) for width in (1, 2))
    target = accounting.count_parameters(_model(task, "all parts", INTERMEDIATE_SIZE), vocab_size)
    return _model(task, name, 1 + round((target - smallest) / (next_larger - smallest)))


def _model(task: str, name: str, intermediate_size: int) -> LMConfig:
    num_tokens = TASKS[task][1]
    ssm = DiagonalSSM(max_timescale=32.0)
    sparse = SparseGlobalAttention(window=num_tokens, top_k=num_tokens, block_size=4, rope_theta=None)
    attentions: dict[str, MixerConfig] = {
        "window": SlidingWindow(window=num_tokens, rope_theta=None),
        "wider": SlidingWindow(window=2 * num_tokens, rope_theta=None),
        "everything": Attention(rope_theta=None),
        "asked": replace(sparse, selector=QueryDependentSelector(score_dim=16), cache="full"),
        "keys": replace(sparse, selector=KeyScore(hidden_size=32)),
    }
    blocks = hydra_blocks(
        ssm,
        sparse,
        ChunkExperts(num_experts=4, intermediate_size=16, chunk_size=num_tokens),
        Workspace(num_slots=16, slot_dim=32, chunk_size=num_tokens),
        ProductKeys(num_sub_keys=8, num_heads=2, head_k_dim=16, value_dim=32, top_k=4),
    ) | {
        key: Block(mixer=Parallel(ssm=ssm, attention=part), channel=NoChannelMixer())
        for key, part in attentions.items()
    }
    last_mixer = next(key for key in PATTERNS[name].split() if key not in ("conv", "workspace", "facts"))
    blocks[last_mixer] = replace(blocks[last_mixer], channel=SwiGLU(intermediate_size=intermediate_size))
    return LMConfig(d_model=WIDTH, pattern=PATTERNS[name], blocks=blocks | {"conv": CONV_BLOCK})


STAGES: tuple[SweepStage, ...] = (grid, seeds)
