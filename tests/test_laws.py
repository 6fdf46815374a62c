"""Laws that every mixer in any config must satisfy; a new mixer needs no test of its own."""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recallax.cli.config_files import config_names
from recallax.layers import (
    HGRN2,
    ChunkExperts,
    DiagonalSSM,
    KeyScore,
    Landmark,
    LayerInfo,
    LongMamba,
    Mamba2,
    MemoryAsContext,
    MemoryAsGate,
    MixerConfig,
    MoM,
    NeuralMemory,
    NoChannelMixer,
    Parallel,
    PrefixLinear,
    ProductKeys,
    QueryDependentSelector,
    RecurrentMixer,
    SlidingWindow,
    SparseGlobalAttention,
)
from recallax.layers.memory import MemoryConfig
from recallax.layers.memory_as_context import QuerySource
from recallax.models import LM, LMConfig, accounting
from recallax.pallas_kernels.neural_memory.inner_optimizer import InnerOptimizer, MLPNet
from recallax.types import Precision, SeqInfo, StepInfo

pytestmark = pytest.mark.usefixtures("strict", "chunks_of_four")

WIDTH, LENGTH = 16, 11
TOLERANCE = 2e-5
BF16_TOLERANCE = 0.04
"""Tolerance of bfloat16 relative to the largest float32 output: a few units of its 8-bit mantissa."""
ROUTED_TOLERANCE = 0.15
"""Tolerance of bfloat16 for mixers with routing, where rounding may select another expert or memory."""
ROUTED_MIXERS = (MoM, SparseGlobalAttention, ChunkExperts, ProductKeys, Parallel)
WEIGHT_SCALES = {NeuralMemory: 0.05, MemoryAsGate: 0.05, MemoryAsContext: 0.02}
"""Scale of random weights for mixers with a neural memory. At 0.4, rounding the inputs to bfloat16 changes single
outputs by a third, even with float32 inside."""


def tiny_models() -> dict[str, LMConfig]:
    return {name: importlib.import_module(f"recallax.configs.{name}").get_tiny().model for name in config_names()}


def mixers() -> list[MixerConfig]:
    """Every sequence and channel mixer of every config, once."""
    blocks = [block for model in tiny_models().values() for block in model.blocks.values()]
    return list(dict.fromkeys(mixer for block in blocks for mixer in (block.mixer, block.channel)))


def _inside(config: MixerConfig) -> list[MixerConfig]:
    values = [getattr(config, f.name) for f in dataclasses.fields(config)]
    return [part for value in values if isinstance(value, MixerConfig) for part in (value, *_inside(value))]


def label(config: MixerConfig) -> str:
    values = [getattr(config, f.name) for f in dataclasses.fields(config)]
    return "-".join([type(config).__name__, *map(str, values)])


def prefix_linear_configs() -> list[MixerConfig]:
    """`MoM` and `PrefixLinear` over each memory of the family that occurs in a config."""
    memories = {type(m): m for m in mixers() if isinstance(m, MemoryConfig)}.values()
    return [*(MoM(memory=m, num_memories=3, top_k=2) for m in memories), *(PrefixLinear(memory=m) for m in memories)]


def top_k_landmark_configs() -> list[Landmark]:
    """Landmark attention that reads one of the three blocks of a row."""
    config = Landmark(block_size=2, num_heads=2, num_kv_heads=1, top_k=1, min_probability=0.4)
    return [
        config,
        dataclasses.replace(config, select_per="token", position_mode="exact"),
        dataclasses.replace(config, select_per="head", min_probability=0.0),
    ]


def hydra_component_configs() -> list[MixerConfig]:
    """Mixers that occur inside other mixers in configs, with options that no config uses."""
    sparse = SparseGlobalAttention(window=3, top_k=2, block_size=2, num_heads=2, num_kv_heads=1, head_dim=6)
    experts = ChunkExperts(num_experts=3, top_k=2, intermediate_size=5, chunk_size=3)
    return [
        Parallel(ssm=DiagonalSSM(max_timescale=8.0), attention=sparse, experts=experts),
        LongMamba(mixer=DiagonalSSM(max_timescale=8.0), training_length=4, context_length=8, threshold=0.5),
        LongMamba(mixer=Mamba2(state_dim=6, head_dim=8), training_length=4, context_length=8, threshold=0.3),
        dataclasses.replace(experts, route="previous_chunk"),
        dataclasses.replace(experts, route="token", bias_update_rate=1e-3),
        dataclasses.replace(sparse, cache="full"),
        dataclasses.replace(sparse, cache="full", selector=QueryDependentSelector(score_dim=3)),
        dataclasses.replace(sparse, selector=KeyScore(hidden_size=5, num_sampled_keys=4)),
    ]


