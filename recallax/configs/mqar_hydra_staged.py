"""Does waking Hydra's parts one after the other beat all of them on from the first step?

Hydra's parts at the size of `mqar_micro`, as in `experiments/hydra_parts`: width 32, windows of 8 and 8 chosen tokens,
4 experts by chunks of 8, 16 slots written every 8 tokens, 64 product keys. The control is `mqar_hydra_at_once`, of as
many steps. Expected: nothing is published; the staged run meets the final rows later, so it has to gain from the stages
what it loses by them. Measured: it does not (`experiments/staging`). Cost: some three minutes on a CPU core.

Hydra (arXiv 2508.15099) says that training is staged so that the parts wake stably, and starts the gates of attention
and experts at .2 and .5; which stages, how long, and on what is chosen here:

    ssm         embedding and state-space models alone, gates of attention and experts at 0, facts shut, on short rows;
                until the loss on valid has settled
    attention   its gate rises from 0 to .2
    experts     theirs rises from 0 to .5, with twice the weight on balance
    workspace   whose output starts at 0, on rows of four of its chunks
    facts       the gate of the product keys opens from sigmoid(-6) to sigmoid(-2)
    all         everything learns, the gates too, on the rows of the run

What wakes goes on training with what woke before. The experts start as drawn, not as copies of one perceptron, and the
router has no temperature.

    recallax train mqar_hydra_staged
    recallax train mqar_hydra_at_once
    recallax show mqar_hydra_staged                                          the stages and what trains in each
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
"""A router that nothing listens to has nothing to balance."""


class StageSteps(NamedTuple):
    """Steps of the stages before the last."""

    ssm: tuple[int, int]
    """At least, and at most."""
    attention: int
    experts: int
    workspace: int
    facts: int


def hydra_stages(steps: StageSteps, short_task: Task, medium_task: Task) -> Curriculum:
    """See the head of the file; `short_task` is for the first two stages, `medium_task` for the two after them."""
    least, most = steps.ssm
    return Curriculum(
        stages=(
            Stage(
                name="ssm",
                frozen=(ATTENTION, EXPERTS, WORKSPACE, FACTS),
                ramps=(*GATES_OFF, FACTS_OFF),
                task=short_task,
                loss_weights=NO_ROUTER_LOSSES,
                until=MetricPlateau(patience=2, min_delta=0.01, min_steps=least, max_steps=most),
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
    """MQAR of these lengths and pairs, in all splits."""
    segments = tuple(MixtureSlice(length=length, num_kv_pairs=pairs) for length, pairs in length_and_pairs)
    return MQAR(vocab_size=vocab_size, mixture=segments, test_mixture=segments)


def joint_training_run() -> RunConfig:
    """The same model, rows and steps without stages."""
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
