"""Hydra on a small MQAR, with a curriculum that adds its parts one after the other.

Question: does staged training help? Hydra's parts at the size of `mqar_micro`, as in `experiments/hydra_parts`: width
32, windows of 8 and 8 selected tokens, 4 experts per chunks of 8 tokens, 16 slots written every 8 tokens, 64 product
keys. The control is `mqar_hydra_at_once`, which has as many steps. Expected: no published result; the staged run trains
on the final rows for fewer steps, so the stages must gain more than that costs. Measured: they do not
(`experiments/hydra_curriculum`). Cost: about three minutes on one CPU core.

Hydra (arXiv 2508.15099) states that training is staged for stability, and initializes the gates of attention and
experts to 0.2 and 0.5. The stages, their lengths and their tasks are chosen here:

    ssm         embedding and state-space models only, gates of attention and experts at 0, product keys closed, on
                short rows, until the loss on valid stops improving
    attention   its gate rises from 0 to 0.2
    experts     their gate rises from 0 to 0.5, with twice the weight of the load-balancing loss
    workspace   its output starts at 0; on rows of four of its chunks
    facts       the gate of the product keys opens from sigmoid(-6) to sigmoid(-2)
    all         all parameters train, the gates too, on the rows of the run

A part that has started to train continues in all later stages. Experts are initialized independently, not as copies of
one perceptron, and the router has no temperature.

    recallax train mqar_hydra_staged
    recallax train mqar_hydra_at_once
    recallax show mqar_hydra_staged                                          the stages and their parameters
    recallax train mqar_hydra_staged --curriculum.stages.1.until.steps 600
"""

from dataclasses import replace
from typing import NamedTuple

from recallax.configs import mqar_hydra, mqar_micro
from recallax.layers import (
    ChunkExperts,
    DiagonalSSM,
    ProductKeys,
    SparseGlobalAttention,
    Workspace,
)
from recallax.models import LMConfig
from recallax.models.hydra_lm import hydra_blocks
from recallax.models.zoology_lm import CONV_BLOCK
from recallax.tasks import MQAR, MixtureSlice, Task
from recallax.train.curriculum.stages import AfterSteps, Curriculum, MetricPlateau, Ramp, Stage
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train, tiny_run

ATTENTION, EXPERTS, WORKSPACE, FACTS = (
    "*.paths.attention.*",
    "*.paths.experts.*",
    "blocks.workspace.*",
    "blocks.facts.*",
)
GATES_OFF = tuple(Ramp(gate=f"*.gates.{name}", start=0.0, end=0.0) for name in ("attention", "experts"))
FACTS_OFF = Ramp(gate="blocks.facts.mixer.gate.bias", start=-100.0, end=-100.0)
NO_ROUTER_LOSSES = {"expert_balance": 0.0, "expert_z": 0.0}
"""Loss weights for stages in which the output of the experts is not used."""


class StageSteps(NamedTuple):
    """Number of steps of each stage before the last."""

    ssm: tuple[int, int]
    """Minimum and maximum."""
    attention: int
    experts: int
    workspace: int
    facts: int


def hydra_stages(steps: StageSteps, short_task: Task, medium_task: Task) -> Curriculum:
    """Return the stages ssm, attention, experts, workspace, facts and all.

    Args:
        steps: Number of steps of each stage before the last.
        short_task: Task of the first two stages.
        medium_task: Task of the two stages after them.

    Returns:
        The curriculum.
    """
    min_steps, max_steps = steps.ssm
    return Curriculum(
        stages=(
            Stage(
                name="ssm",
                frozen=(ATTENTION, EXPERTS, WORKSPACE, FACTS),
                ramps=(*GATES_OFF, FACTS_OFF),
                task=short_task,
                loss_weights=NO_ROUTER_LOSSES,
                until=MetricPlateau(patience=2, min_delta=0.01, min_steps=min_steps, max_steps=max_steps),
            ),
            Stage(
                name="attention",
                frozen=(EXPERTS, WORKSPACE, FACTS),
                ramps=(Ramp(gate="*.gates.attention", start=0.0, end=0.2), GATES_OFF[1], FACTS_OFF),
                task=short_task,
                loss_weights=NO_ROUTER_LOSSES,
                until=AfterSteps(steps=steps.attention),
            ),
            Stage(
                name="experts",
                frozen=(WORKSPACE, FACTS),
                ramps=(Ramp(gate="*.gates.experts", start=0.0, end=0.5), FACTS_OFF),
                task=medium_task,
                loss_weights={"expert_balance": 2.0},
                until=AfterSteps(steps=steps.experts),
            ),
            Stage(
                name="workspace",
                frozen=(FACTS,),
                ramps=(FACTS_OFF,),
                task=medium_task,
                until=AfterSteps(steps=steps.workspace),
            ),
            Stage(
                name="facts",
                ramps=(Ramp(gate="blocks.facts.mixer.gate.bias", start=-6.0, end=-2.0),),
                until=AfterSteps(steps=steps.facts),
            ),
            Stage(name="all"),
        )
    )


def mqar_rows(vocab_size: int, *length_and_pairs: tuple[int, int]) -> MQAR:
    """Return MQAR with rows of given lengths and numbers of pairs, in all splits.

    Args:
        vocab_size: Number of token ids.
        *length_and_pairs: Length in tokens and number of key/value pairs of each slice.
    """
    slices = tuple(MixtureSlice(length=length, num_kv_pairs=pairs) for length, pairs in length_and_pairs)
    return MQAR(vocab_size=vocab_size, mixture=slices, test_mixture=slices)


def joint_training_run() -> RunConfig:
    """Return the control: the same model, rows and steps without stages."""
    blocks = hydra_blocks(
        DiagonalSSM(max_timescale=32.0),
        SparseGlobalAttention(window=8, top_k=8, block_size=4, rope_theta=None),
        ChunkExperts(num_experts=4, intermediate_size=16, chunk_size=8),
        Workspace(num_slots=16, slot_dim=32, chunk_size=8),
        ProductKeys(num_sub_keys=8, num_heads=2, head_k_dim=16, value_dim=32, top_k=4),
    )
    return replace(
        mqar_micro.get_config(),
        model=LMConfig(d_model=32, pattern="conv ssm workspace facts all", blocks=blocks | {"conv": CONV_BLOCK}),
        optim=AdamW(lr=1e-2),
        train=Train(steps=3000, batch_size=64),
        evaluate=Evaluate(every=100),
    )


def joint_training_run_tiny() -> RunConfig:
    """Return the tiny form of the control."""
    model = mqar_hydra.get_tiny().model
    config = tiny_run(joint_training_run(), task=mqar_rows(32, (16, 2)), model=model)
    return replace(config, train=replace(config.train, steps=12))


def get_config() -> RunConfig:
    steps = StageSteps(ssm=(300, 600), attention=400, experts=300, workspace=300, facts=200)
    stages = hydra_stages(steps, short_task=mqar_rows(64, (16, 2)), medium_task=mqar_rows(64, (32, 4)))
    return replace(joint_training_run(), curriculum=stages)


def get_tiny() -> RunConfig:
    steps = StageSteps(ssm=(1, 3), attention=2, experts=2, workspace=1, facts=2)
    return replace(
        joint_training_run_tiny(),
        curriculum=hydra_stages(steps, short_task=mqar_rows(32, (8, 1)), medium_task=mqar_rows(32, (16, 2))),
    )