def deep_memory_configs() -> list[MixerConfig]:
    """Titans' combinations of attention and a neural memory."""
    deep = NeuralMemory(
        num_heads=2, inner_optimizer=InnerOptimizer(network=MLPNet(expansion=2), chunk_size=2, reset_interval=6)
    )
    window = SlidingWindow(window=5, num_heads=2, num_persistent_tokens=3)
    context = MemoryAsContext(memory=deep, block_size=4, num_retrieved_tokens=2, num_persistent_tokens=3, num_heads=2)
    sources: tuple[QuerySource, ...] = ("own", "previous", "learned")
    contexts = [dataclasses.replace(context, query_source=source) for source in sources]
    return [*contexts, MemoryAsGate(attention=window, memory=dataclasses.replace(deep, num_persistent_tokens=4))]


def uses_top_k_retrieval(config: MixerConfig) -> bool:
    """True if the call, which reads all blocks, differs from prefill; then the laws compare with prefill."""
    return isinstance(config, Landmark) and (config.top_k or LENGTH) * (config.block_size + 1) < LENGTH - 1


def param_on_one_worker(config: MixerConfig, *marks: pytest.MarkDecorator):
    """Run all laws of a mixer in one process, so that each of its programs is compiled once."""
    return pytest.param(config, marks=[pytest.mark.xdist_group(label(config)), *marks])


def one_config_per_class() -> list[MixerConfig]:
    """The first mixer of each combination of classes, its own and those of the mixers inside it."""
    first: dict[tuple[type, ...], MixerConfig] = {}
    for mixer in mixers():
        first.setdefault(tuple(type(part) for part in (mixer, *_inside(mixer))), mixer)
    return list(first.values())


def full_suite_configs() -> list[MixerConfig]:
    """All other mixers, and options that no config uses."""
    configs = [
        *mixers(),
        *prefix_linear_configs(),
        *top_k_landmark_configs(),
        *hydra_component_configs(),
        *deep_memory_configs(),
    ]
    tested_always = one_config_per_class()
    return [mixer for mixer in dict.fromkeys(configs) if mixer not in tested_always]


each_mixer = pytest.mark.parametrize(
    "config",
    [
        *map(param_on_one_worker, one_config_per_class()),
        *(param_on_one_worker(mixer, pytest.mark.full) for mixer in full_suite_configs()),
    ],
    ids=label,
)


DEEP = ("titans_340m", "mom_1b3", "mqar_hydra_staged")
"""Models whose blocks all occur in shallower models."""


def models() -> list:
    """The tiny models by name.

    A model that differs from an earlier one only in its mixers is left to the full suite, since mixers have laws of
    their own, unless the mixer depends on the language model.
    """
    seen: set[str] = set()
    params = []
    for name, model in {repr(model): (name, model) for name, model in tiny_models().items()}.values():
        blocks = {
            key: dataclasses.replace(block, mixer=block.mixer if depends_on_model(block.mixer) else NoChannelMixer())
            for key, block in model.blocks.items()
        }
        rest = repr(dataclasses.replace(model, blocks=blocks))
        params.append(pytest.param(name, marks=[pytest.mark.full] if rest in seen or name in DEEP else []))
        seen.add(rest)
    return params


def depends_on_model(mixer: MixerConfig) -> bool:
    """True for landmarks, which the language model inserts, and HGRN2, whose lower bounds its layers share."""
    return mixer.landmark_interval is not None or isinstance(mixer.memory if isinstance(mixer, MoM) else mixer, HGRN2)


each_model = pytest.mark.parametrize("name", models())


