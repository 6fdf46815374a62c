"""The layers of an offloaded language model: landmark attention with blocks in host memory, and all other layers."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import ConfigError
from recallax.layers.base import RecurrentMixer, State
from recallax.layers.landmark import BlockQueries, LandmarkMixer
from recallax.models.block import BlockModule
from recallax.pallas_kernels.landmark_attention import GatheredBlocks
from recallax.types import SeqInfo

type UnfinishedBlock = tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]]
"""Keys and values of the unfinished block."""
type BlockKey = tuple[int, int, int]
"""Row, key/value head, block."""


class HostBlockStore:
    """The blocks of one layer in host memory, and a copy of the last fetched ones in device memory.

    Args:
        host_sharding: The sharding of blocks on the host.
        device_sharding: The sharding of blocks on the device.
    """

    def __init__(self, host_sharding: jax.sharding.Sharding, device_sharding: jax.sharding.Sharding):
        self.host_sharding, self.device_sharding = host_sharding, device_sharding
        self.blocks: dict[BlockKey, Array] = {}
        self.device_blocks: dict[BlockKey, Array] = {}
        self.fetched_bytes = self.stored_bytes = 0

    def put(self, key: BlockKey, block: Float[Array, "2 L K"]) -> None:
        """Store a block on the host.

        Args:
            key: The block's key.
            block: Its keys and values.
        """
        self.blocks[key] = jax.device_put(block, self.host_sharding)
        self.stored_bytes += block.nbytes

    def get(self, keys: Sequence[BlockKey]) -> list[Array]:
        """Return blocks on the device. Blocks that are already there are not copied; other blocks are released.

        Args:
            keys: The blocks' keys.

        Returns:
            Keys and values of each block.
        """
        missing = [key for key in keys if key not in self.device_blocks]
        self.fetched_bytes += sum(self.blocks[key].nbytes for key in missing)
        fetched = jax.device_put([self.blocks[key] for key in missing], self.device_sharding)
        available = self.device_blocks | dict(zip(missing, fetched, strict=True))
        self.device_blocks = {key: available[key] for key in keys}
        return list(self.device_blocks.values())


class OffloadedLayer:
    """A layer of landmark attention, with its weights and state on the device and its blocks on the host.

    Args:
        block: The layer; its mixer must be a `LandmarkMixer`.
        batch_size: The number of rows.
        max_len: Largest number of positions, landmarks included.
        store: The layer's blocks.

    Raises:
        ConfigError: If the mixer reads all blocks.
    """

    def __init__(self, block: BlockModule, batch_size: int, max_len: int, store: HostBlockStore):
        mixer = block.mixer
        assert isinstance(mixer, LandmarkMixer) and isinstance(block.channel, RecurrentMixer)
        if mixer.retrieval is None:
            raise ConfigError("top_k is None, which reads all blocks; set top_k to offload them to the host")
        self.graphdef, self.weights = nnx.split(block)
        self.block_size, self.num_kv_heads = mixer.block_size, mixer.num_kv_heads
        self.queries_per_kv = mixer.num_heads // mixer.num_kv_heads
        state = jax.eval_shape(lambda: mixer.init_state(batch_size, max_len))
        self.best_scores = None if state.max_log_prob is None else _zeros_like(state.max_log_prob)
        self.landmark_keys = _zeros_like(state.cache.landmark_k)
        unfinished = _zeros_like(state.cache.partial_k)
        self.unfinished: UnfinishedBlock = (unfinished, unfinished)
        self.channel_state = block.channel.init_state(batch_size, max_len)
        self.store = store

    def device_arrays(self) -> list[Array]:
        """Return the layer's arrays on the device, except for its weights.

        Returns:
            The arrays.
        """
        blocks = list(self.store.device_blocks.values())
        return jax.tree.leaves((self.landmark_keys, self.unfinished, self.best_scores, self.channel_state, blocks))

    def prefill(self, r: Float[Array, "B C D"], position: int, seq: SeqInfo) -> Float[Array, "B C D"]:
        """Read tokens of one block.

        Args:
            r: The residual stream.
            position: The position of the first token.
            seq: The tokens' sequence information.

        Returns:
            The residual stream after the layer.
        """
        queries, self.unfinished, self.best_scores = _select_and_append(
            self.graphdef,
            self.weights,
            r,
            jnp.asarray(position),
            self.landmark_keys,
            self.unfinished,
            self.best_scores,
        )
        buffer, slots = self._fetch_blocks(np.asarray(queries.index))
        blocks = (self.landmark_keys, buffer, slots, self.unfinished)
        r, self.channel_state = _attend_fetched(
            self.graphdef, self.weights, r, queries, blocks, seq, self.channel_state
        )
        if (position + r.shape[1]) % (self.block_size + 1) == 0:
            self._store_block(position // (self.block_size + 1), queries.k[:, -1])
        return r

    def _fetch_blocks(self, index: Int[np.ndarray, "B C X N"]) -> tuple[Float[Array, "U 2 L K"], Int[Array, "B C H N"]]:
        """Return a buffer of a block of zeros and the selected blocks, and the slots that each head reads."""
        num_rows, length, _, count = index.shape
        num_heads = self.num_kv_heads * self.queries_per_kv
        index = np.broadcast_to(index, (num_rows, length, num_heads, count))
        row, head = np.arange(num_rows)[:, None, None, None], np.arange(num_heads)[None, None, :, None]
        selected = index < self.landmark_keys.shape[1]
        code = np.where(selected, (index * self.num_kv_heads + head // self.queries_per_kv) * num_rows + row, -1)
        codes = [int(c) for c in np.unique(code) if c >= 0]
        keys = [(c % num_rows, c // num_rows % self.num_kv_heads, c // num_rows // self.num_kv_heads) for c in codes]
        size = 1 << len(keys).bit_length()  # powers of two, so that few programs are compiled
        partial_k = self.unfinished[0]
        zeros = jnp.zeros((2, partial_k.shape[1], partial_k.shape[3]), partial_k.dtype)
        buffer = jnp.stack([zeros, *self.store.get(keys), *[zeros] * (size - 1 - len(keys))])
        slots = np.searchsorted(codes, code) + 1 if codes else np.zeros_like(code)
        return buffer, jnp.asarray(np.where(selected, slots, 0))

    def _store_block(self, block_index: int, landmark_key: Float[Array, "B G K"]) -> None:
        self.landmark_keys = self.landmark_keys.at[:, block_index].set(landmark_key)
        for row in range(landmark_key.shape[0]):
            for kv_head in range(self.num_kv_heads):
                self.store.put((row, kv_head, block_index), jnp.stack([x[row, :, kv_head] for x in self.unfinished]))


class ResidentLayer:
    """A layer without landmark attention, whose state stays on the device.

    Args:
        block: The layer.
        batch_size: The number of rows.
        max_len: Largest number of positions, landmarks included.
    """

    def __init__(self, block: BlockModule, batch_size: int, max_len: int):
        self.graphdef, self.weights = nnx.split(block)
        self.state = block.init_state(batch_size, max_len)

    def device_arrays(self) -> list[Array]:
        """Return the layer's arrays on the device, except for its weights.

        Returns:
            The arrays.
        """
        return jax.tree.leaves(self.state)

    def prefill(self, r: Float[Array, "B C D"], position: int, seq: SeqInfo) -> Float[Array, "B C D"]:
        """Read tokens.

        Args:
            r: The residual stream.
            position: The position of the first token; not used.
            seq: The tokens' sequence information.

        Returns:
            The residual stream after the layer.
        """
        r, self.state = _prefill_layer(self.graphdef, self.weights, r, seq, self.state)
        return r


def _zeros_like(spec: jax.ShapeDtypeStruct) -> Array:
    return jnp.zeros(spec.shape, spec.dtype)


@partial(jax.jit, static_argnums=0)
def _select_and_append(
    graphdef: nnx.GraphDef,
    weights: nnx.State,
    r: Array,
    position: Array,
    landmark_keys: Array,
    unfinished: UnfinishedBlock,
    best_scores: Array | None,
) -> tuple[BlockQueries, UnfinishedBlock, Array | None]:
    """Select the blocks that tokens of one block read, and append the tokens to the unfinished block.

    Layers with equal graph definitions share the compiled program.
    """
    block = nnx.merge(graphdef, weights)
    queries, best_scores = block.mixer.select_blocks(block.mixer_norm(r), position, landmark_keys, best_scores)
    slot = position % (unfinished[0].shape[1] + 1) + jnp.arange(r.shape[1])

    def append(x: Array, new: Array) -> Array:
        # The landmark has the slot after the last one, so its write is dropped.
        return jnp.where(slot[0] == 0, 0, x).at[:, slot].set(new.astype(x.dtype), mode="drop")

    return queries, (append(unfinished[0], queries.k), append(unfinished[1], queries.v)), best_scores


@partial(jax.jit, static_argnums=0)
def _attend_fetched(
    graphdef: nnx.GraphDef,
    weights: nnx.State,
    r: Float[Array, "B C D"],
    queries: BlockQueries,
    blocks: tuple[Array, Array, Array, UnfinishedBlock],
    seq: SeqInfo,
    state: State,
) -> tuple[Float[Array, "B C D"], State]:
    """Apply a layer, given landmark keys, fetched blocks, the slots that heads read, and the unfinished block."""
    block = nnx.merge(graphdef, weights)
    (landmark_keys, buffer, slots, unfinished), num_heads = blocks, queries.q.shape[2]
    row = jnp.arange(len(r))[:, None, None, None]
    kv_head = jnp.arange(num_heads)[None, None, :, None] // (num_heads // landmark_keys.shape[2])
    index = jnp.broadcast_to(queries.index, (*queries.index.shape[:2], num_heads, queries.index.shape[3]))
    selected_keys = landmark_keys[row, jnp.minimum(index, landmark_keys.shape[1] - 1), kv_head]
    gathered = GatheredBlocks(selected_keys, buffer[slots, 0], buffer[slots, 1])
    y = block.mixer.read_blocks(queries, gathered, queries.index < landmark_keys.shape[1], *unfinished)
    r = r + y.astype(r.dtype)
    y, state, _ = block.channel.prefill(block.channel_norm(r), seq, state)
    return r + y.astype(r.dtype), state


@partial(jax.jit, static_argnums=0)
def _prefill_layer(
    graphdef: nnx.GraphDef, weights: nnx.State, r: Float[Array, "B C D"], seq: SeqInfo, state: State
) -> tuple[Float[Array, "B C D"], State]:
    return nnx.merge(graphdef, weights).prefill(r, seq, state)[:2]
