"""The benchmarks start, and both sides of every comparison exchange exactly the declared messages and arrays.

A NumPy opponent replaces PyTorch: it reads the same files and runs the same steps. If the environment variable
TORCH_PYTHON names a Python with torch (and transformers or fla-core), the real opponents run as well.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    fla_ops,
    generation_speed,
    gpu_compare,
    hydra_crossover,
    kernel_speed,
    neural_memory_speed,
    numpy_ops,
    op_speed,
    prefix_prefill,
    static_gpu,
    task_speed,
    train_speed,
)
from benchmarks.messages import (
    BATCHES,
    INPUTS,
    PARAMETERS,
    PROJECTION_PATHS,
    ArraySpec,
    HandoverError,
    OpMessage,
    OptimizerMessage,
    StepReply,
    StepRequest,
    TrainingMessage,
    check_arrays,
    read_arrays,
    write_arrays,
)
from benchmarks.numpy_mqar import NumpyTraining
from benchmarks.numpy_ops import NumpyOp, central_differences
from benchmarks.op_benchmarks import COMPARED, CONV_SIZE, OP_BENCHMARKS
from benchmarks.recallax_mqar import RecallaxTraining
from benchmarks.recallax_ops import RecallaxOp
from benchmarks.worker import WorkerError
from recallax.models import accounting
from recallax.pallas_kernels.dispatch import interpret_kernels
from recallax.tasks import MQAR
from recallax.train.run_config import AdamW

pytestmark = pytest.mark.usefixtures("strict")

FOLDER = Path(train_speed.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))
SCRIPTS = [path.stem for path in FILES if "\ndef main(argv" in path.read_text()]
OPPONENTS = ("torch_mqar", "torch_ops")
"""Modules that import torch when they are imported."""
NUMPY_OPPONENT = (sys.executable, "-m")
FLA_FUNCTIONS = {
    "linear_attention": ("fla.ops.linear_attn", "chunk_linear_attn"),
    "simple_gla": ("fla.ops.simple_gla", "chunk_simple_gla"),
    "gla": ("fla.ops.gla", "chunk_gla"),
    "gated_delta_net": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "kda": ("fla.ops.kda", "chunk_kda"),
    "based": ("fla.ops.based", "parallel_based"),
}


def training(mixer: str = "attention", steps: int = 3, d_model: int = 4) -> TrainingMessage:
    return TrainingMessage(
        mixer=mixer,
        threads=1,
        vocab_size=12,
        length=12,
        pairs=2,
        steps=steps,
        d_model=d_model,
        batch_size=2,
        feature_dim=4,
    )


def op_message(op: str) -> OpMessage:
    return OpMessage(op=op, batch=2, length=5, heads=2, keys=3, values=4, threads=1)


# Start of every benchmark


def test_every_script_is_tested():
    """Every script has a command line, which these tests start, or is one side of a comparison."""
    mains = {path.stem for path in FILES if '__name__ == "__main__"' in path.read_text()}
    sides = {f"{side}_{what}" for side in ("recallax", "numpy", "torch") for what in ("mqar", "ops")}
    assert mains == set(SCRIPTS) | sides


@pytest.mark.parametrize("name", SCRIPTS)
def test_command_lines_of_benchmarks_start(name, capsys):
    with pytest.raises(SystemExit) as error:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert error.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_between_benchmarks_exist(path):
    """The test reads the source, because some modules cannot be imported without torch."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "benchmarks":
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if alias.name not in OPPONENTS and not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("name", ["train_speed", "op_speed", "static_gpu", "static_tpu"])
def test_recorded_rows_are_reported(name, capsys):
    importlib.import_module(f"benchmarks.{name}").main(["--report"])
    assert len(capsys.readouterr().out.splitlines()) > 3


# Messages and arrays


def test_message_round_trip(tmp_path):
    message = training()
    message.write(tmp_path)
    assert TrainingMessage.read(tmp_path) == message
    assert StepRequest.decode(StepRequest(steps=2, part="forward").encode()) == StepRequest(steps=2, part="forward")
    reply = StepReply(seconds=[0.5], cpu_seconds=[1], readings=[[0.5, float("inf")], []])
    assert StepReply.decode(reply.encode()) == reply


def test_message_with_other_fields_is_rejected():
    with pytest.raises(HandoverError, match=r"StepRequest.*missing: steps; unexpected: count; wrong: part is 3"):
        StepRequest.decode('{"count": 1, "part": 3}')
    with pytest.raises(HandoverError, match="expected a JSON object"):
        StepRequest.decode("[]")
    with pytest.raises(HandoverError, match=r"wrong: seconds is .*expected list"):
        StepReply.decode('{"seconds": [true], "cpu_seconds": [], "readings": []}')


