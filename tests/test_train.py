"""Training: steps, evaluation, dropout, logs, resuming, and golden first steps."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden.__main__ import FILE, REWRITE, first_step, tolerance

from recallax.cli.config_files import config_names
from recallax.cli.main import main
from recallax.config import ConfigError, fingerprint
from recallax.layers import Attention, GatedConv, Identity, LinearAttention, SwiGLU
from recallax.layers.base import Statistic
from recallax.layers.dense import parameter
from recallax.models import Block, LMConfig, accounting
from recallax.models.lm_head import Untied
from recallax.tasks import MQAR, MixtureSlice, Split
from recallax.train import loop
from recallax.train.loop import evaluate_run, train
from recallax.train.metrics_logger import MetricsLogger, NonFiniteError
from recallax.train.optimizer import learning_rate_schedule, make_optimizer
from recallax.train.program import Program
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train
from recallax.train.run_folder import RunFolderError
from recallax.train.step import MAX_NONFINITE_STREAK, TrainState
from recallax.train.training_run import initialize_run
from recallax.types import Batch


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    """Disable most optimizations of XLA, which take longer than they save here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@dataclass(frozen=True, kw_only=True)
class UnevenMQAR(MQAR):
    """MQAR with random weights of positions, rows of weight 0, and NaN weights in the train batches `bad`."""

    bad: tuple[int, ...] = ()

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        batch = super().batch(seed, split, index, size)
        rng = np.random.default_rng(index)
        weights = batch.weights * rng.exponential(size=batch.weights.shape).astype(np.float32)
        weights[rng.random(size) < 0.3] = 0
        if split == "train" and index in self.bad:
            weights[:] = np.nan
        return batch._replace(weights=weights)


SLICES = (MixtureSlice(length=12, num_kv_pairs=2),)
TASK = UnevenMQAR(vocab_size=16, mixture=SLICES, test_mixture=(*SLICES, MixtureSlice(length=24, num_kv_pairs=4)))
BLOCKS = {
    "conv": Block(mixer=GatedConv(conv_size=3, expand=1), channel=Identity()),
    "mixer": Block(mixer=LinearAttention(num_heads=2), channel=SwiGLU()),
}
MODEL = LMConfig(d_model=8, pattern="(conv mixer)*2", blocks=BLOCKS)
OPTIM = AdamW(lr=1e-2, warmup_ratio=0.25, max_grad_norm=0.5, eps=1e-6)
CONFIG = RunConfig(
    task=TASK,
    model=MODEL,
    optim=OPTIM,
    train=Train(steps=12, batch_size=8, log_every=2, save_every=4, seed=3),
    evaluate=Evaluate(every=4, batches=3, batch_size=32),
)


def vary(config: RunConfig = CONFIG, **parts: dict[str, Any]) -> RunConfig:
    """Return the config with fields of its parts replaced, as in `vary(train={"steps": 3})`."""
    return replace(config, **{name: replace(getattr(config, name), **fields) for name, fields in parts.items()})


PROGRAMS: dict[str, Program] = {}


def compiled(config: RunConfig, mesh: jax.sharding.Mesh | None = None) -> Program:
    """Return the program of the config, which all tests share; on one device, all meshes are equal."""
    return PROGRAMS.setdefault(fingerprint(config), Program(config, mesh))


@pytest.fixture(autouse=True)
def compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "Program", compiled)


@pytest.fixture
def program() -> Program:
    return compiled(CONFIG)


def run(
    program: Program, indices: range | list[int], row_weights: Mapping[int, tuple[float, int]] | None = None
) -> tuple[TrainState, list[Any]]:
    """Return the state after the given batches, and the metrics of the steps; `row_weights` sets weights of rows."""
    state, reports = program.init_state(), []
    for index in indices:
        batch = program.batch(index)
        value, rows = (row_weights or {}).get(index, (0, 0))
        batch.weights[:rows] = value
        state, report = program.step(state, batch)
        reports.append(jax.device_get(report))
    return jax.device_get(state._replace(key=jax.random.key_data(state.key))), reports


