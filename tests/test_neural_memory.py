"""Neural memory: the chunked form against a token loop, special cases with known equivalents, and the mixer."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recallax.config import ConfigError
from recallax.layers import LayerInfo, NeuralMemory
from recallax.pallas_kernels.delta_rule import delta_rule
from recallax.pallas_kernels.dispatch import Unsupported
from recallax.pallas_kernels.linear_attention import linear_attention
from recallax.pallas_kernels.neural_memory import (
    InnerOptimizer,
    MemoryInputs,
    NeuralState,
    OuterParams,
    init_neural_state,
    neural_memory,
    neural_memory_step,
)
from recallax.pallas_kernels.neural_memory.apply_boundary import newton_schulz
from recallax.pallas_kernels.neural_memory.inner_optimizer import LinearNet, MLPNet, RandomFeatureNet, SwiGLUNet
from recallax.pallas_kernels.neural_memory.update_coefficients import FastWeights, update_coefficients
from recallax.types import Precision, unpacked_seq_info
from tests.test_ops import max_block_error, unchecked

pytestmark = pytest.mark.usefixtures("strict")

B, H, D = 2, 2, 6
EXACT = InnerOptimizer(network=LinearNet(), gradient="token", chunk_size=8)
INNER_OPTIMIZERS = {
    "linear": InnerOptimizer(network=LinearNet(), chunk_size=4),
    "linear, decay to zero": InnerOptimizer(network=LinearNet(), chunk_size=4, decay_to="zero"),
    "deep": InnerOptimizer(network=MLPNet(), chunk_size=4),
    "three layers, huber": InnerOptimizer(network=MLPNet(depth=3, expansion=2), loss="huber", chunk_size=4),
    "one layer with norm": InnerOptimizer(network=MLPNet(depth=1), chunk_size=4),
    "last layer only": InnerOptimizer(network=MLPNet(), trainable_weights=("w2",), chunk_size=4),
    "swiglu, dot, read before": InnerOptimizer(network=SwiGLUNet(), loss="dot", readout="chunk_start", chunk_size=4),
    "rows": InnerOptimizer(
        network=SwiGLUNet(), loss="dot", readout="chunk_start", boundary="weight_norm", chunk_size=8
    ),
    "muon": InnerOptimizer(network=SwiGLUNet(), loss="dot", readout="chunk_start", boundary="muon", chunk_size=8),
    "deep, no momentum": InnerOptimizer(network=MLPNet(), momentum=False, chunk_size=4),
    "exact, no momentum": replace(EXACT, momentum=False),
    "TTT": InnerOptimizer(network=MLPNet(depth=1), momentum=False, gradient_reduction="mean", chunk_size=4),
    "random features": InnerOptimizer(network=RandomFeatureNet(expansion=3), decay_to="zero", chunk_size=4),
    "resets": InnerOptimizer(network=MLPNet(), chunk_size=4, reset_interval=12),
    "chunks of one": InnerOptimizer(network=MLPNet(), chunk_size=1),
    "exact": EXACT,
    "exact, decay to zero": replace(EXACT, decay_to="zero"),
    "exact at the decayed": replace(EXACT, gradient="token_decayed"),
    "exact at the decayed, to zero": replace(EXACT, gradient="token_decayed", decay_to="zero"),
}
"""Inner optimizers by name. Chunks are short to save compile time; they are longer with a boundary that normalises,
where rounding errors grow at each boundary."""


def draw(inner_optimizer: InnerOptimizer, length: int, correlation: float = 0.3) -> tuple[Any, Any]:
    """Draw inputs in float64: normalised queries and keys, gates inside their range, and weights of size 1."""
    rng = np.random.default_rng(length)
    q, k, v = rng.normal(size=(3, B, length, H, D))
    k = np.sqrt(1 - correlation) * k + np.sqrt(correlation) * rng.normal(size=D)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    layers = len(inner_optimizer.trainable_shapes(D))
    gates = (
        rng.uniform(0.01, 0.2, size=(B, length, H, layers)),
        np.log(rng.uniform(0.1, 0.9, size=(B, length, H, layers))),
        np.log(rng.uniform(0.7, 1.0, size=(B, length, H, layers))),
    )
    shapes = inner_optimizer.network.shapes(D)
    weights = {n: rng.normal(size=(H, *s)) / np.sqrt(s[0]) for n, s in shapes.items()}
    gain, offset = cast(Any, (1 + 0.1 * rng.normal(size=(H, D)), 0.1 * rng.normal(size=(H, D))))
    delta: Any = {n: 0.1 * rng.normal(size=(H, *s)) for n, s in inner_optimizer.trainable_shapes(D).items()}
    start = FastWeights(delta, {n: -x for n, x in delta.items()} if inner_optimizer.momentum else {})
    return MemoryInputs(q, k, v, *cast(Any, gates)), OuterParams(weights, gain, offset, start)


def single(x: Any, dtype: Any = jnp.float32) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), x)


@partial(jax.jit, static_argnums=0, static_argnames="implementation")
def run(
    inner_optimizer: InnerOptimizer, tokens: MemoryInputs, outer_params: OuterParams, **options: Any
) -> tuple[jax.Array, NeuralState]:
    """Call `neural_memory`, compiled once per configuration, shapes and options for all tests."""
    return neural_memory(inner_optimizer, tokens, outer_params, **options)


LENGTH = 37
"""Length of most rows, so that tests share compiled programs: whole chunks and one more token."""


def random_inputs(inner_optimizer: InnerOptimizer, length: int = LENGTH) -> tuple[MemoryInputs, OuterParams]:
    """Return inputs of `draw` as float32 numpy arrays, which can be sliced without compilation."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32), draw(inner_optimizer, length))