def test_mismatched_arrays_are_listed(tmp_path):
    specs = {"a": ArraySpec((2,)), "b": ArraySpec((2, 3)), "c": ArraySpec((1,), "int32"), "d": ArraySpec(())}
    arrays = {"a": np.zeros(2, np.float32), "b": np.zeros((3, 2), np.float32), "c": np.zeros(1), "e": np.zeros(1)}
    with pytest.raises(HandoverError) as error:
        check_arrays(arrays, specs, "the test")
    assert str(error.value).splitlines()[1:] == [
        "  missing: d float32[]",
        "  unexpected: e float64[1]",
        "  wrong: b is float32[3, 2], expected float32[2, 3]",
        "  wrong: c is float64[1], expected int32[1]",
    ]
    with pytest.raises(HandoverError, match=r"writing x\.npz"):
        write_arrays(tmp_path / "x.npz", arrays, specs)
    np.savez(tmp_path / "x.npz", allow_pickle=False, a=np.zeros(3))
    with pytest.raises(HandoverError, match=r"reading x\.npz"):
        read_arrays(tmp_path / "x.npz", {"a": ArraySpec((2,), "float64")})


# Training against PyTorch


@pytest.mark.parametrize("mixer", PROJECTION_PATHS)
def test_opponent_trains_the_same_model(mixer, tmp_path):
    """Losses, gradient norms and all parameters agree after three steps with strong weight decay and clipping."""
    message = training(mixer)
    message.write(tmp_path)
    optim = AdamW(lr=0.01, weight_decay=5.0, warmup_ratio=0.0, max_grad_norm=0.5)
    recallax = RecallaxTraining(message, optim)
    recallax.write(tmp_path)
    opponent = NumpyTraining(tmp_path)
    before = recallax.parameters()
    for index in range(message.steps):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax needs both
            metrics = recallax.read(recallax.step("", index))
        np.testing.assert_allclose(metrics, opponent.read(opponent.step("", index)), rtol=1e-4)
    after = recallax.parameters()
    for name, parameter in opponent.parameters.items():
        np.testing.assert_allclose(after[name], parameter, atol=2e-4, err_msg=name)
        assert np.abs(after[name] - before[name]).max() > 5e-3, name


def test_mismatched_parameters_are_listed():
    message = training("based")
    arrays = {parameter.path: np.zeros(parameter.shape, np.float32) for parameter in message.parameters()}
    assert set(message.to_opponent(arrays)) == set(message.parameter_specs())
    arrays["norm.weight"] = arrays.pop("norm.scale")
    arrays["embedding"] = arrays["embedding"].T
    with pytest.raises(HandoverError, match="with the mixer based") as error:
        message.to_opponent(arrays)
    expected = {
        "missing: norm.scale float32[4]",
        "unexpected: norm.weight float32[4]",
        "wrong: embedding is float32[4, 12], expected float32[12, 4]",
    }
    assert {line.strip() for line in str(error.value).splitlines()[1:]} == expected


def test_opponent_rejects_other_arrays_and_options(tmp_path):
    message = training()
    message.write(tmp_path)
    for file, specs in ((PARAMETERS, message.parameter_specs()), (BATCHES, message.batch_specs())):
        write_arrays(tmp_path / file, {n: np.zeros(spec.shape, spec.dtype) for n, spec in specs.items()}, specs)
    options = OptimizerMessage(learning_rates=[0.0] * 3, weight_decay=0.1, b1=0.9, b2=0.95, eps=1e-8, max_grad_norm=1.0)
    options.write(tmp_path)
    NumpyTraining(tmp_path)
    file = tmp_path / options.FILE
    file.write_text(json.dumps(dataclasses.asdict(options) | {"clip": 1.0}))
    with pytest.raises(HandoverError, match=r"OptimizerMessage.*unexpected: clip"):
        NumpyTraining(tmp_path)
    training(d_model=6).write(tmp_path)
    with pytest.raises(
        HandoverError, match=r"reading parameters.npz(.|\n)*wrong: embedding.weight is float32\[12, 4\]"
    ):
        NumpyTraining(tmp_path)