def assert_same_bits(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a: Any, b: Any, tolerance: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def logits_of(program: Program, params: Any, batch: Batch) -> jax.Array:
    """Return the logits of all positions; the trainer computes those of the targets only."""
    return nnx.merge(program.graphdef, params, {})(jnp.asarray(batch.tokens), batch.seq)[0]


def reference_loss(program: Program, params: Any, batch: Batch) -> jax.Array:
    likelihood = jax.nn.log_softmax(logits_of(program, params, batch))
    target_likelihood = jnp.take_along_axis(likelihood, jnp.asarray(batch.targets)[..., None], axis=-1)[..., 0]
    return -jnp.sum(batch.weights * target_likelihood) / jnp.sum(batch.weights)


def decays(name: str, leaf: jax.Array) -> bool:
    """Return True for matrices, which have weight decay; leaves of repeated layers have one more axis."""
    return "scale" not in name and leaf.ndim - ("'stack'" in name) >= 2


def test_step_equals_clipped_adamw(program: Program) -> None:
    """Five steps equal a reference in NumPy: loss, clipping, warm-up, cosine schedule, and decay of matrices only."""
    optim, count = CONFIG.optim, 5
    state, reports = run(program, range(count))
    params = jax.tree.map(np.asarray, program.init_state().params)
    m = v = jax.tree.map(np.zeros_like, params)
    gradient = jax.jit(jax.value_and_grad(lambda p, b: reference_loss(program, p, b)))
    names = jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), params)
    mask = jax.tree.map(decays, names, params)
    assert any(jax.tree.leaves(mask)) and not all(jax.tree.leaves(mask))
    num_clipped = num_partly_correct = 0
    for i in range(count):
        loss, grads = gradient(params, program.batch(i))
        norm = math.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(grads)))
        assert_close((reports[i].loss, reports[i].gradient_norm), (loss, norm), 1e-5)
        num_clipped += norm > optim.max_grad_norm
        batch = program.batch(i)
        correct = np.argmax(logits_of(program, jax.tree.map(jnp.asarray, params), batch), axis=-1) == batch.targets
        total, weight = np.sum(batch.weights * correct), np.sum(batch.weights)
        assert_close(tuple(reports[i].accuracy), (total, weight), 1e-5)
        num_partly_correct += 0 < total < weight
        grads = jax.tree.map(lambda g, n=norm: g * min(1, optim.max_grad_norm / n), grads)
        m = jax.tree.map(lambda m, g: optim.b1 * m + (1 - optim.b1) * g, m, grads)
        v = jax.tree.map(lambda v, g: optim.b2 * v + (1 - optim.b2) * g * g, v, grads)
        lr = optim.lr * (i / 3 if i < 3 else 0.1 + 0.9 * (1 + math.cos(math.pi * (i - 3) / 9)) / 2)

        def update(p, m, v, decay, i=i, lr=lr):
            step = m / (1 - optim.b1 ** (i + 1)) / (np.sqrt(v / (1 - optim.b2 ** (i + 1))) + optim.eps)
            return p - lr * (step + optim.weight_decay * decay * p)

        params = jax.tree.map(update, params, m, v, mask)
    assert num_clipped > 0 and num_partly_correct > 0
    assert_close(state.params, params, 2e-5)
    assert (int(state.step), int(state.skipped), int(state.streak)) == (count, 0, 0)


def test_learning_rate_schedule() -> None:
    config = vary(train={"steps": 100}, optim={"lr": 2.0, "warmup_ratio": 0.1, "min_lr_ratio": 0.25})
    rate = [float(np.asarray(learning_rate_schedule(config)(i))) for i in range(101)]
    np.testing.assert_allclose(rate[:11], np.arange(11) / 10 * 2, rtol=1e-6)
    np.testing.assert_allclose([rate[55], rate[100]], [(2 + 0.5) / 2, 0.5], rtol=1e-6)
    assert rate[10:] == sorted(rate[10:], reverse=True)


@pytest.mark.parametrize("pattern", ["conv mixer", "(conv mixer)*2", "conv mixer*3"])
def test_weight_decay_excludes_scales_and_biases(pattern: str) -> None:
    blocks = {"conv": BLOCKS["conv"], "mixer": Block(mixer=Attention(num_heads=2), channel=SwiGLU())}
    config = vary(model={"pattern": pattern, "blocks": blocks})
    _, params, _ = nnx.split(accounting.abstract_model(config.model, 16), nnx.Param, Statistic)
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), nnx.to_pure_dict(params))
    optimizer = make_optimizer(config, params)
    zeros = jax.tree.map(jnp.zeros_like, ones)
    _, moments = optimizer.update(zeros, optimizer.init(ones), ones)  # the first rate is 0
    updates, _ = optimizer.update(zeros, moments, ones)
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path)
        excluded = any(part in name for part in ("scale", "bias"))
        assert bool(jnp.all(leaf == 0)) == excluded and bool(jnp.any(leaf != 0)) != excluded, name