class Compiled(NamedTuple):
    """Methods of a mixer as compiled functions."""

    call: Callable
    prefill: Callable
    step: Callable
    scan_steps: Callable
    init_state: Callable


@functools.lru_cache(maxsize=4)  # enough for one mixer, since its laws run one after another
def build(config: MixerConfig, compute=jnp.float32, size: float = 0.4) -> Compiled:
    module = config.build(WIDTH, LayerInfo(1, 4), precision=Precision(compute=compute), rngs=nnx.Rngs(7))
    assert isinstance(module, RecurrentMixer)
    # With projections at their initial scale of 0.02, outputs are too small for the laws to detect errors.
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), max(len(leaves), 1))
    leaves = [x + size * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=False)]
    mixer = nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest)

    def scan_steps(x: jax.Array, seq: SeqInfo, state):
        """Outputs and final state of one step per token; padding is inactive."""

        def body(state, token):
            x, position, segment = token
            y, state = mixer.step(x, StepInfo(position, segment > 0), state)
            return state, y

        tokens = tuple(jnp.moveaxis(a, 1, 0) for a in (x, seq.positions, seq.segment_ids))
        state, y = jax.lax.scan(body, state, tokens)
        return jnp.moveaxis(y, 0, 1), state

    def call(x: jax.Array, seq: SeqInfo):
        return (
            mixer.prefill(x, seq, mixer.init_state(*x.shape[:2]))[::2]
            if uses_top_k_retrieval(config)
            else mixer(x, seq)
        )

    # Fresh functions: a jit of the bound method would share its cache between mixers that compare equal.
    return Compiled(
        jax.jit(call),
        jax.jit(lambda x, seq, state: mixer.prefill(x, seq, state)),
        jax.jit(lambda x, info, state: mixer.step(x, info, state)),
        jax.jit(scan_steps),
        mixer.init_state,
    )


