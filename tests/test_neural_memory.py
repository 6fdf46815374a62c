"""A memory that learns while it reads: the chunked form against the token loop, and what its members must equal."""

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
from tests.test_ops import per_block, unchecked

pytestmark = pytest.mark.usefixtures("strict")

B, H, D = 2, 2, 6
EXACT = InnerOptimizer(network=LinearNet(), gradient="token", chunk_size=8)
LEARNERS = {
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
"""Chunks are short, for what they cost is compiling; those whose boundaries renormalise are longer, for rounding grows
with every boundary."""


def draw(learner: InnerOptimizer, length: int, correlation: float = 0.3) -> tuple[Any, Any]:
    """Unit queries and keys, gates away from their ends, weights of size one; float64."""
    rng = np.random.default_rng(length)
    q, k, v = rng.normal(size=(3, B, length, H, D))
    k = np.sqrt(1 - correlation) * k + np.sqrt(correlation) * rng.normal(size=D)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    layers = len(learner.trainable_shapes(D))
    gates = (
        rng.uniform(0.01, 0.2, size=(B, length, H, layers)),
        np.log(rng.uniform(0.1, 0.9, size=(B, length, H, layers))),
        np.log(rng.uniform(0.7, 1.0, size=(B, length, H, layers))),
    )
    shapes = learner.network.shapes(D)
    weights = {n: rng.normal(size=(H, *s)) / np.sqrt(s[0]) for n, s in shapes.items()}
    gain, offset = cast(Any, (1 + 0.1 * rng.normal(size=(H, D)), 0.1 * rng.normal(size=(H, D))))
    begun: Any = {n: 0.1 * rng.normal(size=(H, *s)) for n, s in learner.trainable_shapes(D).items()}
    start = FastWeights(begun, {n: -x for n, x in begun.items()} if learner.momentum else {})
    return MemoryInputs(q, k, v, *cast(Any, gates)), OuterParams(weights, gain, offset, start)


def single(x: Any, dtype: Any = jnp.float32) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), x)


@partial(jax.jit, static_argnums=0, static_argnames="implementation")
def run(
    learner: InnerOptimizer, tokens: MemoryInputs, fixed: OuterParams, **options: Any
) -> tuple[jax.Array, NeuralState]:
    """`neural_memory`, compiled once per learner, shapes and options for all tests."""
    return neural_memory(learner, tokens, fixed, **options)


LENGTH = 37
"""Of most rows, so that tests share what is compiled: whole chunks and one token more."""


def random_inputs(learner: InnerOptimizer, length: int = LENGTH) -> tuple[MemoryInputs, OuterParams]:
    """As `draw`, float32 in numpy: cut and shifted without compiling anything."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32), draw(learner, length))


def tokens_from(rows: Any, first: Any) -> Any:
    """Every array's rows from a token on, which may differ by row; what came before stands behind."""

    def turned(x: np.ndarray) -> np.ndarray:
        return np.stack([np.roll(row, -n, axis=0) for row, n in zip(x, np.broadcast_to(first, B), strict=True)])

    return jax.tree.map(turned, rows)


def tokens_before(count: Any) -> np.ndarray:
    """Segments of rows of one document of so many tokens, and padding."""
    return (np.arange(LENGTH) < np.broadcast_to(count, B)[:, None]).astype(np.int32)


def close(got: Any, want: Any, tolerance: float) -> None:
    """Every array within a tolerance of the largest entry of what it should be."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        assert np.abs(a - b).max(initial=0) <= tolerance * max(1e-2, np.abs(b).max(initial=0))


SINGLE_CASES = {"deep": 1, "exact": 1}
"""At one token as well."""


WIDE = {
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
"""What another learner's case passes through as well: left to `make test-full`."""