def test_parameter_can_disable_weight_decay() -> None:
    params = nnx.State(
        {name: parameter(jnp.ones((2, 2)), (None, None), weight_decay=name == "on") for name in ("on", "off")}
    )
    ones = nnx.to_pure_dict(params)
    optimizer = make_optimizer(CONFIG, params)
    zeros = jax.tree.map(jnp.zeros_like, ones)
    _, moments = optimizer.update(zeros, optimizer.init(ones), ones)  # the first rate is 0
    updates: Any = optimizer.update(zeros, moments, ones)[0]
    assert bool((updates["on"] < 0).all()) and bool((updates["off"] == 0).all())


@pytest.mark.parametrize("parts", [2, 8])
def test_gradient_accumulation_equals_the_whole_batch(program: Program, parts: int) -> None:
    """Microbatches have different weights, and some have weight 0."""
    whole, reports = run(program, range(3))
    accumulated, others = run(compiled(vary(train={"gradient_accumulation_steps": parts})), range(3))
    weights = np.sum(TASK.batch(0, "train", 0, 8).weights, axis=1).tolist()
    assert 0 in weights and len(set(weights)) > 4
    assert_close(accumulated.params, whole.params, 1e-6)
    assert_close(others, reports, 1e-5)


def test_loss_weights_scale_the_terms(program: Program) -> None:
    _, (report,) = run(program, [0])
    _, (other,) = run(compiled(vary(train={"loss_weights": {"next_token": 0.25}})), [0])
    assert_close(other.loss, report.loss / 4, 1e-6)
    assert_close(other.gradient_norm, report.gradient_norm / 4, 1e-5)
    assert_close(other.terms, report.terms, 1e-6)


def test_loss_weight_of_unknown_term_is_rejected() -> None:
    with pytest.raises(ConfigError, match="'next_tokn'; did you mean 'next_token'"):
        run(compiled(vary(train={"loss_weights": {"next_tokn": 0.25}})), [0])


def test_compute_in_bfloat16_with_parameters_in_float32(program: Program) -> None:
    half = compiled(vary(model={"compute_dtype": "bfloat16"}))
    state, (_, _, report) = run(half, range(3))
    _, (_, _, exact) = run(program, range(3))
    dtypes = {str(x.dtype) for x in jax.tree.leaves((state.params, state.statistics, state.optimizer))}
    assert dtypes == {"float32", "int32"}
    assert report.loss != exact.loss and abs(report.loss - exact.loss) < 0.02 * exact.loss
    jaxpr = str(jax.make_jaxpr(lambda p: logits_of(half, p, half.batch(0)))(half.init_state().params))
    assert "bf16" in jaxpr


def test_one_compiled_step_with_donated_buffers(program: Program) -> None:
    state = program.init_state()
    for index in range(2):
        old = state
        state, _ = program.step(state, program.batch(index))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert program._step_fns[0]._cache_size() == 1  # type: ignore[attr-defined]


# Non-finite steps


@pytest.mark.fault("R12")
@pytest.mark.parametrize(
    ("bad", "value", "rows", "parts"),
    [(0, np.nan, 8, 1), (1, np.nan, 1, 1), (3, np.inf, 8, 1), (2, -np.inf, 1, 1), (1, np.inf, 1, 2)],
)
def test_non_finite_step_is_skipped(bad: int, value: float, rows: int, parts: int) -> None:
    program = compiled(vary(train={"gradient_accumulation_steps": parts}))
    state, reports = run(program, range(5), {bad: (value, rows)})
    expected, _ = run(program, [i for i in range(5) if i != bad])
    assert [bool(r.finite.all()) for r in reports] == [i != bad for i in range(5)]
    assert_same_bits((state.params, state.optimizer, state.statistics), (expected.params, expected.optimizer, {}))
    assert (int(state.step), int(state.skipped), int(state.streak)) == (5, 1, 0)


@pytest.mark.fault("R12")
def test_step_with_infinite_gradient_norm_is_skipped() -> None:
    state, (report,) = run(compiled(vary(train={"loss_weights": {"next_token": 1e30}})), [0])
    assert report.finite[:-1].all() and not report.finite[-1] and np.isinf(report.gradient_norm)
    assert int(state.skipped) == 1