def test_train_speed_measures_an_opponent():
    """The test runs both processes and checks the resulting rows."""
    message = training(steps=4)
    rows = train_speed.measure((*NUMPY_OPPONENT, "benchmarks.numpy_mqar"), message, rounds=1, checked=2)
    assert [row["mode"] for row in rows] == list(train_speed.MODES)
    for row in rows:
        assert row["versions"] == {"jax": jax.__version__, "numpy": np.__version__}
        assert row["difference"] < 1e-4 and row["ratio"] > 0
    report = train_speed.report([{"setting": "small", **row} for row in json.loads(json.dumps(rows))])
    assert len(report.splitlines()) == 2 + len(rows)


def test_different_models_are_not_timed():
    reply = StepReply(seconds=[], cpu_seconds=[], readings=[[1.0, 2.0], [1.0, 2.0]])
    other = dataclasses.replace(reply, readings=[[1.0, 2.0], [1.0, 2.003]])
    with pytest.raises(train_speed.Disagreement, match="gradient norm at step 1"):
        train_speed.check_agreement("eager", reply, other)


# Ops against PyTorch


@pytest.mark.parametrize("op", COMPARED)
def test_opponent_computes_the_same_op(op, tmp_path):
    message = op_message(op)
    message.write(tmp_path)
    recallax = RecallaxOp(message)
    recallax.write(tmp_path)
    NumpyOp(tmp_path).write(tmp_path / "numpy.npz")
    assert op_speed.check_agreement(tmp_path, "numpy", message) < op_speed.TOLERANCE
    assert recallax.step("forward", 0).shape == message.output_spec().shape


@pytest.mark.parametrize("op", OP_BENCHMARKS)
def test_inputs_of_ops_match_their_declaration(op):
    """Ops without an opponent declare no inputs; every op accepts its random inputs."""
    message, case = op_message(op), OP_BENCHMARKS[op]
    arrays = case.inputs(message)
    if case.opponent:
        check_arrays(arrays, message.input_specs(), op)
    else:
        with pytest.raises(HandoverError, match="not compared"):
            message.input_specs()
    out = jax.eval_shape(case.forward, **{name: jnp.asarray(x) for name, x in arrays.items()})
    assert out.shape[:2] == (2, 5) and out.dtype == jnp.float32 and CONV_SIZE < 5


def test_opponent_with_another_op_is_detected(tmp_path):
    message = op_message("mamba2")
    message.write(tmp_path)
    arrays = {name: np.ones(spec.shape, np.float32) for name, spec in message.file_specs().items()}
    write_arrays(tmp_path / INPUTS, arrays, message.file_specs())
    for name, factor in (("recallax", 1.0), ("eager-64", 1.01)):
        results = {n: np.full(spec.shape, factor, np.float32) for n, spec in message.result_specs().items()}
        write_arrays(tmp_path / f"{name}.npz", results, message.result_specs())
    with pytest.raises(op_speed.OpMismatchError, match=r"output differs by 1\.0e-02"):
        op_speed.check_agreement(tmp_path, "eager-64", message)


def test_op_speed_measures_an_opponent(monkeypatch):
    monkeypatch.setattr(op_speed, "MODES", ("eager",))
    opponent = (*NUMPY_OPPONENT, "benchmarks.numpy_ops")
    rows = list(op_speed.compare(opponent, op_message("mamba2"), rounds=1, steps=1))
    assert [(row["part"], row["chunk"]) for row in rows] == [(part, c) for part in op_speed.PASSES for c in (64, 256)]
    assert all(row["difference"] < op_speed.TOLERANCE and row["ratio"] > 0 for row in rows)
    assert len(op_speed.report(json.loads(json.dumps(rows))).splitlines()) == 2 + len(rows)


def test_error_if_the_opponent_does_not_start(capsys):
    opponent = (sys.executable, "-c", "raise SystemExit('no such module')")
    with pytest.raises(WorkerError, match="no opponent started"):
        list(op_speed.compare(opponent, op_message("mamba2"), rounds=1, steps=1))
    assert "no such module" in capsys.readouterr().err


# Kernels against flash-linear-attention


