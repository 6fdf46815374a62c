"""Curricula: the parameters that a stage changes, the end of a stage, and runs that resume in it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from recallax.cli.main import main
from recallax.config import ConfigError, fingerprint, from_json, to_json
from recallax.layers import Identity, NoChannelMixer, Parallel, ProductKeys, SwiGLU
from recallax.models import Block, LMConfig
from recallax.tasks import MQAR, MixtureSlice
from recallax.train import loop
from recallax.train.checkpoint import CheckpointError
from recallax.train.curriculum.parameter_masks import parameter_names
from recallax.train.curriculum.schedule import CurriculumSchedule, CurriculumState, curriculum_state_from_json
from recallax.train.curriculum.stage_phase import resolve_stages
from recallax.train.curriculum.stages import (
    AfterSteps,
    Curriculum,
    MetricPlateau,
    MetricReached,
    Ramp,
    Stage,
)
from recallax.train.loop import train
from recallax.train.metrics_logger import MetricsLogger
from recallax.train.phases import PhasePosition
from recallax.train.program import Program
from recallax.train.progress import make_progress
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train
from recallax.train.step import TrainState
from recallax.train.training_run import TrainingRun, initialize_run, open_run_files

pytestmark = pytest.mark.xdist_group("curriculum")  # one process: the tests share runs


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def mqar(length: int) -> MQAR:
    slices = (MixtureSlice(length=length, num_kv_pairs=2),)
    return MQAR(vocab_size=16, mixture=slices, test_mixture=slices)


MODEL = LMConfig(
    d_model=8,
    pattern="both*2 facts",
    blocks={
        "both": Block(mixer=Parallel(ssm=SwiGLU(intermediate_size=4), attention=Identity()), channel=NoChannelMixer()),
        "facts": Block(
            mixer=ProductKeys(num_sub_keys=3, num_heads=1, head_k_dim=4, value_dim=4, top_k=2), channel=NoChannelMixer()
        ),
    },
)
STAGES = (
    Stage(
        name="alone",
        frozen=("blocks.facts.*", "*.paths.ssm.out.*"),
        ramps=(Ramp(gate="*.gates.attention", start=0.0, end=0.0),),
        task=mqar(8),
        until=MetricReached(metric="loss", threshold=100.0, min_steps=3, max_steps=9),
    ),
    Stage(
        name="ramp",
        frozen=("embedding",),
        ramps=(Ramp(gate="*.gates.*", start=0.1, end=0.3),),
        until=AfterSteps(steps=3),
    ),
    Stage(name="settle", task=mqar(16), until=MetricPlateau(patience=1, min_delta=99.0, max_steps=7)),
    Stage(name="all", loss_weights={"next_token": 0.5}),
)
ENDS = (4, 7, 12)
"""Steps at which these stages end: the first evaluation at 3 or more, after 3 steps, the second evaluation."""
CONFIG = RunConfig(
    task=mqar(12),
    model=MODEL,
    optim=AdamW(lr=1e-2, warmup_ratio=0.1, max_grad_norm=0.5, eps=1e-10, b2=0.999),
    train=Train(steps=20, batch_size=8, log_every=3, save_every=3, seed=3),
    evaluate=Evaluate(every=4, batches=2, batch_size=8),
    curriculum=Curriculum(stages=STAGES),
)


def staged(*stages: Stage, **changes: Any) -> RunConfig:
    return replace(CONFIG, curriculum=Curriculum(stages=stages), **changes)


PROGRAMS: dict[str, Program] = {}


@pytest.fixture(autouse=True)
def compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "Program", compiled)


def compiled(config: RunConfig) -> Program:
    return PROGRAMS.setdefault(fingerprint(config), Program(config))


def copy_state(state: TrainState) -> TrainState:
    """Copy to the host, since a step donates its buffers."""
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def run_steps(program: Program, positions: list[PhasePosition]) -> list[TrainState]:
    """Return the initial state and the state after each step."""
    state = program.init_state()
    result = [copy_state(state)]
    for index, position in enumerate(positions):
        state, report = program.step(state, program.batch(index, position.index), position)
        assert report.finite.all()
        result.append(copy_state(state))
    return result


def leaves(tree: Any) -> dict[tuple, Any]:
    return flatten_dict(tree)


def bits(tree: Any) -> dict[tuple, bytes]:
    return {path: np.asarray(leaf).tobytes() for path, leaf in leaves(tree).items()}


def adam(state: TrainState) -> Any:
    (result,) = [s for s in jax.tree.leaves(state.optimizer, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    return result


# Parameters that a stage changes


@pytest.mark.full
def test_one_stage_of_all_parameters_equals_no_curriculum():
    """They are equal up to rounding, because XLA fuses Adam differently."""
    plain = compiled(replace(CONFIG, curriculum=None))
    state = plain.init_state()
    for index in range(4):
        state, _ = plain.step(state, plain.batch(index))
    whole = compiled(staged(Stage(name="all on")))
    other = run_steps(whole, [PhasePosition()] * 4)[-1]
    for one, two in ((copy_state(state).params, other.params), (adam(copy_state(state)).nu, adam(other).nu)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one, two)
    assert set(adam(other).counts.tolist()) == {4}


def test_frozen_parameters_are_unchanged_and_unfreeze_with_fresh_moments():
    program = compiled(CONFIG)
    before, _, after, *_, unfrozen = states = run_steps(program, [PhasePosition()] * 3 + [PhasePosition(2, 3)] * 2)
    names, _ = parameter_names(MODEL, 16)
    by_name = {path: called.layer_names[0] for path, called in names.items()}
    frozen = {path for path, name in by_name.items() if name.startswith("layers.2.") or ".paths.ssm.out." in name}
    gates = {path for path, name in by_name.items() if name.endswith("gates.attention")}
    assert len(gates) == 1 and len(frozen) > 4
    old, new = bits(before.params), bits(after.params)
    paths = list(leaves(before.params))
    counts = dict(zip(paths, adam(after).counts.tolist(), strict=True))
    for path, name in by_name.items():
        is_frozen = path in frozen | gates
        moments = [leaves(tree)[path] for tree in (adam(after).mu, adam(after).nu)]
        assert (old[path] == new[path]) == is_frozen or path in gates, name
        assert counts[path] == (0 if is_frozen else 2), name
        assert all(not np.any(m) for m in moments) == is_frozen, name
    assert not np.any(leaves(after.params)[next(iter(gates))])
    # The first update of the parameters that unfreeze in step 3 is as large as the learning rate, for any step count.
    (out,) = [path for path, name in by_name.items() if ".paths.ssm.out." in name]
    first, second = (leaves(states[i].params)[out] for i in (3, 4))
    rate = float(np.asarray(program.learning_rate(3)))
    decayed = first * (1 - rate * CONFIG.optim.weight_decay)
    update = np.abs(second - decayed)
    grad = np.abs(leaves(adam(states[4]).mu)[out])
    assert (grad > 1e-8).mean() > 0.5
    np.testing.assert_allclose(update[grad > 1e-8], rate, rtol=0.02)
    assert dict(zip(paths, adam(unfrozen).counts.tolist(), strict=True))[out] == 2


def test_frozen_negative_zeros_are_unchanged():
    """Adding an update of 0 would make them positive."""
    program = compiled(CONFIG)
    state = program.init_state()
    path = next(path for path in leaves(state.params) if "paths" in path and "out" in path)
    tree: Any = state.params
    for name in path[:-1]:
        tree = tree[name]
    tree[path[-1]] = jax.numpy.full_like(tree[path[-1]], -0.0)
    assert np.signbit(tree[path[-1]]).all()
    state, _ = program.step(state, program.batch(0))
    assert np.signbit(leaves(state.params)[path]).all()


def test_gates_are_ramped_and_then_trained():
    positions = [PhasePosition(1, 0)] * 5 + [PhasePosition(3, 5)] * 2
    states = run_steps(compiled(CONFIG), positions)
    gates = [leaves(s.params) for s in states]
    for name in ("ssm", "attention"):
        (path,) = [path for path in gates[0] if path[-2:] == ("gates", name)]
        result = [flat[path] for flat in gates[1:]]
        assert result[0].shape == (2,)  # two layers in one array
        np.testing.assert_array_equal(result[:5], np.array([[0.1] * 2, [0.2] * 2, *[[0.3] * 2] * 3], np.float32))
        assert (result[6] != np.float32(0.3)).all()
    assert CONFIG.curriculum is not None
    schedule = CurriculumSchedule(CONFIG.curriculum, CurriculumState(1, 10))
    assert [schedule.ramp_values(step)["*.gates.*"] for step in (11, 12, 13, 14)] == pytest.approx([0.1, 0.2, 0.3, 0.3])


def test_stage_has_its_own_loss_weights():
    program = compiled(CONFIG)
    for stage, factor in ((1, 1.0), (3, 0.5)):
        _, report = program.step(program.init_state(), program.batch(0, stage), PhasePosition(stage, 0))
        total, weight = report.terms["next_token"]
        assert float(report.loss) == pytest.approx(factor * float(total / weight), rel=1e-5)


# Whole runs


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Program", compiled)
        folder = tmp_path_factory.mktemp("staged") / "run"
        train(CONFIG, folder, name="staged")
        yield folder


def test_log_records_curriculum_stages(finished: Path):
    rows = read(finished)
    starts = [(row["step"], row["stage"], row["name"]) for row in rows if row.get("event") == "stage"]
    assert starts == [(0, 0, "alone"), (4, 1, "ramp"), (7, 2, "settle"), (12, 3, "all")]
    reasons = [row["reason"] for row in rows if row.get("event") == "stage"]
    assert reasons[0] == "the run begins" and "reached 100" in reasons[1] and reasons[2] == "after 3 steps"
    assert "valid loss settled at" in reasons[3]
    trained = [row for row in rows if row["kind"] == "train"]
    assert [(row["step"], row["stage"]) for row in trained] == [
        *((3, 0), (4, 0), (6, 1), (7, 1)),
        *((9, 2), (12, 2), (15, 3), (18, 3), (20, 3)),
    ]
    assert [row.get("ramp/*.gates.*") for row in trained] == pytest.approx([None, None, 0.2, 0.3, *[None] * 5])
    valid = [row for row in rows if row.get("split") == "valid"]
    assert all("group/L12_K2" in row for row in valid) and [row["step"] for row in valid] == [4, 8, 12, 16, 20]


def test_run_from_given_parameters_logs_the_first_stage(tmp_path: Path):
    program = compiled(CONFIG)
    state = program.init_state()
    initialize_run(tmp_path, program, state.params, state.statistics)
    with ExitStack() as stack:
        files = open_run_files(program, tmp_path, stack)
        display = stack.enter_context(make_progress(CONFIG.train.steps))
        for _ in range(2):  # also after a stop before the next checkpoint
            TrainingRun(program, files, "given", display)
            assert [row.get("name") for row in read(tmp_path) if row.get("event") == "stage"] == ["alone"]


def test_every_step_trains_on_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """This includes the first step of a stage, whose batch was prefetched for the previous stage."""
    lengths: list[int] = []
    add = MetricsLogger.add

    def record(self: Any, report: Any, batch: Any) -> None:
        lengths.append(batch.tokens.shape[1])
        add(self, report, batch)

    monkeypatch.setattr(MetricsLogger, "add", record)
    train(CONFIG, tmp_path / "run", name="staged")
    assert lengths == [8] * 4 + [12] * 3 + [16] * 5 + [12] * 8


@pytest.mark.parametrize("kills", [(2, 5), (8,), (11, 13)], ids=str)
def test_killed_run_resumes_in_the_middle_of_a_stage(
    kills: tuple[int, ...], tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
):
    """Kills occur before any checkpoint, around the end of a stage, and while a rule stores an evaluation."""
    add, folder = MetricsLogger.add, tmp_path / "run"

    for kill in kills:
        saved = [int(p.name) for p in (folder / "checkpoints").glob("[0-9]*")] if folder.exists() else []
        left = [None] * (kill - max(saved, default=0))

        def stop(self: Any, report: Any, batch: Any, left: list[None] = left) -> None:
            add(self, report, batch)
            left.pop()
            if not left:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(MetricsLogger, "add", stop)
            train(CONFIG, folder, name="staged")
    train(CONFIG, folder, name="staged")
    described = [json.loads((p / "checkpoints/20/meta/metadata").read_text())["body"] for p in (finished, folder)]
    assert described[0]["leaves"] == described[1]["leaves"]
    assert (
        described[0]["meta"]["curriculum"]
        == described[1]["meta"]["curriculum"]
        == {"stage": 3, "begin": 12, "seen": []}
    )
    strip = ("seconds", "tokens_per_second")
    old, new = (
        [{k: v for k, v in row.items() if k not in strip} for row in read(path) if row["kind"] != "run"]
        for path in (finished, folder)
    )
    assert new == old


def test_a_checkpoint_without_a_stage_is_rejected():
    schedule = CurriculumSchedule(Curriculum(stages=STAGES))
    schedule.restore({}, step=0)  # an imported model
    assert schedule.state == CurriculumState()
    with pytest.raises(CheckpointError, match="does not record the stage"):
        schedule.restore({}, step=3)


def test_runs_without_a_curriculum_do_not_import_its_code():
    script = """