@pytest.mark.parametrize(
    ("name", "length"),
    [*(pytest.param(n, 29, marks=[pytest.mark.full] * (n in WIDE)) for n in LEARNERS), *SINGLE_CASES.items()],
)
def test_the_dual_form_is_the_token_loop_in_values_and_gradients(name, length):
    learner = LEARNERS[name]
    tokens, fixed = draw(learner, length)
    rng = np.random.default_rng(1)
    slope = rng.normal(size=(B, length, H, D))

    def results(form: str, tokens: MemoryInputs, fixed: OuterParams):
        def run(tokens, fixed):
            out, state = neural_memory(learner, tokens, fixed, implementation=form)
            loss = jnp.sum(out * slope.astype(out.dtype))
            held = jax.tree.map(lambda x: jnp.sum(x * x), state.fast_weights)
            return loss + 0.1 * sum(jax.tree.leaves(held)), (out, state.fast_weights)

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(tokens, fixed)

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (tokens, fixed))
        (_, (out_, memory_)), slopes_ = jax.tree.map(np.asarray, results("reference", *wide))
    (_, (out, memory)), slopes = results("xla", single(tokens), single(fixed))
    assert per_block(np.asarray(out, np.float64), out_) <= 1e-4
    close(memory, memory_, 1e-4)
    close(slopes, slopes_, 5e-4)


@pytest.mark.parametrize(
    "name", ["deep", "last layer only", "muon", "linear, decay to zero", "deep, no momentum", "TTT"]
)
def test_a_gradient_matrix_per_token_gives_the_same(name):
    learner = LEARNERS[name]
    tokens, fixed = random_inputs(learner)
    segments = np.asarray([[1] * 29 + [0] * 8, [1] * 12 + [0] * 4 + [2] * 13 + [0] * 8], np.int32)
    primal, dual = (
        run(learner, tokens, fixed, segment_ids=segments, implementation=f) for f in ("materialized", "xla")
    )
    valid = (segments > 0)[..., None, None]
    close((np.where(valid, primal[0], 0), primal[1]), (np.where(valid, dual[0], 0), dual[1]), 3e-5)


def test_primal_implementation_rejects_unsupported_options():
    with pytest.raises(Unsupported, match="supports 'chunk_start' only"):
        neural_memory(EXACT, *(single(x) for x in draw(EXACT, 4)), implementation="materialized")


SUBSET = ("deep", "exact")


@pytest.mark.parametrize("name", [n if n in SUBSET else pytest.param(n, marks=pytest.mark.full) for n in LEARNERS])
def test_rows_may_be_cut_anywhere_and_taken_token_by_token(name):
    learner = LEARNERS[name]
    tokens, fixed = random_inputs(learner)
    whole, last = run(learner, tokens, fixed, segment_ids=tokens_before(LENGTH))
    for cut in range(1, LENGTH):
        first, state = run(learner, tokens, fixed, segment_ids=tokens_before(cut))
        later = tokens_from(tokens, cut)
        second, state = run(learner, later, fixed, state=state, segment_ids=tokens_before(LENGTH - cut))
        got = np.concatenate([np.asarray(first)[:, :cut], np.asarray(second)[:, : LENGTH - cut]], axis=1)
        close(got, whole, 3e-5)
        close(state, last, 3e-5)
    state = init_neural_state(learner, B, H, D)
    step = jax.jit(partial(neural_memory_step, learner))
    for t in range(LENGTH):
        out, state = step(jax.tree.map(lambda x, t=t: x[:, t], tokens), fixed, state, np.ones(B, bool))
        close(out, np.asarray(whole)[:, t], 5e-5)
    close(state, last, 5e-5)


def test_rows_at_different_places_in_their_chunks_go_on_side_by_side():
    learner, seen, more = LEARNERS["deep"], np.asarray([5, 11]), 12
    tokens, fixed = random_inputs(learner)
    whole = tokens_from(run(learner, tokens, fixed, segment_ids=tokens_before(LENGTH))[0], seen)
    _, state = run(learner, tokens, fixed, segment_ids=tokens_before(seen))
    out, after = run(learner, tokens_from(tokens, seen), fixed, state=state, segment_ids=tokens_before(more))
    close(out[:, :more], whole[:, :more], 3e-5)
    assert after.num_tokens is not None and after.num_tokens.tolist() == (seen + more).tolist()


@pytest.mark.parametrize("name", ["deep", "exact", "exact, decay to zero", "exact at the decayed, to zero"])
def test_packed_documents_do_not_interact(name):
    learner = LEARNERS[name]
    tokens, fixed = random_inputs(learner)
    # On the grid, with padding up to it; per-token gradients need no grid.
    spans = [(0, 13), (16, 17), (24, LENGTH)] if name == "deep" else [(0, 13), (13, 14), (17, LENGTH)]
    segments = np.zeros((B, LENGTH), np.int32)
    for i, (begin, end) in enumerate(spans):
        segments[:, begin:end] = i + 1
    out, state = run(learner, tokens, fixed, segment_ids=segments)
    for begin, end in spans:
        alone, last = run(learner, tokens_from(tokens, begin), fixed, segment_ids=tokens_before(end - begin))
        close(out[:, begin:end], alone[:, : end - begin], 3e-5)
        close(state.fast_weights, last.fast_weights, 3e-5) if end == LENGTH else None