@pytest.mark.fault("R12")
def test_step_with_nonfinite_update_is_skipped() -> None:
    """With an eps that float32 rounds to 0, the update of a parameter without a gradient is 0 / 0."""
    config = vary(task={"vocab_size": 64}, model={"lm_head": Untied()}, optim={"eps": 1e-60})
    state, reports = run(compiled(config), range(2))
    assert all(np.isfinite(r.gradient_norm) and not r.finite.all() for r in reports) and int(state.skipped) == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.fault("R12")
def test_state_freezes_after_ten_nonfinite_steps(program: Program) -> None:
    bad = dict.fromkeys(range(2, 2 + MAX_NONFINITE_STREAK), (np.nan, 8))
    frozen, _ = run(program, range(15), bad)
    expected, _ = run(program, range(2))
    assert_same_bits((frozen.params, frozen.optimizer), (expected.params, expected.optimizer))
    assert (int(frozen.skipped), int(frozen.streak)) == (13, 13)
    not_frozen, _ = run(program, range(14), {index: bad[index] for index in range(2, 1 + MAX_NONFINITE_STREAK)})
    assert (int(not_frozen.skipped), int(not_frozen.streak)) == (MAX_NONFINITE_STREAK - 1, 0)


@pytest.mark.fault("R12")
def test_run_continues_after_one_nonfinite_batch_and_stops_after_ten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(vary(train={"steps": 40, "log_every": 3}), task=replace(TASK, bad=(1, *range(6, 40))))
    monkeypatch.setattr("recallax.cli.train.load_config", lambda _: config)
    assert main(["train", "mqar_micro", "--run", str(tmp_path / "run")]) == 1
    out, err = capsys.readouterr()
    assert "10 steps in a row were not finite, up to step 16" in err
    assert (
        "the loss, and the gradient or update of ['embedding']" in err
        and f"--from {tmp_path}/run@4 --optim.lr 0.005" in err
    )
    assert "1 steps were skipped" in out and "accuracy nan" not in out
    rows = read(tmp_path / "run")
    trained = [row for row in rows if row["kind"] == "train"]
    assert [(row["step"], row["skipped"]) for row in trained] == [(3, 1), (6, 1), (9, 4), (12, 7), (15, 10), (16, 11)]
    assert rows[-1]["event"] == "non-finite" and "['embedding']" in rows[-1]["leaf"]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["4"], "8, 12 and 16 are in the streak"
    assert ["loss" in row for row in trained] == [True, True, False, False, False, False]
    expected = [
        float(np.asarray(learning_rate_schedule(config)(step))) for step in (1, 4)
    ]  # skipped steps do not change the schedule
    assert [row["learning_rate"] for row in trained[:2]] == pytest.approx(expected)


def test_error_names_a_nonfinite_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    initial = Program.init_state

    def with_nan(self: Program) -> TrainState:
        state = initial(self)
        params = state.params
        scale = params["stack"]["parts"][0]["body"]["parts"][1]["mixer_norm"]["scale"]
        params["stack"]["parts"][0]["body"]["parts"][1]["mixer_norm"]["scale"] = scale.at[1, 3].set(jnp.nan)
        return state

    monkeypatch.setattr(Program, "init_state", with_nan)
    with pytest.raises(NonFiniteError, match=r"the parameter \['stack'\].*\['mixer_norm'\]\['scale'\]"):
        train(CONFIG, tmp_path / "run", name="with_nan")


# Metrics


def test_evaluation_is_exact(program: Program) -> None:
    """Metrics equal weighted means over the logits of every position, also at lengths that occur in tests only."""
    state = program.init_state()
    sums: dict[str, np.ndarray] = {}
    for index in range(3):
        batch = TASK.batch(0, "test", index, 32)
        logits = np.asarray(logits_of(program, state.params, batch), np.float64)
        nll = (
            np.log(np.exp(logits).sum(-1))
            - np.take_along_axis(logits, np.asarray(batch.targets)[..., None], -1)[..., 0]
        )
        correct = logits.argmax(-1) == batch.targets
        stacked = np.stack([batch.weights * nll, batch.weights * correct, batch.weights]).reshape(3, -1).sum(-1)
        for name in ("all", TASK.groups[int(batch.group[0, 0])]):
            sums[name] = sums.get(name, 0) + stacked
    expected = {"loss": sums["all"][0] / sums["all"][2], "accuracy": sums["all"][1] / sums["all"][2]}
    expected |= {f"group/{name}": s[1] / s[2] for name, s in sums.items() if name != "all"}
    assert set(expected) == {"loss", "accuracy", "group/L12_K2", "group/L24_K4"}
    assert all(0 < expected[name] < 1 for name in expected.keys() - {"loss"})
    assert program.evaluate(state, "test") == pytest.approx(expected, rel=1e-5)
    assert program.evaluate(state, "test", batches=1).keys() == {"loss", "accuracy", "group/L12_K2"}