def random_inputs(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def rows(*documents: list[int], length: int = LENGTH, grid: int = 1) -> SeqInfo:
    """One row per list of document lengths, packed in order on the grid; documents are truncated at the end of the row,
    and the rest of the row is padding."""
    positions, segments = np.zeros((2, len(documents), length), np.int32)
    for row, lengths in enumerate(documents):
        start = 0
        for number, size in enumerate(lengths, 1):
            size = max(min(size, length - start), 0)
            positions[row, start : start + size] = np.arange(size)
            segments[row, start : start + size] = number
            start += -(-size // grid) * grid
    return SeqInfo(jnp.array(positions), jnp.array(segments), jnp.zeros(positions.shape, bool))


def packed(config: MixerConfig) -> SeqInfo:
    """Packed rows in which documents fill the grid, so that a cut leaves no padding on the left of the second part."""
    return rows([LENGTH], aligned_lengths(config, 4, 1, 5), [6], aligned_lengths(config, 1, 3))


def aligned_lengths(config: MixerConfig, *sizes: int) -> list[int]:
    return [-(-size // config.grid) * config.grid for size in sizes[:-1]] + [sizes[-1]]


def slice_seq_info(seq: SeqInfo, span: slice) -> SeqInfo:
    return SeqInfo(seq.positions[:, span], seq.segment_ids[:, span], seq.prefix[:, span])


def close(a, b, tolerance: float = TOLERANCE, where=None) -> None:
    """Assert that every pair of leaves differs by at most `tolerance` times the larger of 1 and the largest entry."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if where is not None:
            x, y = x[np.asarray(where)], y[np.asarray(where)]
        assert np.isfinite(x).all() and np.isfinite(y).all()
        assert np.abs(x - y).max(initial=0) <= tolerance * max(1.0, np.abs(y).max(initial=0))


@each_mixer
def test_split_prefill_equals_call(config):
    mixer, x = build(config), random_inputs(0, 4, LENGTH, WIDTH)
    seq = packed(config)
    valid = seq.segment_ids > 0
    whole, _ = mixer.call(x, seq)
    full, state, _ = mixer.prefill(x, seq, mixer.init_state(4, LENGTH))
    close(full, whole, where=valid)

    def split_at(cut):
        """Prefill both parts in rows of full length: the first one padded, the second one rolled to the left."""
        time = jnp.arange(LENGTH)[None]
        first = seq._replace(segment_ids=jnp.where(time < cut, seq.segment_ids, 0))
        source = (time + cut) % LENGTH
        later = SeqInfo(*(jnp.take_along_axis(a, jnp.broadcast_to(source, a.shape), axis=1) for a in seq[:3]))
        later = later._replace(segment_ids=jnp.where(time < LENGTH - cut, later.segment_ids, 0))
        a, middle, _ = mixer.prefill(x, first, mixer.init_state(4, LENGTH))
        b, final, _ = mixer.prefill(jnp.take(x, source[0], axis=1), later, middle)
        return jnp.where((time < cut)[..., None], a, jnp.roll(b, cut, axis=1)), final

    outputs, finals = jax.jit(lambda cuts: jax.lax.map(split_at, cuts))(jnp.arange(1, LENGTH))
    for cut in range(1, LENGTH):
        close(outputs[cut - 1], whole, where=valid)
        close(jax.tree.map(lambda leaf, cut=cut: leaf[cut - 1], finals), state)
    for cut in (6,):  # also in rows with the length of each part
        a, middle, _ = mixer.prefill(x[:, :cut], slice_seq_info(seq, slice(0, cut)), mixer.init_state(4, LENGTH))
        b, final, _ = mixer.prefill(x[:, cut:], slice_seq_info(seq, slice(cut, None)), middle)
        close(jnp.concatenate([a, b], axis=1), whole, where=valid)
        close(final, state)


@each_mixer
def test_step_loop_equals_call(config):
    mixer, x = build(config), random_inputs(1, 4, LENGTH, WIDTH)
    seq = packed(config)
    whole, _ = mixer.call(x, seq)
    _, state, _ = mixer.prefill(x, seq, mixer.init_state(4, LENGTH))
    y, stepped = mixer.scan_steps(x, seq, mixer.init_state(4, LENGTH))
    valid = seq.segment_ids > 0
    close(y, whole, where=valid)
    close(stepped, state)
    assert not np.asarray(y)[~np.asarray(valid)].any()


@each_mixer
def test_state_structure_and_inactive_rows_are_preserved(config):
    mixer, x = build(config), random_inputs(2, 4, LENGTH, WIDTH)
    seq = packed(config)
    empty = mixer.init_state(4, LENGTH)
    _, state, _ = mixer.prefill(x, seq, empty)
    active = jnp.array([True, False, True, False])
    y, after = mixer.step(x[:, 0], StepInfo(jnp.array([3, 9, 0, 0]), active), state)
    for old in (empty, state):
        assert jax.tree.map(lambda a: (a.shape, a.dtype), old) == jax.tree.map(lambda a: (a.shape, a.dtype), after)
    assert not np.asarray(y)[~np.asarray(active)].any()
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(old)[[1, 3]], np.asarray(new)[[1, 3]])


@each_mixer
def test_state_is_reset_at_position_0(config):
    mixer, x, seq = build(config), random_inputs(3, 4, LENGTH, WIDTH), packed(config)
    fresh, dirty = (jax.tree.map(lambda a, v=v: jnp.full_like(a, v), mixer.init_state(4, LENGTH)) for v in (0, jnp.nan))
    (y, state, _), (expected, final, _) = (mixer.prefill(x, seq, start) for start in (dirty, fresh))
    close(y, expected, where=seq.segment_ids > 0)
    close(state, final)
    first = StepInfo(jnp.zeros(4, jnp.int32), jnp.ones(4, bool))
    close(mixer.step(x[:, 0], first, dirty)[0], mixer.step(x[:, 0], first, fresh)[0])


@each_mixer
def test_causality(config):
    mixer = build(config)
    seq = rows([LENGTH], [4, 7])
    later, now = np.arange(LENGTH) > np.arange(LENGTH)[:, None], np.eye(LENGTH, dtype=bool)

    @jax.jit
    def gradients(x, weights):
        """d y[:, t] / d x[:, s] as [t, s, B, D], one time step of the output at a time."""
        _, pull = jax.vjp(lambda x: mixer.call(x, seq)[0], x)
        return jnp.moveaxis(jax.lax.map(pull, jnp.eye(LENGTH)[:, None, :, None] * weights[None])[0], 2, 1)

    @jax.jit
    def outputs(x, other):
        """Outputs with everything after t replaced, for every t."""
        cut = (jnp.arange(LENGTH)[None] > jnp.arange(LENGTH)[:, None])[:, None, :, None]
        return jax.lax.map(lambda x: mixer.call(x, seq)[0], jnp.where(cut, other[None], x[None]))

    for seed in range(3):
        x, weights = random_inputs(seed, 2, LENGTH, WIDTH), random_inputs(seed + 10, 2, LENGTH, WIDTH)
        grads = np.asarray(gradients(x, weights))
        assert not grads[later].any()
        assert grads[now].any() or isinstance(config, NoChannelMixer)  # the test can detect a dependence
        y = np.asarray(outputs(x, 30 * random_inputs(seed + 20, 2, LENGTH, WIDTH)))
        for t in range(LENGTH):
            if isinstance(config, MoM):
                # Routing of later tokens moves earlier ones between chunks, which changes the order of sums.
                close(y[t, :, : t + 1], y[-1, :, : t + 1], tolerance=1e-6)
            else:
                np.testing.assert_array_equal(y[t, :, : t + 1], y[-1, :, : t + 1])


@each_mixer
def test_packed_documents_equal_documents_alone(config):
    """A packed row against rows with one document each."""
    mixer, x = build(config), random_inputs(4, 1, LENGTH, WIDTH)
    sizes, starts = [4, 1, 5], [0]
    for size in sizes[:-1]:
        starts.append(starts[-1] + -(-size // config.grid) * config.grid)
    sizes = [min(size, LENGTH - start) for size, start in zip(sizes, starts, strict=True)]
    alone = jnp.concatenate([jnp.roll(x, -start, axis=1) for start in [0, *starts]])
    y, _ = mixer.call(alone, rows(sizes, *([size] for size in sizes), grid=config.grid))
    for row, (size, start) in enumerate(zip(sizes, starts, strict=True), 1):
        close(y[0, start : start + size], y[row, :size])


@each_mixer
def test_padding_changes_nothing(config):
    mixer, x = build(config), random_inputs(5, 4, LENGTH, WIDTH)
    long = rows([6], [2, 4], [1], aligned_lengths(config, 1, 2), grid=config.grid)
    valid = long.segment_ids > 0
    used = slice(0, int(jnp.nonzero(valid.any(axis=0))[0][-1]) + 1)
    y, state, _ = mixer.prefill(x[:, used], slice_seq_info(long, used), mixer.init_state(4, LENGTH))
    padded, padded_state, _ = mixer.prefill(x, long, mixer.init_state(4, LENGTH))
    close(padded[:, used], y, where=valid[:, used])
    close(padded_state, state)
    close(mixer.call(x, long)[0][:, used], y, where=valid[:, used])
    # A row of padding keeps its state.
    padding = SeqInfo(jnp.full((4, LENGTH), 6, jnp.int32), jnp.zeros((4, LENGTH), jnp.int32), long.prefix)
    close(mixer.prefill(x, padding, state)[1], state, tolerance=0)


@each_mixer
def test_batch_rows_do_not_interact(config):
    mixer, x = build(config), random_inputs(6, 4, LENGTH, WIDTH)
    seq = packed(config)
    y = np.asarray(mixer.call(x, seq)[0])
    row_grad = jax.jit(jax.grad(lambda x, row: (mixer.call(x, seq)[0][row] ** 2).sum()))
    for row in range(4):
        others = np.arange(4) != row
        assert not np.asarray(row_grad(x, row))[others].any()
        changed = x.at[row].set(30 * random_inputs(7, LENGTH, WIDTH))
        np.testing.assert_array_equal(np.asarray(mixer.call(changed, seq)[0])[others], y[others])


@each_mixer
def test_bfloat16_is_close_to_float32_after_hundreds_of_steps(config):
    """More than 256 steps, because a counter in a bfloat16 state stops at 256."""
    length = 330
    if isinstance(config, Landmark):
        config = dataclasses.replace(config, top_k=None)  # rounding would select other blocks
    if isinstance(config, LongMamba):
        config = dataclasses.replace(config, threshold=0.0)  # rounding would filter other steps
    size = WEIGHT_SCALES.get(type(config), 0.4)
    exact, rounded = build(config, size=size), build(config, jnp.bfloat16, size)
    x = 0.5 * random_inputs(8, 1, length, WIDTH)
    seq = rows([length], length=length)
    y = exact.call(x, seq)[0]
    low = rounded.call(x.astype(jnp.bfloat16), seq)[0]
    assert low.dtype == jnp.bfloat16 and y.dtype == jnp.float32
    stepped, _ = rounded.scan_steps(x.astype(jnp.bfloat16), seq, rounded.init_state(1, length))
    assert stepped.dtype == jnp.bfloat16
    size = float(jnp.abs(y).max())
    for part_of in (slice(0, 200), slice(280, length)):
        for other in (low, stepped):
            error = np.abs(np.asarray(other, np.float32) - np.asarray(y))[:, part_of].max()
            allowed = ROUTED_TOLERANCE if isinstance(config, ROUTED_MIXERS) else BF16_TOLERANCE
            assert error <= allowed * size, (part_of, error / size)


@each_model
def test_model_call_equals_prefill_steps_and_padded_rows(name):
    config = tiny_models()[name]
    vocab = config.vocab_size or 32
    module: LM = config.build(nnx.Rngs(0), vocab)
    graph, weights = nnx.split(module)
    call = jax.jit(lambda tokens, seq, at: nnx.merge(graph, weights)(tokens, seq, at))
    prefill = jax.jit(lambda tokens, seq, state: nnx.merge(graph, weights).prefill(tokens, seq, state))
    step = jax.jit(lambda token, info, state: nnx.merge(graph, weights).step(token, info, state))
    tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, vocab)
    if name == "mad_compression_linear":
        pytest.skip("its output projection reads the end of the row by design")
    tolerance = TOLERANCE if config.compute_dtype == "float32" else BF16_TOLERANCE
    seq = rows([LENGTH], [4, 7])
    # Padding on the right and on the left, so that each method is compiled once.
    right, left = (
        jax.tree.map(lambda x, pad=pad: jnp.pad(x, ((0, 0), pad)), (tokens, seq)) for pad in ((0, 3), (3, 0))
    )
    every, empty = jnp.tile(jnp.arange(LENGTH), (2, 1)), module.init_state(2, LENGTH)
    whole, _ = call(*right, every)
    assert whole.dtype == jnp.float32
    close(call(*left, every + 3)[0], whole, tolerance)
    logits, final, _ = prefill(*right, empty)
    close(logits[:, :LENGTH], whole, tolerance)
    logits, other, _ = prefill(*left, empty)
    close(logits[:, 3:], whole, tolerance)
    close(other, final, tolerance)

    cut = 5
    first_part = right[1]._replace(segment_ids=right[1].segment_ids.at[:, cut:].set(0))
    first_logits, state, _ = prefill(right[0], first_part, empty)
    logits = [first_logits[:, :cut]]
    for t in range(cut, LENGTH):
        out, state = step(tokens[:, t], StepInfo(seq.positions[:, t], jnp.ones(2, bool)), state)
        logits.append(out[:, None])
    close(jnp.concatenate(logits, axis=1), whole, tolerance)


@each_model
def test_reported_state_bytes_are_exact(name):
    config = tiny_models()[name]
    state = config.build(nnx.Rngs(0), config.vocab_size or 32).init_state(1, LENGTH)
    real = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))
    assert accounting.state_bytes(config, LENGTH, config.vocab_size or 32) == real


def test_every_mixer_config_class_is_tested():
    """Laws find mixers through the configs and would miss a mixer that occurs in none."""
    tested = {type(part) for config in mixers() for part in (config, *_inside(config))}
    assert tested >= set(_concrete_subclasses(MixerConfig))


def _concrete_subclasses(cls: type) -> list[type]:
    subclasses = [sub for sub in cls.__subclasses__() if sub.__module__.startswith("recallax")]
    subclasses = [c for sub in subclasses for c in (sub, *_concrete_subclasses(sub))]
    return [c for c in subclasses if not inspect.isabstract(c)]