def fla_stub(name: str) -> Callable[..., Any]:
    """Return a NumPy implementation of a function of fla, with the parameters of fla."""
    op = numpy_ops.gated_delta_rule

    def chunk_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True):
        assert not normalize
        return op(q, k, v, scale=scale), None

    def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False):
        assert g is None or np.ndim(g) == 3
        return op(q, k, v, g, scale=scale), None

    def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
        assert np.shape(g) == np.shape(k)
        return op(q, k, v, g, scale=scale), None

    def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
        assert np.shape(g) == np.shape(beta) == np.shape(k)[:3]
        return op(q, k, v, g, beta, scale), None

    def chunk_kda(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
        assert np.shape(g) == np.shape(k)
        return op(q, k, v, g, beta, scale), None

    def parallel_based(q, k, v, scale=None, use_norm=True):
        assert scale is None and use_norm
        return numpy_ops.based(q, k, v)

    stubs = (chunk_linear_attn, chunk_simple_gla, chunk_gla, chunk_gated_delta_rule, chunk_kda, parallel_based)
    return {stub.__name__: stub for stub in stubs}[name]


@pytest.mark.parametrize("name", gpu_compare.COMPARISONS)
def test_fla_computes_the_same_op(name, monkeypatch):
    """The output and all gradients agree, in the order in which `kernel_speed` compares them."""
    module, function = FLA_FUNCTIONS[name]
    for path in ("fla", "fla.ops", module):
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    setattr(sys.modules[module], function, fla_stub(function))
    comparison, shape = gpu_compare.COMPARISONS[name], gpu_compare.Shape(1, 4, 2, 3, 4)
    assert comparison.seconds(shape, True, 1.0, 1.0) > comparison.seconds(shape, False, 1.0, 1.0) > 0
    random_inputs, d_out = kernel_speed.hand_over(comparison, shape)
    inputs = {n: x.astype(jnp.float32) for n, x in random_inputs.items()}
    outputs = kernel_speed._jax_call(comparison, "xla", inputs, d_out.astype(jnp.float32))[0]()
    arrays = {n: np.asarray(x, np.float64) for n, x in inputs.items()}
    weight = np.asarray(d_out, np.float64)
    gradients = central_differences(lambda **x: float((fla_ops.OPS[name](**x) * weight).sum()), arrays)
    expected = [fla_ops.OPS[name](**arrays), *(gradients[n] for n in sorted(gradients))]
    assert kernel_speed.relative_error([jnp.asarray(x, jnp.float32) for x in expected], outputs) < 1e-4


def test_kernel_comparisons_have_the_same_arguments_on_both_sides():
    assert set(gpu_compare.COMPARISONS) == set(fla_ops.OPS) == set(FLA_FUNCTIONS)
    for name, comparison in gpu_compare.COMPARISONS.items():
        inputs = comparison.inputs(gpu_compare.Shape(1, 4, 2, 3, 4))
        assert list(inspect.signature(fla_ops.OPS[name]).parameters) == list(inputs)
        inspect.signature(comparison.op).bind(**inputs, implementation="xla")


@pytest.mark.parametrize(
    "case", {case.op: case for case in reversed(static_gpu.GPU_KERNEL_CASES)}.values(), ids=lambda case: case.op
)
def test_static_gpu_cases_can_be_traced(case):
    function, arguments = static_gpu.op_with_gradients(case)
    with interpret_kernels():
        jax.eval_shape(function, *(jax.ShapeDtypeStruct(*argument) for argument in arguments))


# Comparisons within recallax


def test_hydra_is_compared_with_attention_of_equal_size():
    hydra = hydra_crossover.hydra_toy()
    sizes = [accounting.count_parameters(config) for config in (hydra, hydra_crossover.attention_of_equal_size(hydra))]
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)


def test_both_sides_of_hydra_crossover_run_a_step():
    hydra = dataclasses.replace(hydra_crossover.hydra_toy(), d_model=32, vocab_size=256, pattern="ssm all")
    attention = dataclasses.replace(hydra_crossover.attention_of_equal_size(hydra), pattern="layer")
    for call in hydra_crossover.PROGRAMS.values():
        row = hydra_crossover.measure({"hydra": call(hydra, 32), "attention": call(attention, 32)})
        assert row["rounds"] == hydra_crossover.ROUNDS and row["ratio"] > 0


def test_generation_is_compared_with_attention(monkeypatch):
    for name, value in {"PREFILL_CHUNK": 8, "NEW_TOKENS": 2, "ROUNDS": 1, "ROWS": 2}.items():
        monkeypatch.setattr(generation_speed, name, value)
    for name in generation_speed.MIXERS:
        assert accounting.state_bytes(generation_speed.lm_config(name), 16) > 0
    selected = {
        name: mixer for name, mixer in generation_speed.MIXERS.items() if name in ("attention", "gated_delta_net")
    }
    monkeypatch.setattr(generation_speed, "MIXERS", selected)
    rows = generation_speed.measure(16)
    assert [row["model"] for row in rows] == list(selected)
    assert rows[0]["times_attention"] == 1.0 and rows[1]["tokens_per_second"] > 0