@pytest.mark.parametrize("segments", [[1] * 10 + [2] * 27, [1] * 5 + [0] * 2 + [1] * 30])
def test_documents_off_the_grid_and_gaps_within_them_give_nan(segments):
    learner = LEARNERS["deep"]
    tokens, fixed = random_inputs(learner)
    out, _ = run(learner, tokens, fixed, segment_ids=np.asarray([segments, [1] * LENGTH], np.int32))
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_without_momentum_the_exact_memory_is_gated_delta_net_and_its_kin():
    learner = InnerOptimizer(
        network=LinearNet(), momentum=False, gradient="token_decayed", decay_to="zero", chunk_size=8
    )
    tokens, fixed = (single(x) for x in draw(learner, 29))
    fixed = fixed._replace(initial_fast_weights=None)
    beta, log_keep = tokens.lr[..., 0], tokens.log_decay[..., 0]
    start = jnp.broadcast_to(fixed.initial_weights["w1"], (B, H, D, D))
    want, final = delta_rule(
        *tokens[:3], erase=beta, write=beta, log_decay=log_keep, state=start, scale=1.0, implementation="reference"
    )
    out, state = run(learner, tokens, fixed)
    close((out, fixed.initial_weights["w1"][None] + state.fast_weights.delta["w1"]), (want, final), 2e-5)
    still = tokens._replace(log_decay=jnp.zeros_like(tokens.lr))
    want, _ = delta_rule(*tokens[:3], erase=beta, write=beta, state=start, scale=1.0, implementation="reference")
    close(run(learner, still, fixed)[0], want, 2e-5)
    # Titans as printed takes the gradient before the decay, and that is something else.
    literal, _ = run(replace(learner, gradient="token"), tokens, fixed)
    assert float(jnp.abs(literal - out).max()) > 1e-3


def test_the_dot_loss_is_linear_attention_and_so_is_one_chunk_of_l2_from_zero():
    learner = InnerOptimizer(network=LinearNet(), loss="dot", momentum=False, chunk_size=8, decay_to="zero")
    tokens, fixed = (single(x) for x in draw(learner, 29))
    zero = jnp.zeros_like(tokens.lr)
    tokens = tokens._replace(lr=zero + 1, log_decay=zero)
    fixed = fixed._replace(initial_weights={"w1": jnp.zeros((H, D, D))}, initial_fast_weights=None)
    want, _ = linear_attention(*tokens[:3], scale=1.0, implementation="reference")
    close(run(learner, tokens, fixed)[0], want, 2e-5)
    close(run(replace(learner, loss="l2", chunk_size=32), tokens, fixed)[0], want, 2e-5)


def test_chunks_change_only_the_speed_of_the_exact_memory():
    tokens, fixed = (single(x) for x in draw(EXACT, 64, correlation=0.7))
    outs = [run(replace(EXACT, chunk_size=chunk), tokens, fixed)[0] for chunk in (8, 32)]
    close(outs[1], outs[0], 2e-5)
    stale = [run(InnerOptimizer(network=LinearNet(), chunk_size=chunk), tokens, fixed)[0] for chunk in (8, 32)]
    assert float(jnp.abs(stale[0] - stale[1]).max()) > 1e-2


@jax.jit
def deep_memory_gradients(tokens: MemoryInputs, fixed: OuterParams) -> tuple[jax.Array, Any]:
    def loss(tokens, fixed):
        return jnp.sum(neural_memory(LEARNERS["deep"], tokens, fixed)[0] ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1))(tokens, fixed)


EXTREME_GATES = [("log_decay", 0.0), ("log_decay", -1e4), ("log_momentum", 0.0), ("log_momentum", -1e4), ("lr", 0.0)]


@pytest.mark.parametrize(("what", "value"), EXTREME_GATES)
def test_extreme_gates_stay_finite_also_in_gradients(what, value):
    tokens, fixed = random_inputs(LEARNERS["deep"])
    tokens = tokens._replace(**{what: np.full_like(tokens.lr, value)})
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(deep_memory_gradients(tokens, fixed)))