# Dropout and patterns


def test_dropout_is_a_function_of_seed_and_step() -> None:
    noisy = compiled(vary(model={"dropout": 0.3, "embed_dropout": 0.1}))
    reports = []
    for key in (0, 0, 1):
        state = noisy.init_state()._replace(key=jax.random.key(key))
        for step in (0, 1, 1):  # the first rate is 0, so only the step differs
            state, report = noisy.step(state._replace(step=jnp.int32(step)), noisy.batch(0))
            reports.append(float(report.loss))
    assert reports[:3] == reports[3:6] and reports[0] != reports[1]
    assert not set(reports[:3]) & set(reports[6:])


def test_seed_determines_the_initial_state() -> None:
    keys = [compiled(vary(train={"seed": seed})).init_state() for seed in (3, 4)]
    assert jax.random.key_data(keys[0].key).tolist() != jax.random.key_data(keys[1].key).tolist()
    assert not np.array_equal(keys[0].params["embedding"], keys[1].params["embedding"])


def test_dropout_is_off_in_evaluation(program: Program) -> None:
    noisy = compiled(vary(model={"dropout": 0.3, "embed_dropout": 0.1}))
    assert noisy.evaluate(program.init_state(), "valid") == program.evaluate(program.init_state(), "valid")


def test_repeats_in_a_pattern_do_not_change_training() -> None:
    """Initial parameters, gradients and dropout masks are equal with and without repeats."""
    flat, repeated = (
        [float(report.loss) for report in run(compiled(config), range(4))[1]]
        for pattern in ("conv mixer conv mixer", "(conv mixer)*2")
        for config in [vary(model={"pattern": pattern, "dropout": 0.3, "embed_dropout": 0.1})]
    )
    assert flat == pytest.approx(repeated, rel=1e-5)


# Whole runs


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, train(CONFIG, folder, name="finished", profile=True)


