"""Landmark attention: insertion of landmarks, retrieval of blocks, and positions of retrieved blocks."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recallax.config import ConfigError
from recallax.layers import Attention, GatedConv, Landmark, LayerInfo, NoChannelMixer
from recallax.layers.rotary import add_position_jumps
from recallax.models import Block, LMConfig
from recallax.models.landmark_tokens import LandmarkTokens, drop_landmarks
from recallax.models.offload import OffloadedLayer, OffloadedLM
from recallax.pallas_kernels.landmark_attention import (
    append_to_partial_block,
    cached_and_new_blocks,
    close_partial_block,
    init_landmark_cache,
    landmark_attention,
    update_cache_and_log_probs,
)
from recallax.pallas_kernels.landmark_attention.block_selection import (
    PositionMode,
    SelectionScope,
    compressed_distances,
)
from recallax.types import Precision, SeqInfo, StepInfo, unpacked_seq_info

pytestmark = pytest.mark.usefixtures("strict")


THREE = Landmark(block_size=3, num_heads=2)


def config(pattern: str) -> LMConfig:
    blocks = {
        "mark": Block(mixer=THREE, channel=NoChannelMixer()),
        "full": Block(mixer=Attention(), channel=NoChannelMixer()),
    }
    return LMConfig(d_model=8, vocab_size=20, pattern=pattern, blocks=blocks)


def test_landmarks_are_inserted_after_complete_blocks_only():
    marks = LandmarkTokens(3, 1, precision=Precision(), rngs=nnx.Rngs(0))
    marks.embedding[...] = jnp.array([-1.0])
    segments = jnp.array([[4, 4, 4, 4, 2, 2, 2, 7, 0], [1] * 9])
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 5], range(2, 11)])  # the second row continues at position 2
    x = jnp.arange(18.0).reshape(2, 9, 1)
    seq = SeqInfo(positions, segments, jnp.zeros_like(segments, bool))
    inserted, longer, places = marks.insert(x, seq)
    assert inserted[0, :10, 0].tolist() == [0, 1, 2, -1, 3, 4, 5, 6, -1, 7]
    assert longer.segment_ids[0].tolist() == [4, 4, 4, 4, 4, 2, 2, 2, 2, 7, 0, 0]
    assert longer.positions[0, :10].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0]
    assert inserted[1, :, 0].tolist() == [9, -1, 10, 11, 12, -1, 13, 14, 15, -1, 16, 17]
    assert longer.positions[1].tolist() == list(range(2, 14)) and longer.segment_ids.shape == (2, 12)
    np.testing.assert_array_equal(drop_landmarks(inserted, places), x)
    # Insertion and removal are inverse: the gradient of a token comes from its own slot only.
    grad = jax.grad(lambda x: (drop_landmarks(marks.insert(x, seq)[0], places) * jnp.arange(9.0)[None, :, None]).sum())(
        x
    )
    np.testing.assert_array_equal(grad[..., 0], np.broadcast_to(np.arange(9), (2, 9)))


def test_decoding_processes_a_landmark_in_rows_where_a_block_ends():
    marks = LandmarkTokens(3, 4, precision=Precision(), rngs=nnx.Rngs(0))
    info = StepInfo(jnp.array([1, 2, 3, 5]), jnp.array([True, True, True, False]))
    assert marks.token_step_info(info).position.tolist() == [1, 2, 4, 6]
    assert marks.landmark_step_info(info).position.tolist()[1] == 3 and marks.landmark_step_info(
        info
    ).active.tolist() == [0, 1, 0, 0]


def test_compressed_positions():
    """k = 2, blocks of 4, a query at offset 1 of block 6: selected blocks and their compressed distances in blocks."""
    table = {(4, 5): (2, 1), (0, 5): (3, 1), (1, 4): (3, 1), (0, 3): (3, 2), (2,): (3,), (5,): (1,), (4,): (1,)}
    for selected, back in table.items():
        number = jnp.array([*selected, *[9] * (2 - len(selected))])
        distance = compressed_distances(number, jnp.arange(2) < len(selected), jnp.array([25]), 4, 2)
        assert distance[: len(selected)].tolist() == [1 + 4 * n for n in back], selected
    for position in range(12):  # distances are exact while k covers all blocks
        number = jnp.arange(2)
        distance = compressed_distances(number, number < position // 4, jnp.array([position]), 4, 2)
        assert distance.tolist()[: position // 4] == [position - 4 * n for n in range(position // 4)]
    far = compressed_distances(jnp.array([3, 70]), jnp.array([True, True]), jnp.array([99 * 4 + 3]), 4, 2)
    assert int(far.max()) == 3 + 3 * 4 < (2 + 2) * 4  # no distance of k + 2 blocks


@pytest.mark.parametrize(
    ("per", "distances"),
    [
        ("head", "compressed"),
        *(pytest.param(*case, marks=pytest.mark.full) for case in (("token", "compressed"), ("head", "exact"))),
    ],
)
def test_retrieval_of_all_blocks_equals_grouped_softmax(per: SelectionScope, distances: PositionMode):
    """Compressed distances are exact while k covers the blocks: four complete ones and a partial one."""
    every = replace(THREE, top_k=4, select_per=per, position_mode=distances)
    np.testing.assert_allclose(compiled("prefill", every)(X), compiled("call", THREE)(X), atol=1e-5)


def test_unretrieved_blocks_have_no_influence():
    """With k = 1, tokens of the third block read one of two past blocks, and none at a minimum probability of 1."""
    changed = X.at[:, 1].add(1.0)
    for min_probability, visible in ((0.0, True), (1.0, False)):
        run = compiled("prefill", replace(THREE, top_k=1, min_probability=min_probability))
        difference = np.abs(run(X) - run(changed))[:, 8:].max()
        assert (difference > 1e-3) if visible else (difference == 0)
    retrieved = compiled("prefill", replace(THREE, top_k=1))(X)
    difference = np.abs(retrieved - compiled("call", THREE)(X)).max(axis=(0, 2))
    assert difference[:8].max() < 1e-5 and difference[8:].min() > 1e-3


X = jax.random.normal(jax.random.key(0), (2, 19, 8))


def compiled(method: str, config: Landmark) -> Callable[[jax.Array], np.ndarray]:
    """Compile a method of a mixer with large random parameters, so that blocks differ."""
    mixer = config.build(8, LayerInfo(1, 4), precision=Precision(), rngs=nnx.Rngs(7))
    seq = SeqInfo(*(jnp.asarray(part) for part in unpacked_seq_info(2, 19)[:3]), key=None)
    graph, params = nnx.split(mixer)
    keys = iter(jax.random.split(jax.random.key(1), 9))
    params = jax.tree.map(lambda p: p + 0.4 * jax.random.normal(next(keys), p.shape), params)

    @jax.jit
    def apply(x):
        mixer = nnx.merge(graph, params)
        return mixer(x, seq)[0] if method == "call" else mixer.prefill(x, seq, mixer.init_state(*x.shape[:2]))[0]

    return lambda x: np.asarray(apply(x))


def test_position_jumps_precede_blocks_and_documents_start_at_0():
    positions = jnp.array([[*range(10), *range(6)]])
    jumped = np.asarray(add_position_jumps(positions, 4, 5, jax.random.key(0)))[0]
    gaps = np.diff(jumped) - 1
    assert jumped[0] == jumped[10] == 0 and set(np.flatnonzero(gaps)) <= {
        3,
        7,
        9,
        13,
    }  # the second document starts after 9
    assert all(0 <= gap <= 5 for place, gap in enumerate(gaps) if place != 9) and gaps[[3, 7, 13]].sum() > 0
    np.testing.assert_array_equal(add_position_jumps(positions, 4, 0, jax.random.key(0)), positions)


def test_layers_must_agree_on_landmarks():
    one = config("mark")
    assert config("full mark").landmark_block_size == 3 and config("full").landmark_block_size is None
    blocks = one.blocks | {"wide": Block(mixer=Landmark(block_size=5))}
    with pytest.raises(ConfigError, match=r"landmark block sizes \[3, 5\]"):
        replace(one, pattern="mark wide", blocks=blocks)
    assert replace(one, blocks=blocks).landmark_block_size == 3  # blocks that the pattern does not use are ignored
    for name, value in (("block_size", 0), ("max_position_jump", -1), ("top_k", 0), ("min_probability", 2.0)):
        with pytest.raises(ConfigError, match=f"{name} is {value}"):
            replace(THREE, **{name: value})


def test_offloaded_blocks_are_fetched_on_read_and_counted():
    mixer = Landmark(block_size=3, num_heads=4, num_kv_heads=2, top_k=2, select_per="head")
    blocks = {"m": Block(mixer=mixer), "c": Block(mixer=GatedConv(), channel=NoChannelMixer())}
    config = LMConfig(d_model=8, vocab_size=20, pattern="c m", blocks=blocks)
    graph, weights = nnx.split(config.build(nnx.Rngs(0)))
    keys = iter(jax.random.split(jax.random.key(1), 40))
    model = nnx.merge(graph, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), weights))
    tokens = np.random.default_rng(0).integers(20, size=(2, 17)).astype(np.int32)
    whole = jax.jit(lambda tokens: model.prefill(tokens, unpacked_seq_info(2, 17), model.init_state(2, 20))[0])(tokens)

    driver = OffloadedLM(config, model, 2, 20)
    np.testing.assert_allclose(driver.prefill(tokens[:, :14]), whole[:, 13], atol=2e-5)
    block = 2 * 3 * 2 * 4  # keys and values of 3 tokens, a key/value head 2 wide in 4 bytes
    before = driver.stats()
    assert before.host_bytes == before.stored_bytes == 2 * 2 * 4 * block  # rows, heads, complete blocks
    for t in range(14, 17):
        np.testing.assert_allclose(driver.prefill(tokens[:, t : t + 1]), whole[:, t], atol=2e-5)
    after = driver.stats()
    assert after.host_bytes == 2 * 2 * 5 * block
    # Three tokens and a landmark read at most two blocks a head, in two rows of four heads.
    assert 0 < after.fetched_bytes - before.fetched_bytes <= 4 * 2 * 2 * 4 * block and after.fetched_bytes % block == 0
    marked = driver.layers[1]
    assert isinstance(marked, OffloadedLayer)
    assert {x.sharding.memory_kind for x in marked.store.blocks.values()} == {"pinned_host"}
    assert {x.sharding.memory_kind for x in marked.device_arrays()} == {jax.devices()[0].default_memory().kind}
    with pytest.raises(ValueError, match="21 tokens exceed max_len 20"):
        driver.prefill(np.zeros((2, 4), np.int32))
    plain = replace(config, pattern="c")
    with pytest.raises(ConfigError, match="'c' has no landmark attention"):
        OffloadedLM(plain, plain.build(nnx.Rngs(0)), 1, 20)
    every = replace(config, blocks=config.blocks | {"m": Block(mixer=THREE)})
    with pytest.raises(ConfigError, match="set top_k"):
        OffloadedLM(every, every.build(nnx.Rngs(0)), 1, 20)


def test_steps_and_prefill_give_the_same_cache_after_a_landmark():
    k, v = (jax.random.normal(jax.random.key(i), (1, 8, 1, 2)) for i in range(2))
    active, positions, ones = jnp.ones(1, bool), jnp.arange(8)[None], jnp.ones((1, 8), jnp.int32)
    empty = stepped = init_landmark_cache(1, 8, 3, 1, 2, jnp.float32)
    for t in range(8):
        at = jnp.full(1, t)
        stepped = close_partial_block(
            append_to_partial_block(stepped, k[:, t], v[:, t], at, active), k[:, t], at, active
        )
    blocks = cached_and_new_blocks(k, v, ones, positions, empty)
    whole, _ = update_cache_and_log_probs(empty, None, blocks, None, k, v, ones, positions)
    assert not np.asarray(whole.partial_k).any() and np.asarray(whole.landmark_k).all()
    for actual, expected in zip(stepped, whole, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.full
def test_memory_is_linear_in_length():
    """Memory of the compiled forward and backward pass at most doubles when the length doubles."""

    def memory_bytes(length: int) -> int:
        q, k, v = (jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32) for _ in range(3))

        def loss(q, k, v):
            return landmark_attention(q, k, v, block_size=63, positions=jnp.arange(length)[None]).sum()

        memory = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    short, long = memory_bytes(4096), memory_bytes(8192)
    assert long <= 2.1 * short and long <= 7 * 3 * 8192 * 16 * 4