def test_memory_can_learn_after_full_decay():
    learner = LEARNERS["deep"]
    tokens, fixed = random_inputs(learner)
    wiping = np.arange(LENGTH)[None, :, None, None] == 7
    tokens = tokens._replace(log_decay=np.broadcast_to(np.where(wiping, np.float32(-1e4), 0), tokens.lr.shape))
    # What the tokens after the wiping learn.
    after, wiped = (
        run(learner, tokens, fixed, segment_ids=tokens_before(count))[1].fast_weights.momentum for count in (24, 8)
    )
    assert min(float(jnp.abs(after[name] - wiped[name]).max()) for name in after) > 1e-3

    still = np.full_like(tokens.lr, -1e4)
    tokens = tokens._replace(log_momentum=still, lr=np.where(wiping, 0, tokens.lr))
    _, state = run(replace(learner, decay_to="zero"), tokens, fixed, segment_ids=tokens_before(24))
    left = {name: fixed.initial_weights[name][None] + x for name, x in state.fast_weights.delta.items()}
    assert all(float(jnp.abs(x).max()) == 0 for x in left.values())  # dead for ever


def test_update_coefficients_are_accurate_to_1e_5():
    tokens, _ = draw(LEARNERS["deep"], 128)
    visible = jnp.tril(jnp.ones((B, 128, 128), bool))
    lr, momentum, keep = (
        np.moveaxis(x, 1, -1) for x in (tokens.lr, np.exp(tokens.log_momentum), np.exp(tokens.log_decay))
    )
    want = np.zeros((B, H, lr.shape[2], 128, 128))
    surprise = np.zeros(want.shape[:-1])
    for t in range(128):
        surprise *= momentum[..., t, None]
        surprise[..., t] += lr[..., t]
        want[..., t, :] = (keep[..., t, None] * want[..., t - 1, :] if t else 0) + surprise
    weighing = jax.jit(update_coefficients, static_argnums=0)(LEARNERS["deep"], single(tokens), visible)
    got = np.asarray(weighing.gradients, np.float64)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("gradient", ["token", "chunk_start"])