import sys
from recallax.configs import mqar_micro
from recallax.train.loop import train
from recallax.train.program import Program
from recallax.train.vmapped_runs import train_vmapped
Program(mqar_micro.get_tiny())
print(*sorted(name for name in sys.modules if name.startswith("recallax.train.curriculum.")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == ["recallax.train.curriculum.stages"]  # the classes of configs


# When a stage ends


def evaluation_rows(*losses: float, **more: float) -> list[dict[str, float]]:
    return [{"loss": loss, "accuracy": 1 - loss} for loss in losses]


def test_metric_reached():
    rise, fall = MetricReached(threshold=0.5, max_steps=9), MetricReached(metric="loss", threshold=0.5, max_steps=9)
    for rule in (rise, fall):
        assert (
            rule.end_reason([]) is None
            and rule.end_reason(evaluation_rows(0.6)) is None
            and rule.end_reason(evaluation_rows(0.4, 0.6)) is None
        )
        assert (
            "reached 0.5" in (rule.end_reason(evaluation_rows(0.6, 0.5)) or "")
            and rule.end_reason(evaluation_rows(float("nan"))) is None
        )


def test_metric_plateau():
    rule = MetricPlateau(patience=2, min_delta=0.1, max_steps=9)
    assert rule.end_reason(evaluation_rows(1.0, 1.0)) is None  # nothing to compare with
    assert rule.end_reason(evaluation_rows(1.0, 1.0, 1.0)) is not None
    assert (
        rule.end_reason(evaluation_rows(1.0, 0.8, 1.0)) is None
        and rule.end_reason(evaluation_rows(1.0, 0.95, 1.0)) is not None
    )
    assert (
        rule.end_reason(evaluation_rows(0.5, 1.0, 0.3, 0.25)) is None
        and rule.end_reason(evaluation_rows(0.5, 1.0, 0.3, 0.3, 0.3)) is not None
    )
    assert MetricPlateau(metric="accuracy", patience=1, max_steps=9).end_reason(evaluation_rows(0.5, 0.4)) is None
    assert MetricPlateau(metric="accuracy", patience=1, max_steps=9).end_reason(evaluation_rows(0.5, 0.5)) is not None


def test_stage_has_minimum_and_maximum_duration():
    rule = MetricReached(threshold=0.5, min_steps=10, max_steps=20)
    curriculum = Curriculum(stages=(Stage(name="a", until=rule), Stage(name="b")))
    schedule = CurriculumSchedule(curriculum, CurriculumState(0, 100))
    schedule.add_evaluation({"accuracy": 0.9, "loss": 0.1, "group/x": 1.0}, dict)
    assert schedule.phase_end_reason(109, True) is None and schedule.phase_end_reason(110, False) is None
    assert schedule.phase_end_reason(110, True) is not None
    assert schedule.phase_end_reason(120, False) == "after 20 steps"
    schedule.start_next_phase(120)
    assert schedule.state == CurriculumState(1, 120, ()) and schedule.phase_end_reason(10_000, True) is None


def test_curriculum_state_json_round_trip():
    state = CurriculumState(
        2, 5, ({"accuracy": 0.1 + 0.2, "loss": float("nan")}, {"accuracy": 1e-300, "loss": float("inf")})
    )
    back = curriculum_state_from_json(json.loads(json.dumps(state.to_json(), allow_nan=False)))
    assert repr(back) == repr(state)


# Invalid curricula


STAGE = Stage(name="s", until=AfterSteps(steps=2))
LAST = Stage(name="last")
INVALID_CURRICULA = {
    "no stage": (lambda: Curriculum(stages=()), ["[]", "at least one"]),
    "one name twice": (lambda: Curriculum(stages=(STAGE, replace(LAST, name="s"))), ["names must be unique"]),
    "no end": (lambda: Curriculum(stages=(STAGE,)), ["stage 1 of 1, 's'", "AfterSteps", "EndOfRun"]),
    "an end in the middle": (lambda: Curriculum(stages=(LAST, replace(LAST, name="b"))), ["stage 1 of 2", "EndOfRun"]),
    "nothing trains": (lambda: Stage(name="s", trainable=()), ["'s' trains nothing", "at least one pattern"]),
    "a ramp of one step": (
        lambda: Stage(name="s", ramps=(Ramp(gate="g", start=0.0, end=1.0),)),
        ["ramps 'g' from 0.0 to 1.0 over 1 step", "at least 2 steps"],
    ),
    "no steps": (lambda: AfterSteps(steps=0), ["AfterSteps.steps is 0", "at least 1"]),
    "bounds": (lambda: MetricReached(threshold=1.0, min_steps=5, max_steps=4), ["min_steps is 5 and max_steps is 4"]),
    "margin": (lambda: MetricPlateau(min_delta=-1.0, max_steps=4), ["min_delta is -1.0"]),
    "no step left": (
        lambda: staged(replace(STAGE, until=AfterSteps(steps=20)), LAST),
        ["train.steps is 20", "{'s': 20}"],
    ),
    "not evaluated": (
        lambda: staged(replace(STAGE, until=MetricReached(threshold=1.0, max_steps=3)), LAST),
        ["'s' ends after at most 3 steps", "evaluate.every is 4"],
    ),
    "more ids": (
        lambda: staged(replace(STAGE, task=replace(mqar(8), vocab_size=18)), LAST),
        ["the task of stage 's' has 18 token ids", "the task of the run 16"],
    ),
    "a length that does not fit": (lambda: mqar(6), ["length 6 is too short for 2 pairs"]),
    "no such parameter": (
        lambda: resolve_stages(staged(replace(STAGE, frozen=("*.paths.sssm.*",)), LAST)),
        ["stage 's'", "no parameter matches '*.paths.sssm.*'", "blocks.both.mixer.paths.ssm"],
    ),
    "one layer of a stack": (
        lambda: resolve_stages(staged(replace(STAGE, trainable=("layers.0.*",)), LAST)),
        ["'s'", "layers.0.mixer", "not layers.1.mixer", "one array", "blocks.both.mixer"],
    ),
    "a ramped matrix": (
        lambda: resolve_stages(staged(replace(STAGE, ramps=(Ramp(gate="embedding", start=0.0, end=1.0),)), LAST)),
        ["ramps embedding", "[16, 8]", "one number per layer"],
    ),
    "ramped twice": (
        lambda: resolve_stages(
            staged(
                replace(STAGE, ramps=tuple(Ramp(gate=g, start=0.0, end=1.0) for g in ("*.gates.ssm", "*.gates.*"))),
                LAST,
            )
        ),
        ["twice", "'*.gates.ssm'", "'*.gates.*'"],
    ),
    "all frozen": (lambda: resolve_stages(staged(replace(STAGE, frozen=("*",)), LAST)), ["'s' trains nothing"]),
    "no such term": (
        lambda: compiled(staged(STAGE, replace(LAST, loss_weights={"next": 1.0}))).check_phases(),
        ["'next'", "did you mean 'next_token'"],
    ),
}


@pytest.mark.parametrize("case", INVALID_CURRICULA)
def test_invalid_curricula_are_rejected(case: str):
    make, parts = INVALID_CURRICULA[case]
    with pytest.raises(ConfigError) as error:
        make()
    for part in parts:
        assert part in str(error.value)


def test_patterns_match_layers_blocks_and_other_parameters():
    flat = {
        name: leaves(phase.mask.trainable)
        for name, phase in zip(
            ("block", "layers", "rest"),
            resolve_stages(
                staged(
                    replace(STAGE, name="a", trainable=("blocks.facts.*",)),
                    replace(STAGE, name="b", trainable=("layers.[01].*",)),
                    replace(LAST, trainable=("embedding", "norm.scale")),
                )
            ),
            strict=True,
        )
    }
    names, _ = parameter_names(MODEL, 16)
    for path, called in names.items():
        assert flat["block"][path] == called.layer_names[0].startswith("layers.2.")
        assert flat["layers"][path] == called.layer_names[0].startswith("layers.0.")
        assert flat["rest"][path] == (called.layer_names[0] in ("embedding", "norm.scale"))
    assert all(any(part.values()) for part in flat.values())


def test_curriculum_json_round_trip_and_fingerprint():
    assert from_json(json.loads(json.dumps(to_json(CONFIG))), RunConfig) == CONFIG
    assert "curriculum" not in to_json(replace(CONFIG, curriculum=None))
    assert fingerprint(CONFIG) != fingerprint(replace(CONFIG, curriculum=None))


def test_the_command_line_shows_stages_and_overrides_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("recallax.cli.show.load_config", lambda _: CONFIG)
    assert main(["show", "mqar_micro", "--curriculum.stages.1.until.steps", "2"]) == 0
    out = capsys.readouterr().out
    lines = out[out.index("\ncurriculum\n") :].splitlines()
    assert "1  alone" in lines[2] and "MetricReached metric=loss threshold=100.0 min_steps=3 max_steps=9" in lines[2]
    assert "parameters train, on rows of 8 tokens" in lines[3] and lines[4].strip() == "*.gates.attention 0"
    assert "AfterSteps steps=2" in lines[5] and "on rows of 12 tokens" in lines[6]
    assert lines[7].strip() == "*.gates.* 0.1 to 0.3"
    counts = [int(line.split()[0].replace(",", "")) for line in lines if "parameters train" in line]
    assert 0 < counts[0] < counts[2] == counts[3] and counts[1] < counts[2] and len(counts) == 4