def test_prefix_is_compared_with_causal_and_repeated_prompts(monkeypatch):
    monkeypatch.setattr(prefix_prefill, "LENGTH", 16)
    for pattern in prefix_prefill.PATTERNS:
        variants = prefix_prefill.prefills(pattern, 8)
        sizes = {name: accounting.count_parameters(config) for name, (config, _, _) in variants.items()}
        assert sizes["causal"] == sizes["prompt"] < sizes["prefix"]
    for config, length, prefix in prefix_prefill.prefills("layer", 8).values():
        prefix_prefill.compile_prefill(dataclasses.replace(config, d_model=64), length, prefix)()


def test_chunked_neural_memory_agrees_with_materialized_gradients(monkeypatch):
    for name, value in {"LENGTH": 8, "WIDTH": 4, "CHUNK": 4, "ROUNDS": 1}.items():
        monkeypatch.setattr(neural_memory_speed, name, value)
    assert neural_memory_speed.measure()["error"] < neural_memory_speed.ALLOWED


def test_loop_generates_mqar_rows(monkeypatch):
    for name, value in {"TOKENS": 2**11, "LOOP_ROWS": 4, "REPEATS": 1}.items():
        monkeypatch.setattr(task_speed, name, value)
    least, median, *ratios = task_speed.measure(64, 4)
    assert 0 < least <= median and len(ratios) == 2
    task = MQAR.single(length=64, num_kv_pairs=4)
    rows = task_speed.mqar_rows_by_loop(np.random.default_rng(0), 4, 64, 4, task.vocab_size, task.power_a)
    batch = task.batch(0, "train", 0, 4)
    assert (rows.shape, rows.dtype) == (batch.tokens.shape, batch.tokens.dtype)
    half = task.vocab_size // 2
    for tokens in (rows, batch.tokens):
        keys, values = tokens[:, 0:8:2], tokens[:, 1:8:2]
        assert (keys < half).all() and (values >= half).all()
        assert all(np.isin(k, row[8:]).all() for k, row in zip(keys, tokens, strict=True))


# With PyTorch


@pytest.fixture
def torch_python(request: pytest.FixtureRequest) -> str:
    """Return a Python that can import torch, or the modules in the parameter of the test; skip the test without one."""
    modules = getattr(request, "param", "torch")
    python = os.environ.get("TORCH_PYTHON") or sys.executable
    if subprocess.run([python, "-c", f"import {modules}"], capture_output=True).returncode:
        pytest.skip(f"neither TORCH_PYTHON nor this Python can import {modules}")
    return python


@pytest.mark.parametrize("mixer", PROJECTION_PATHS)
def test_pytorch_trains_the_same_model(mixer, torch_python, monkeypatch):
    monkeypatch.setattr(train_speed, "MODES", ("eager",))
    opponent = (torch_python, "-m", "benchmarks.torch_mqar")
    (row,) = train_speed.measure(opponent, training(mixer, steps=5), rounds=1, checked=3)
    assert row["difference"] < 1e-3


@pytest.mark.parametrize("torch_python", ["torch, transformers"], indirect=True)
@pytest.mark.parametrize("op", COMPARED)
def test_transformers_computes_the_same_op(op, torch_python, monkeypatch):
    if not subprocess.run([torch_python, "-c", "import fla"], capture_output=True).returncode:
        pytest.skip("transformers calls fla's kernels where fla is installed")
    monkeypatch.setattr(op_speed, "MODES", ("eager",))
    opponent = (torch_python, "-m", "benchmarks.torch_ops")
    rows = list(op_speed.compare(opponent, op_message(op), rounds=1, steps=1))
    assert rows and all(row["difference"] < op_speed.TOLERANCE for row in rows)


@pytest.mark.parametrize("torch_python", ["torch, fla.ops"], indirect=True)
def test_fla_functions_accept_the_arguments(torch_python):
    """The functions are replaced by mocks with their signatures, because computing needs a GPU."""
    names = {name: list(inspect.signature(op).parameters) for name, op in fla_ops.OPS.items()}
    program = f"""
import importlib
from unittest import mock
from benchmarks import fla_ops

for name, (module, function) in {FLA_FUNCTIONS!r}.items():
    module = importlib.import_module(module)
    autospec = mock.create_autospec(getattr(module, function), return_value=("out", None))
    with mock.patch.object(module, function, autospec):
        fla_ops.OPS[name](**dict.fromkeys({names!r}[name]))
    autospec.assert_called_once()
"""
    done = subprocess.run([torch_python, "-c", program], cwd=FOLDER.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