@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
def test_the_largest_default_step_lies_inside_the_measured_stable_range(gradient, chunk):
    path = Path(__file__).parent.parent / "experiments" / "inner_stability" / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    held = [row for row in rows if row["gradient"] == gradient]
    assert len(held) == 6
    network = LinearNet()
    step = NeuralMemory(inner_optimizer=InnerOptimizer(network=network, gradient=gradient, chunk_size=chunk)).stable_lr
    for row in held:
        bound = row["largest"][str(chunk)] or 0.01  # the finest rate that was asked for
        assert step * (1 - row["momentum"]) <= bound, row


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)])
def test_muon_brings_every_singular_value_near_one(shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    values = np.linalg.svd(np.asarray(newton_schulz(x)), compute_uv=False)
    assert values.min() > 0.5 and values.max() < 1.3
    assert jnp.isfinite(jax.grad(lambda x: jnp.sum(newton_schulz(x) ** 2))(jnp.zeros(shape))).all()


@pytest.mark.parametrize("name", ["deep", "exact", "muon"])
def test_perturbing_the_last_tokens_changes_nothing_before_them(name):
    learner = LEARNERS[name]
    tokens, fixed = random_inputs(learner)
    want, _ = run(learner, tokens, fixed, segment_ids=tokens_before(LENGTH))
    for last in range(1, LENGTH):
        late = (np.arange(LENGTH) >= last)[:, None, None]
        other = jax.tree.map(lambda x, late=late: np.where(late, x - np.float32(0.3), x), tokens)
        got, _ = run(learner, other, fixed, segment_ids=tokens_before(LENGTH))
        np.testing.assert_array_equal(np.asarray(want)[:, :last], np.asarray(got)[:, :last])


# ---- the mixer

MIXER = NeuralMemory(num_heads=H, head_dim=D, inner_optimizer=LEARNERS["deep"], conv_size=0)
MODEL = 16


def build_mixer(config: NeuralMemory) -> tuple[nnx.GraphDef, Any]:
    module = config.build(MODEL, LayerInfo(0, 2), precision=Precision(), rngs=nnx.Rngs(0))
    return nnx.split(module)


def mixer_inputs(length: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(B, length, MODEL)).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def mixer_outputs(graph: nnx.GraphDef, params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """What the mixer answers to whole rows, and the state after them."""
    module = nnx.merge(graph, params)
    y, state, _ = module.prefill(x, unpacked_seq_info(*x.shape[:2]), module.init_state(*x.shape[:2]))
    return y, state


@partial(jax.jit, static_argnums=0)
def mixer_gradients(graph: nnx.GraphDef, params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    return jax.value_and_grad(lambda params, x: jnp.sum(mixer_outputs(graph, params, x)[0] ** 2), argnums=(0, 1))(
        params, x
    )


def test_gates_start_with_a_long_memory_half_of_a_step_carried_on_and_small_steps():
    module = MIXER.build(MODEL, LayerInfo(0, 2), precision=Precision(), rngs=nnx.Rngs(0))
    streams = module.streams(jnp.asarray(mixer_inputs(50)))
    tokens = jax.tree.map(np.asarray, module._memory_inputs(module._concat(streams), streams))
    assert np.exp(tokens.log_decay).min() >= 0.99 and np.exp(tokens.log_decay).max() < 0.9975
    assert np.abs(np.exp(tokens.log_momentum) - 0.5).max() < 0.1
    chunk = MIXER.inner_optimizer.chunk_size
    steps = tokens.lr[:, : 50 // chunk * chunk].reshape(B, -1, chunk, H, 2).sum(axis=2)
    assert steps.min() > 0.2 and steps.max() < 0.5  # over a chunk


@pytest.mark.parametrize("name", ["keep", "momentum", "lr"])
@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_a_mixer_with_extreme_gates_stays_finite_also_in_gradients(name, value):
    graph, params = build_mixer(MIXER)
    bias = params["biases"][name]
    bias[...] = jnp.full_like(bias[...], value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(mixer_gradients(graph, params, mixer_inputs(LENGTH))))


def test_reset_restores_initial_memory_and_zero_weights_cannot_learn():
    graph, params = build_mixer(MIXER)
    for name in ("keep", "momentum", "lr"):  # the first channel shuts every gate
        kernel = params["streams"]["parts"][name]["kernel"]
        kernel[...] = kernel[...].at[0].set(-2e4)
    keep = params["biases"]["keep"]
    keep[...] = jnp.full_like(keep[...], 1e4)  # nothing else is forgotten: rounding would bring dead weights to life
    x = mixer_inputs(24)
    x[..., 0] = np.arange(24) == 7
    (wiped, state), (fresh, alone) = mixer_outputs(graph, params, x), mixer_outputs(graph, params, x[:, 8:])
    close(wiped[:, 8:], fresh, 3e-5)
    close(state.neural_state.fast_weights, alone.neural_state.fast_weights, 3e-5)
    learned = jax.tree.map(lambda change: float(jnp.abs(change).max()), state.neural_state.fast_weights.delta)
    assert min(learned.values()) > 1e-3
    graph, _ = build_mixer(replace(MIXER, inner_optimizer=replace(MIXER.inner_optimizer, decay_to="zero")))
    _, state = mixer_outputs(graph, params, x)
    for name, change in state.neural_state.fast_weights.delta.items():
        assert float(jnp.abs(params["weights"][name][...][None] + change).max()) == 0


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"gradient": "token"}, "network LinearNet"),
        ({"gradient": "token", "network": LinearNet(), "loss": "dot"}, "l2 loss"),
        ({"gradient_reduction": "mean"}, "momentum=False"),
        ({"trainable_weights": ("w3",)}, "must name some of w1, w2"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_incompatible_options_are_rejected(choices, message):
    with pytest.raises(ConfigError, match=message):
        InnerOptimizer(**choices)


def test_bad_shapes_are_named():
    learner = LEARNERS["deep"]
    tokens, fixed = (single(x) for x in draw(learner, 8))
    function = unchecked(neural_memory)
    with pytest.raises(ValueError, match="lr has shape"):
        function(learner, tokens._replace(lr=tokens.lr[..., :1]), fixed)
    with pytest.raises(ValueError, match="weight w2 has shape None"):
        function(learner, tokens, fixed._replace(initial_weights={"w1": fixed.initial_weights["w1"]}))