def test_log_records_run_information(finished: tuple[Path, dict[str, float]]) -> None:
    folder, metrics = finished
    start, *rows = read(folder)
    assert start["kind"] == "run" and start["step"] == 0 and start["device"] and start["jax"] == jax.__version__
    assert (
        "commit" in start
        and start["parameters"] == accounting.count_parameters(MODEL, 16)
        and start["name"] == "finished"
    )
    assert {row["fingerprint"] for row in (start, *rows)} == {fingerprint(CONFIG)}
    assert [row["step"] for row in rows if row["kind"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert [(row["step"], row["split"]) for row in rows if row["kind"] == "eval"] == [
        (4, "valid"),
        (8, "valid"),
        (12, "valid"),
        (12, "test"),
    ]
    seconds = [row["seconds"] for row in (start, *rows)]
    assert seconds == sorted(seconds) and seconds[0] >= 0
    (test,) = [row for row in rows if row.get("split") == "test"]
    assert {name: test[name] for name in metrics} == metrics
    expected = {"loss", "accuracy", "gradient_norm", "learning_rate", "tokens_per_second", "skipped", "term/next_token"}
    assert all(expected <= row.keys() for row in rows if row["kind"] == "train")
    assert sorted(p.name for p in (folder / "checkpoints").iterdir() if p.name.isdecimal()) == ["12", "8"]


def test_profile_traces_and_reports_utilisation(finished: tuple[Path, dict[str, float]]) -> None:
    folder, _ = finished
    traces = [p for p in (folder / "profile").rglob("*") if p.is_file() and p.stat().st_size > 0]
    assert traces, "this run is shorter than the usual window: its last step must be traced"
    rows = [row for row in read(folder) if row["kind"] == "train"]
    assert all(0 < row["flops_utilisation"] < 1.5 and row["peak_flops"] > 0 and row["peak_source"] for row in rows)


def test_finished_run_is_not_logged_twice(finished: tuple[Path, dict[str, float]]) -> None:
    folder, metrics = finished
    assert train(CONFIG, folder, name="finished") == metrics
    assert evaluate_run(folder, "test") == {"step": 12, **metrics}
    steps = [(row["kind"], row["step"], row.get("split")) for row in read(folder) if row["kind"] != "run"]
    assert len(steps) == len(set(steps))


def test_run_from_given_parameters_equals_the_run_that_draws_them(
    tmp_path: Path, finished: tuple[Path, dict[str, float]], program: Program
) -> None:
    folder, state = tmp_path / "run", program.init_state()
    initialize_run(folder, program, state.params, state.statistics, files={"source.json": "{}"})
    assert (folder / "source.json").read_text() == "{}"
    first = checksums(folder, 0)
    with pytest.raises(RunFolderError, match=r"has checkpoints of the steps \[0\]; choose another folder"):
        initialize_run(folder, program, state.params, state.statistics)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    initialize_run(folder, program, zeros, state.statistics, files={"source.json": "[]"}, exist_ok=True)
    assert checksums(folder, 0) == first and (folder / "source.json").read_text() == "{}"
    assert train(CONFIG, folder) == finished[1]
    assert checksums(folder, 12) == checksums(finished[0], 12)
    assert sum(row["kind"] == "run" for row in read(folder)) == 1  # it begins and does not resume


def test_variables_that_do_not_fit_the_model_are_rejected(tmp_path: Path, program: Program) -> None:
    state = program.init_state()
    wrong = {**state.params, "embedding": jnp.zeros((3, 8)), "extra": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"'embedding'\]: found float32 \[3, 8\], expected float32 \[16, 8\]") as error:
        initialize_run(tmp_path / "run", program, wrong, state.statistics)
    assert "'extra']: found float32 [2], expected nothing" in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("R1")
def test_resume_is_exact(
    tmp_path: Path, finished: tuple[Path, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop stops at step 7, after step 6 was logged; resuming from the checkpoint of step 4 gives the same bits."""
    add, folder = MetricsLogger.add, tmp_path / "run"
    seen: list[Any] = []

    def stop(self: Any, report: Any, batch: Any) -> None:
        add(self, report, batch)
        seen.append(report)
        if len(seen) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsLogger, "add", stop)
        train(CONFIG, folder, name="resumed")
    assert train(CONFIG, folder, name="resumed") == finished[1]
    assert checksums(folder, 12) == checksums(finished[0], 12)
    strip = ("seconds", "tokens_per_second", "flops_utilisation", "peak_flops", "peak_source")
    old, new = (
        [{k: v for k, v in row.items() if k not in strip} for row in read(path) if row["kind"] in ("train", "eval")]
        for path in (finished[0], folder)
    )
    assert new == old


def checksums(folder: Path, step: int) -> dict[str, Any]:
    """Return the checksums that a checkpoint records of its leaves; restoring verifies them."""
    return json.loads((folder / "checkpoints" / str(step) / "meta" / "metadata").read_text())["body"]["leaves"]


# Golden first steps


FULL_ONLY = {
    *("based_1b3", "mom_1b3", "mom_380m", "titans_340m", "jrt_rnn_360m", "overwrites_neural_memory", "based_360m"),
    "mqar_titans",
    *("hydra_1b6", "hydra_1b6_staged", "mqar_hydra_at_once", "mqar_hydra_staged"),
    *("set_disjointness_based", "parity_attention", "induction_attention"),
    *("mqar_mamba", "mqar_mamba2", "mqar_kda", "mqar_gated_delta_net", "mqar_nemotron_h", "mqar_delta_net"),
    *("mqar_hgrn2", "mqar_gla", "mqar_gated_delta_product", "mqar_retnet"),
}
"""Configs that are left to `make test-full`: variants of other configs, and mixers that test_parity.py tests."""


@pytest.mark.parametrize(
    "name", [n if n not in FULL_ONLY else pytest.param(n, marks=pytest.mark.full) for n in config_names()]
)
def test_golden_first_step(name: str) -> None:
    golden = json.loads(FILE.read_text())
    assert name in golden, f"{name} has no golden first step yet: run `{REWRITE}` and commit {FILE.name}"
    assert first_step(name) == pytest.approx(golden[name], rel=tolerance(name)), (
        f"the first steps of {name} have changed. If intended, run `{REWRITE}` and state the reason in the commit"
    )


def test_golden_file_has_exactly_the_configs() -> None:
    assert set(json.loads(FILE.read_text())) == set(config_names()), f"run `{REWRITE}`"


def test_optimizer_state_has_the_tree_of_the_parameters(program: Program) -> None:
    """The optimizer state has a first and a second moment for each parameter, of its shape."""
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(program.abstract_state.params))
    adam = next(s for s in jax.tree.leaves(program.abstract_state.optimizer, is_leaf=_is_adam) if _is_adam(s))
    assert all(sorted(leaf.shape for leaf in jax.tree.leaves(tree)) == shapes for tree in (adam.mu, adam.nu))


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)