def tokens_from(rows: Any, first: Any) -> Any:
    """Roll each row so that it starts at its token `first`."""

    def rolled(x: np.ndarray) -> np.ndarray:
        return np.stack([np.roll(row, -n, axis=0) for row, n in zip(x, np.broadcast_to(first, B), strict=True)])

    return jax.tree.map(rolled, rows)


def tokens_before(count: Any) -> np.ndarray:
    """Return segment ids of rows with one document of `count` tokens and padding."""
    return (np.arange(LENGTH) < np.broadcast_to(count, B)[:, None]).astype(np.int32)


def close(actual: Any, expected: Any, tolerance: float) -> None:
    """Assert that arrays differ by at most `tolerance` times the largest expected entry."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        assert np.abs(a - b).max(initial=0) <= tolerance * max(1e-2, np.abs(b).max(initial=0))


SINGLE_CASES = {"deep": 1, "exact": 1}
"""Cases that are also tested with one token."""


FULL_ONLY = {
    "linear": "exact",
    "three layers, huber": "deep",
    "one layer with norm": "TTT",
    "linear, decay to zero": "random features",
    "swiglu, dot, read before": "muon",
    "rows": "muon",
    "deep, no momentum": "TTT",
    "exact, no momentum": "exact at the decayed, to zero",
    "exact, decay to zero": "exact at the decayed, to zero",
    "exact at the decayed": "exact at the decayed, to zero",
    "last layer only": "random features",
    "chunks of one": "exact",
}
"""Cases whose code another case also covers; they are left to `make test-full`."""


@pytest.mark.parametrize(
    ("name", "length"),
    [
        *(pytest.param(n, 29, marks=[pytest.mark.full] * (n in FULL_ONLY)) for n in INNER_OPTIMIZERS),
        *SINGLE_CASES.items(),
    ],
)
def test_chunked_form_matches_token_loop_in_values_and_gradients(name, length):
    inner_optimizer = INNER_OPTIMIZERS[name]
    tokens, outer_params = draw(inner_optimizer, length)
    rng = np.random.default_rng(1)
    cotangent = rng.normal(size=(B, length, H, D))

    def results(implementation: str, tokens: MemoryInputs, outer_params: OuterParams):
        def run(tokens, outer_params):
            out, state = neural_memory(inner_optimizer, tokens, outer_params, implementation=implementation)
            loss = jnp.sum(out * cotangent.astype(out.dtype))
            squares = jax.tree.map(lambda x: jnp.sum(x * x), state.fast_weights)
            return loss + 0.1 * sum(jax.tree.leaves(squares)), (out, state.fast_weights)

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(tokens, outer_params)

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (tokens, outer_params))
        (_, (out_, memory_)), grads_ = jax.tree.map(np.asarray, results("reference", *wide))
    (_, (out, memory)), grads = results("xla", single(tokens), single(outer_params))
    assert max_block_error(np.asarray(out, np.float64), out_) <= 1e-4
    close(memory, memory_, 1e-4)
    close(grads, grads_, 5e-4)


@pytest.mark.parametrize(
    "name", ["deep", "last layer only", "muon", "linear, decay to zero", "deep, no momentum", "TTT"]
)
def test_materialized_gradients_match_the_chunked_form(name):
    inner_optimizer = INNER_OPTIMIZERS[name]
    tokens, outer_params = random_inputs(inner_optimizer)
    segments = np.asarray([[1] * 29 + [0] * 8, [1] * 12 + [0] * 4 + [2] * 13 + [0] * 8], np.int32)
    materialized, chunked = (
        run(inner_optimizer, tokens, outer_params, segment_ids=segments, implementation=f)
        for f in ("materialized", "xla")
    )
    valid = (segments > 0)[..., None, None]
    close((np.where(valid, materialized[0], 0), materialized[1]), (np.where(valid, chunked[0], 0), chunked[1]), 3e-5)


def test_materialized_implementation_rejects_unsupported_options():
    with pytest.raises(Unsupported, match="supports 'chunk_start' only"):
        neural_memory(EXACT, *(single(x) for x in draw(EXACT, 4)), implementation="materialized")


SUBSET = ("deep", "exact")


@pytest.mark.parametrize(
    "name", [n if n in SUBSET else pytest.param(n, marks=pytest.mark.full) for n in INNER_OPTIMIZERS]
)
def test_split_rows_and_single_steps_match_whole_rows(name):
    inner_optimizer = INNER_OPTIMIZERS[name]
    tokens, outer_params = random_inputs(inner_optimizer)
    whole, last = run(inner_optimizer, tokens, outer_params, segment_ids=tokens_before(LENGTH))
    for cut in range(1, LENGTH):
        first, state = run(inner_optimizer, tokens, outer_params, segment_ids=tokens_before(cut))
        later = tokens_from(tokens, cut)
        second, state = run(inner_optimizer, later, outer_params, state=state, segment_ids=tokens_before(LENGTH - cut))
        outputs = np.concatenate([np.asarray(first)[:, :cut], np.asarray(second)[:, : LENGTH - cut]], axis=1)
        close(outputs, whole, 3e-5)
        close(state, last, 3e-5)
    state = init_neural_state(inner_optimizer, B, H, D)
    step = jax.jit(partial(neural_memory_step, inner_optimizer))
    for t in range(LENGTH):
        out, state = step(jax.tree.map(lambda x, t=t: x[:, t], tokens), outer_params, state, np.ones(B, bool))
        close(out, np.asarray(whole)[:, t], 5e-5)
    close(state, last, 5e-5)


def test_rows_continue_at_different_offsets_in_their_chunks():
    inner_optimizer, num_seen, num_new = INNER_OPTIMIZERS["deep"], np.asarray([5, 11]), 12
    tokens, outer_params = random_inputs(inner_optimizer)
    whole = tokens_from(run(inner_optimizer, tokens, outer_params, segment_ids=tokens_before(LENGTH))[0], num_seen)
    _, state = run(inner_optimizer, tokens, outer_params, segment_ids=tokens_before(num_seen))
    out, after = run(
        inner_optimizer, tokens_from(tokens, num_seen), outer_params, state=state, segment_ids=tokens_before(num_new)
    )
    close(out[:, :num_new], whole[:, :num_new], 3e-5)
    assert after.num_tokens is not None and after.num_tokens.tolist() == (num_seen + num_new).tolist()


@pytest.mark.parametrize("name", ["deep", "exact", "exact, decay to zero", "exact at the decayed, to zero"])
def test_packed_documents_do_not_interact(name):
    inner_optimizer = INNER_OPTIMIZERS[name]
    tokens, outer_params = random_inputs(inner_optimizer)
    # Documents start on the grid, with padding before it; per-token gradients need no grid.
    spans = [(0, 13), (16, 17), (24, LENGTH)] if name == "deep" else [(0, 13), (13, 14), (17, LENGTH)]
    segments = np.zeros((B, LENGTH), np.int32)
    for i, (begin, end) in enumerate(spans):
        segments[:, begin:end] = i + 1
    out, state = run(inner_optimizer, tokens, outer_params, segment_ids=segments)
    for begin, end in spans:
        alone, last = run(
            inner_optimizer, tokens_from(tokens, begin), outer_params, segment_ids=tokens_before(end - begin)
        )
        close(out[:, begin:end], alone[:, : end - begin], 3e-5)
        close(state.fast_weights, last.fast_weights, 3e-5) if end == LENGTH else None


@pytest.mark.parametrize("implementation", ["reference", "materialized", "xla"])
def test_gates_belong_to_matrices_in_ascending_order_of_names(implementation):
    """The order of `SwiGLUNet` is w1, w3, w2; each gate alone shows which matrix it belongs to."""
    inner_optimizer = InnerOptimizer(network=SwiGLUNet(expansion=2), chunk_size=1)
    _, params = jax.tree.map(lambda x: np.asarray(x, np.float32)[:1], draw(inner_optimizer, 1))
    ones = {name: np.ones_like(x) for name, x in params.initial_fast_weights.delta.items()}
    params = params._replace(initial_fast_weights=FastWeights(ones, ones))
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 1, 1, D)).astype(np.float32)
    for i, name in enumerate(("w1", "w2", "w3")):
        at_slot = np.arange(3) == i
        off = {"lr": np.zeros(3), "log_momentum": np.full(3, -100.0), "log_decay": np.zeros(3)}
        on = {"lr": 0.5, "log_momentum": 0.0, "log_decay": -1.0}
        for gate in off:
            gates = off | {gate: np.where(at_slot, on[gate], off[gate])}
            tokens = MemoryInputs(q, k, v, *cast(Any, [np.float32(x)[None, None, None] for x in gates.values()]))
            _, state = run(inner_optimizer, tokens, params, implementation=implementation)
            changed = {n: float(np.abs(x - 1).max()) for n, x in state.fast_weights.delta.items()}
            assert [n for n, size in changed.items() if size > 1e-6] == [name], (gate, changed)
            assert gate == "lr" or changed[name] == pytest.approx(1.0 if gate == "log_momentum" else 1 - np.exp(-1))
    assert inner_optimizer.gate_names == ("w1", "w2", "w3")
    assert InnerOptimizer(network=MLPNet(depth=10)).gate_names[:3] == ("w1", "w10", "w2")


@pytest.mark.parametrize("segments", [[1] * 10 + [2] * 27, [1] * 5 + [0] * 2 + [1] * 30])
def test_documents_off_the_grid_or_with_gaps_are_nan(segments):
    inner_optimizer = INNER_OPTIMIZERS["deep"]
    tokens, outer_params = random_inputs(inner_optimizer)
    out, _ = run(inner_optimizer, tokens, outer_params, segment_ids=np.asarray([segments, [1] * LENGTH], np.int32))
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_per_token_memory_without_momentum_equals_the_gated_delta_rule():
    inner_optimizer = InnerOptimizer(
        network=LinearNet(), momentum=False, gradient="token_decayed", decay_to="zero", chunk_size=8
    )
    tokens, outer_params = (single(x) for x in draw(inner_optimizer, 29))
    outer_params = outer_params._replace(initial_fast_weights=None)
    beta, log_keep = tokens.lr[..., 0], tokens.log_decay[..., 0]
    start = jnp.broadcast_to(outer_params.initial_weights["w1"], (B, H, D, D))
    expected, final = delta_rule(
        *tokens[:3], erase=beta, write=beta, log_decay=log_keep, state=start, scale=1.0, implementation="reference"
    )
    out, state = run(inner_optimizer, tokens, outer_params)
    close((out, outer_params.initial_weights["w1"][None] + state.fast_weights.delta["w1"]), (expected, final), 2e-5)
    no_decay = tokens._replace(log_decay=jnp.zeros_like(tokens.lr))
    expected, _ = delta_rule(*tokens[:3], erase=beta, write=beta, state=start, scale=1.0, implementation="reference")
    close(run(inner_optimizer, no_decay, outer_params)[0], expected, 2e-5)
    # The published equation of Titans takes the gradient before the decay, which is a different function.
    published, _ = run(replace(inner_optimizer, gradient="token"), tokens, outer_params)
    assert float(jnp.abs(published - out).max()) > 1e-3


def test_dot_loss_and_a_single_l2_chunk_equal_linear_attention():
    inner_optimizer = InnerOptimizer(network=LinearNet(), loss="dot", momentum=False, chunk_size=8, decay_to="zero")
    tokens, outer_params = (single(x) for x in draw(inner_optimizer, 29))
    zero = jnp.zeros_like(tokens.lr)
    tokens = tokens._replace(lr=zero + 1, log_decay=zero)
    outer_params = outer_params._replace(initial_weights={"w1": jnp.zeros((H, D, D))}, initial_fast_weights=None)
    expected, _ = linear_attention(*tokens[:3], scale=1.0, implementation="reference")
    close(run(inner_optimizer, tokens, outer_params)[0], expected, 2e-5)
    close(run(replace(inner_optimizer, loss="l2", chunk_size=32), tokens, outer_params)[0], expected, 2e-5)


def test_per_token_memory_does_not_depend_on_the_chunk_size():
    tokens, outer_params = (single(x) for x in draw(EXACT, 64, correlation=0.7))
    outs = [run(replace(EXACT, chunk_size=chunk), tokens, outer_params)[0] for chunk in (8, 32)]
    close(outs[1], outs[0], 2e-5)
    chunked = [run(InnerOptimizer(network=LinearNet(), chunk_size=chunk), tokens, outer_params)[0] for chunk in (8, 32)]
    assert float(jnp.abs(chunked[0] - chunked[1]).max()) > 1e-2


@jax.jit
def deep_memory_gradients(tokens: MemoryInputs, outer_params: OuterParams) -> tuple[jax.Array, Any]:
    def loss(tokens, outer_params):
        return jnp.sum(neural_memory(INNER_OPTIMIZERS["deep"], tokens, outer_params)[0] ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1))(tokens, outer_params)


EXTREME_GATES = [("log_decay", 0.0), ("log_decay", -1e4), ("log_momentum", 0.0), ("log_momentum", -1e4), ("lr", 0.0)]


@pytest.mark.parametrize(("gate", "value"), EXTREME_GATES)
def test_extreme_gates_have_finite_outputs_and_gradients(gate, value):
    tokens, outer_params = random_inputs(INNER_OPTIMIZERS["deep"])
    tokens = tokens._replace(**{gate: np.full_like(tokens.lr, value)})
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(deep_memory_gradients(tokens, outer_params)))


def test_memory_can_learn_after_full_decay():
    inner_optimizer = INNER_OPTIMIZERS["deep"]
    tokens, outer_params = random_inputs(inner_optimizer)
    decays_fully = np.arange(LENGTH)[None, :, None, None] == 7
    tokens = tokens._replace(log_decay=np.broadcast_to(np.where(decays_fully, np.float32(-1e4), 0), tokens.lr.shape))
    # Momentum from the tokens after the decay.
    after, decayed = (
        run(inner_optimizer, tokens, outer_params, segment_ids=tokens_before(count))[1].fast_weights.momentum
        for count in (24, 8)
    )
    assert min(float(jnp.abs(after[name] - decayed[name]).max()) for name in after) > 1e-3

    no_momentum = np.full_like(tokens.lr, -1e4)
    tokens = tokens._replace(log_momentum=no_momentum, lr=np.where(decays_fully, 0, tokens.lr))
    _, state = run(replace(inner_optimizer, decay_to="zero"), tokens, outer_params, segment_ids=tokens_before(24))
    weights = {name: outer_params.initial_weights[name][None] + x for name, x in state.fast_weights.delta.items()}
    assert all(float(jnp.abs(x).max()) == 0 for x in weights.values())  # zero weights have zero gradients


def test_update_coefficients_are_accurate_to_1e_5():
    tokens, _ = draw(INNER_OPTIMIZERS["deep"], 128)
    visible = jnp.tril(jnp.ones((B, 128, 128), bool))
    lr, momentum, keep = (
        np.moveaxis(x, 1, -1) for x in (tokens.lr, np.exp(tokens.log_momentum), np.exp(tokens.log_decay))
    )
    expected = np.zeros((B, H, lr.shape[2], 128, 128))
    surprise = np.zeros(expected.shape[:-1])
    for t in range(128):
        surprise *= momentum[..., t, None]
        surprise[..., t] += lr[..., t]
        expected[..., t, :] = (keep[..., t, None] * expected[..., t - 1, :] if t else 0) + surprise
    coefficients = jax.jit(update_coefficients, static_argnums=0)(INNER_OPTIMIZERS["deep"], single(tokens), visible)
    actual = np.asarray(coefficients.gradients, np.float64)
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("gradient", ["token", "chunk_start"])
@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
def test_default_learning_rate_is_in_the_measured_stable_range(gradient, chunk):
    path = Path(__file__).parent.parent / "experiments" / "inner_stability" / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    measured = [row for row in rows if row["gradient"] == gradient]
    assert len(measured) == 6
    network = LinearNet()
    step = NeuralMemory(inner_optimizer=InnerOptimizer(network=network, gradient=gradient, chunk_size=chunk)).stable_lr
    for row in measured:
        bound = row["largest"][str(chunk)] or 0.01  # the smallest learning rate that was measured
        assert step * (1 - row["momentum"]) <= bound, row


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)])
def test_muon_moves_singular_values_close_to_one(shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    values = np.linalg.svd(np.asarray(newton_schulz(x)), compute_uv=False)
    assert values.min() > 0.5 and values.max() < 1.3
    assert jnp.isfinite(jax.grad(lambda x: jnp.sum(newton_schulz(x) ** 2))(jnp.zeros(shape))).all()


@pytest.mark.parametrize("name", ["deep", "exact", "muon"])
def test_later_tokens_do_not_change_earlier_outputs(name):
    inner_optimizer = INNER_OPTIMIZERS[name]
    tokens, outer_params = random_inputs(inner_optimizer)
    expected, _ = run(inner_optimizer, tokens, outer_params, segment_ids=tokens_before(LENGTH))
    for cut in range(1, LENGTH):
        later = (np.arange(LENGTH) >= cut)[:, None, None]
        other = jax.tree.map(lambda x, later=later: np.where(later, x - np.float32(0.3), x), tokens)
        changed, _ = run(inner_optimizer, other, outer_params, segment_ids=tokens_before(LENGTH))
        np.testing.assert_array_equal(np.asarray(expected)[:, :cut], np.asarray(changed)[:, :cut])


# ---- the mixer

MIXER = NeuralMemory(num_heads=H, head_dim=D, inner_optimizer=INNER_OPTIMIZERS["deep"], conv_size=0)
MODEL = 16


def build_mixer(config: NeuralMemory) -> tuple[nnx.GraphDef, Any]:
    module = config.build(MODEL, LayerInfo(0, 2), precision=Precision(), rngs=nnx.Rngs(0))
    return nnx.split(module)


def mixer_inputs(length: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(B, length, MODEL)).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def mixer_outputs(graph: nnx.GraphDef, params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """Return outputs of the mixer for whole rows, and the final state."""
    module = nnx.merge(graph, params)
    y, state, _ = module.prefill(x, unpacked_seq_info(*x.shape[:2]), module.init_state(*x.shape[:2]))
    return y, state


@partial(jax.jit, static_argnums=0)
def mixer_gradients(graph: nnx.GraphDef, params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    return jax.value_and_grad(lambda params, x: jnp.sum(mixer_outputs(graph, params, x)[0] ** 2), argnums=(0, 1))(
        params, x
    )


def test_initial_gates_have_long_memory_half_momentum_and_small_steps():
    module = MIXER.build(MODEL, LayerInfo(0, 2), precision=Precision(), rngs=nnx.Rngs(0))
    projections = module.streams(jnp.asarray(mixer_inputs(50)))
    tokens = jax.tree.map(np.asarray, module._memory_inputs(module._concat(projections), projections))
    assert np.exp(tokens.log_decay).min() >= 0.99 and np.exp(tokens.log_decay).max() < 0.9975
    assert np.abs(np.exp(tokens.log_momentum) - 0.5).max() < 0.1
    chunk = MIXER.inner_optimizer.chunk_size
    steps = tokens.lr[:, : 50 // chunk * chunk].reshape(B, -1, chunk, H, 2).sum(axis=2)
    assert steps.min() > 0.2 and steps.max() < 0.5  # over a chunk


@pytest.mark.parametrize("name", ["keep", "momentum", "lr"])
@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_mixer_with_extreme_gates_has_finite_outputs_and_gradients(name, value):
    graph, params = build_mixer(MIXER)
    bias = params["biases"][name]
    bias[...] = jnp.full_like(bias[...], value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(mixer_gradients(graph, params, mixer_inputs(LENGTH))))


def test_reset_restores_initial_memory_and_zero_weights_cannot_learn():
    graph, params = build_mixer(MIXER)
    for name in ("keep", "momentum", "lr"):  # a large first channel closes all gates
        kernel = params["streams"]["parts"][name]["kernel"]
        kernel[...] = kernel[...].at[0].set(-2e4)
    keep = params["biases"]["keep"]
    keep[...] = jnp.full_like(keep[...], 1e4)  # no other decay: its rounding errors would make zero weights nonzero
    x = mixer_inputs(24)
    x[..., 0] = np.arange(24) == 7
    (decayed, state), (restarted, alone) = mixer_outputs(graph, params, x), mixer_outputs(graph, params, x[:, 8:])
    close(decayed[:, 8:], restarted, 3e-5)
    close(state.neural_state.fast_weights, alone.neural_state.fast_weights, 3e-5)
    learned = jax.tree.map(lambda change: float(jnp.abs(change).max()), state.neural_state.fast_weights.delta)
    assert min(learned.values()) > 1e-3
    graph, _ = build_mixer(replace(MIXER, inner_optimizer=replace(MIXER.inner_optimizer, decay_to="zero")))
    _, state = mixer_outputs(graph, params, x)
    for name, change in state.neural_state.fast_weights.delta.items():
        assert float(jnp.abs(params["weights"][name][...][None] + change).max()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "token"}, "network LinearNet"),
        ({"gradient": "token", "network": LinearNet(), "loss": "dot"}, "l2 loss"),
        ({"gradient_reduction": "mean"}, "momentum=False"),
        ({"trainable_weights": ("w3",)}, "must name some of w1, w2"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_incompatible_options_are_rejected(options, message):
    with pytest.raises(ConfigError, match=message):
        InnerOptimizer(**options)


def test_invalid_shapes_are_rejected():
    inner_optimizer = INNER_OPTIMIZERS["deep"]
    tokens, outer_params = (single(x) for x in draw(inner_optimizer, 8))
    function = unchecked(neural_memory)
    with pytest.raises(ValueError, match="lr has shape"):
        function(inner_optimizer, tokens._replace(lr=tokens.lr[..., :1]), outer_params)
    with pytest.raises(ValueError, match="weight w2 has shape None"):
        function(
            inner_optimizer, tokens, outer_params._replace(initial_weights={"w1": outer_params.initial_weights["w1"]})
        )
