"""Generation for contexts beyond device memory: blocks of landmark attention wait in host memory.

The device keeps the landmarks' keys, the unfinished block, and what the current tokens read. A prompt is fed block by
block and generation token by token; for each layer the landmarks choose, the chosen blocks that are not on the device
are fetched, and the layer goes on. What is fetched is one key/value head of one block; it stays until the next tokens
have chosen otherwise. Source: Mohtashami & Jaggi 2023 (arXiv 2305.16300), section 3.2.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import ConfigError
from recallax.layers.base import RecurrentMixer, State
from recallax.layers.landmark import BlockQueries, LandmarkMixer
from recallax.models.block import BlockModule
from recallax.models.lm import LM, LMConfig
from recallax.models.parameter_paths import ParameterPath, layer_paths
from recallax.models.pattern import parse_pattern
from recallax.pallas_kernels.landmark_attention import GatheredBlocks
from recallax.types import SeqInfo

type UnfinishedBlock = tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]]
"""Keys and values of the unfinished block."""
type BlockKey = tuple[int, int, int]
"""Row, key/value head, block."""


class OffloadStats(NamedTuple):
    """Bytes, counted by the arrays that moved or are held."""

    fetched_bytes: int
    """From the host so far."""
    stored_bytes: int
    """To the host so far."""
    host_bytes: int
    """Held on the host now."""
    device_bytes: int
    """Held on the device now besides the weights: landmarks, unfinished blocks, fetched ones, other layers' states."""


class HostBlockStore:
    """The blocks of one layer: all on the host, the last ones read on the device."""

    def __init__(self, host_sharding: jax.sharding.Sharding, device_sharding: jax.sharding.Sharding):
        self.host_sharding, self.device_sharding = host_sharding, device_sharding
        self.blocks: dict[BlockKey, Array] = {}
        self.device_blocks: dict[BlockKey, Array] = {}
        self.fetched_bytes = self.stored_bytes = 0

    def put(self, key: BlockKey, block: Float[Array, "2 L K"]) -> None:
        self.blocks[key] = jax.device_put(block, self.host_sharding)
        self.stored_bytes += block.nbytes

    def get(self, keys: Sequence[BlockKey]) -> list[Array]:
        """The blocks on the device; others that are there are let go."""
        missing = [key for key in keys if key not in self.device_blocks]
        self.fetched_bytes += sum(self.blocks[key].nbytes for key in missing)
        arrived = dict(
            zip(missing, jax.device_put([self.blocks[key] for key in missing], self.device_sharding), strict=True)
        )
        self.device_blocks = {
            key: self.device_blocks[key] if key in self.device_blocks else arrived[key] for key in keys
        }
        return list(self.device_blocks.values())


class OffloadedLayer:
    """One layer of landmark attention: its weights, its state on the device, its blocks on the host."""

    def __init__(self, block: BlockModule, batch_size: int, max_len: int, store: HostBlockStore):
        mixer = block.mixer
        assert isinstance(mixer, LandmarkMixer) and isinstance(block.channel, RecurrentMixer)
        if mixer.retrieval is None:
            raise ConfigError("top_k is None, which reads all blocks; to keep them on the host give a top_k")
        self.graphdef, self.weights = nnx.split(block)
        self.block_size, self.num_kv_heads, self.queries_per_kv = (
            mixer.block_size,
            mixer.num_kv_heads,
            mixer.num_heads // mixer.num_kv_heads,
        )
        state = jax.eval_shape(lambda: mixer.init_state(batch_size, max_len))
        self.best_scores = (
            None if state.max_log_prob is None else jnp.zeros(state.max_log_prob.shape, state.max_log_prob.dtype)
        )
        self.landmark_keys = jnp.zeros(state.cache.landmark_k.shape, state.cache.landmark_k.dtype)
        unfinished = jnp.zeros(state.cache.partial_k.shape, state.cache.partial_k.dtype)
        self.unfinished: UnfinishedBlock = (unfinished, unfinished)
        self.channel_state = block.channel.init_state(batch_size, max_len)
        self.store = store

    def device_arrays(self) -> list[Array]:
        """What is on the device."""
        return jax.tree.leaves(
            (
                self.landmark_keys,
                self.unfinished,
                self.best_scores,
                self.channel_state,
                list(self.store.device_blocks.values()),
            )
        )

    def prefill(self, r: Float[Array, "B C D"], position: int, seq: SeqInfo) -> Float[Array, "B C D"]:
        """C tokens of one block, the first at position `position`."""
        at = jnp.asarray(position)
        looked, self.unfinished, self.best_scores = _select_and_append(
            self.graphdef, self.weights, r, at, self.landmark_keys, self.unfinished, self.best_scores
        )
        buffer, where = self._fetch_blocks(np.asarray(looked.index))
        blocks = (self.landmark_keys, buffer, where, self.unfinished)
        r, self.channel_state = _attend_fetched(self.graphdef, self.weights, r, looked, blocks, seq, self.channel_state)
        if (position + r.shape[1]) % (self.block_size + 1) == 0:
            self._store_block(position // (self.block_size + 1), looked.k[:, -1])
        return r

    def _fetch_blocks(self, index: Int[np.ndarray, "B C X N"]) -> tuple[Float[Array, "U 2 L K"], Int[Array, "B C H N"]]:
        """The chosen blocks behind one of zeros, and which of them each head reads."""
        rows, chunk, _, count = index.shape
        heads = self.num_kv_heads * self.queries_per_kv
        index = np.broadcast_to(index, (rows, chunk, heads, count))
        row, head = np.arange(rows)[:, None, None, None], np.arange(heads)[None, None, :, None]
        held = index < self.landmark_keys.shape[1]
        code = np.where(held, (index * self.num_kv_heads + head // self.queries_per_kv) * rows + row, -1)
        wanted = [int(c) for c in np.unique(code) if c >= 0]
        keys = [(c % rows, c // rows % self.num_kv_heads, c // rows // self.num_kv_heads) for c in wanted]
        size = 1 << len(keys).bit_length()  # few sizes, so that few programs are compiled
        nothing = jnp.zeros((2, *self.unfinished[0].shape[1:2], self.unfinished[0].shape[3]), self.unfinished[0].dtype)
        buffer = jnp.stack([nothing, *self.store.get(keys), *[nothing] * (size - 1 - len(keys))])
        where = np.searchsorted(wanted, code) + 1 if wanted else np.zeros_like(code)
        return buffer, jnp.asarray(np.where(held, where, 0))

    def _store_block(self, block_index: int, landmark_key: Float[Array, "B G K"]) -> None:
        self.landmark_keys = self.landmark_keys.at[:, block_index].set(landmark_key)
        for row in range(landmark_key.shape[0]):
            for group in range(self.num_kv_heads):
                self.store.put((row, group, block_index), jnp.stack([x[row, :, group] for x in self.unfinished]))


class ResidentLayer:
    """Any other layer, whose state stays on the device."""

    def __init__(self, block: BlockModule, batch_size: int, max_len: int):
        self.graphdef, self.weights = nnx.split(block)
        self.state = block.init_state(batch_size, max_len)

    def device_arrays(self) -> list[Array]:
        """What is on the device."""
        return jax.tree.leaves(self.state)

    def prefill(self, r: Float[Array, "B C D"], position: int, seq: SeqInfo) -> Float[Array, "B C D"]:
        """C further tokens."""
        r, self.state = _prefill_layer(self.graphdef, self.weights, r, seq, self.state)
        return r


@partial(jax.jit, static_argnums=0)
def _select_and_append(
    graph: nnx.GraphDef,
    weights: nnx.State,
    r: Array,
    first: Array,
    marks: Array,
    own: UnfinishedBlock,
    best: Array | None,
) -> tuple[BlockQueries, UnfinishedBlock, Array | None]:
    """What tokens of one block want to read, and their block with them; layers of one kind share the program."""
    block = nnx.merge(graph, weights)
    looked, best = block.mixer.select_blocks(block.mixer_norm(r), first, marks, best)
    place = first % (own[0].shape[1] + 1) + jnp.arange(r.shape[1])

    def written(x: Array, new: Array) -> Array:
        return jnp.where(place[0] == 0, 0, x).at[:, place].set(new.astype(x.dtype), mode="drop")  # not the landmark

    return looked, (written(own[0], looked.k), written(own[1], looked.v)), best


@partial(jax.jit, static_argnums=0)
def _attend_fetched(
    graph: nnx.GraphDef,
    weights: nnx.State,
    r: Float[Array, "B C D"],
    looked: BlockQueries,
    blocks: tuple[Array, Array, Array, UnfinishedBlock],
    seq: SeqInfo,
    state: State,
) -> tuple[Float[Array, "B C D"], State]:
    """The layer's output, given the landmarks, the fetched blocks, which of them each head reads, and the own one."""
    block = nnx.merge(graph, weights)
    (marks, buffer, where, own), heads = blocks, looked.q.shape[2]
    row = jnp.arange(len(r))[:, None, None, None]
    group = jnp.arange(heads)[None, None, :, None] // (heads // marks.shape[2])
    index = jnp.broadcast_to(looked.index, (*looked.index.shape[:2], heads, looked.index.shape[3]))
    chosen = marks[row, jnp.minimum(index, marks.shape[1] - 1), group]
    taken = GatheredBlocks(chosen, buffer[where, 0], buffer[where, 1])
    y = block.mixer.read_blocks(looked, taken, looked.index < marks.shape[1], *own)
    r = r + y.astype(r.dtype)
    y, state, _ = block.channel.prefill(block.channel_norm(r), seq, state)
    return r + y.astype(r.dtype), state


@partial(jax.jit, static_argnums=0)
def _prefill_layer(
    graph: nnx.GraphDef, weights: nnx.State, r: Float[Array, "B C D"], seq: SeqInfo, state: State
) -> tuple[Float[Array, "B C D"], State]:
    return nnx.merge(graph, weights).prefill(r, seq, state)[:2]


class OffloadedLM:
    """A model that reads documents of one length, one per row, with the blocks of its past on the host."""

    def __init__(self, config: LMConfig, model: LM, batch_size: int, max_len: int):
        """max_len: tokens at most, which bounds the landmarks' keys. Raises ConfigError where there are no landmarks,
        and where the device offers no `pinned_host` memory."""
        if model.landmarks is None:
            raise ConfigError(f"pattern {config.pattern!r} has no landmark attention; nothing can be offloaded")
        device = jax.devices()[0]
        kinds = [memory.kind for memory in device.addressable_memories()]
        if "pinned_host" not in kinds:
            raise ConfigError(f"{device} offers the memories {kinds}; blocks wait in 'pinned_host'")
        host, near = (
            jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
            for kind in ("pinned_host", device.default_memory().kind)
        )
        self.model, self.position, self.max_len = model, 0, max_len
        self.block_size, self.batch_size = model.landmarks.block_size, batch_size
        long = model.landmarks.expanded_length(max_len)
        blocks = [block_at(model, place) for place in layer_paths(parse_pattern(config.pattern, list(config.blocks)))]
        self.layers = [
            OffloadedLayer(block, batch_size, long, HostBlockStore(host, near))
            if isinstance(block.mixer, LandmarkMixer)
            else ResidentLayer(block, batch_size, long)
            for block in blocks
        ]
        self._graphdef, self._weights = nnx.split(model)
        self._embed = jax.jit(lambda weights, tokens: nnx.merge(self._graphdef, weights).embedding[tokens])
        self._logits = jax.jit(lambda weights, r, at: nnx.merge(self._graphdef, weights).last_token_logits(r, at))

    def prefill(self, tokens: Int[np.ndarray, "B T"]) -> Float[Array, "B V"]:
        """Float32 logits behind the last of these further tokens."""
        if tokens.shape[0] != self.batch_size or tokens.shape[1] < 1:
            raise ValueError(
                f"tokens have shape {tokens.shape}; there must be {self.batch_size} rows of at least one token"
            )
        if self.position + tokens.shape[1] > self.max_len:
            raise ValueError(f"{self.position + tokens.shape[1]} tokens exceed max_len {self.max_len}")
        done, r = 0, jnp.zeros(())
        while done < tokens.shape[1]:
            left = tokens.shape[1] - done
            count = self.block_size if self.position % self.block_size == 0 and left >= self.block_size else 1
            r = self._run_layers(tokens[:, done : done + count])
            done += count
        return self._logits(self._weights, r, jnp.full((self.batch_size, 1), self.position - 1))

    def generate(self, logits: Float[Array, "B V"], max_new_tokens: int) -> Int[np.ndarray, "B N"]:
        """The next tokens, each the likeliest."""
        found = []
        for _ in range(max_new_tokens):
            found.append(np.asarray(logits.argmax(axis=-1), np.int32))
            logits = self.prefill(found[-1][:, None])
        return np.stack(found, axis=1)

    def stats(self) -> OffloadStats:
        """Bytes moved so far and held now."""
        shelves = [layer.store for layer in self.layers if isinstance(layer, OffloadedLayer)]
        held = sum(block.nbytes for shelf in shelves for block in shelf.blocks.values())
        device = sum(x.nbytes for layer in self.layers for x in layer.device_arrays())
        return OffloadStats(sum(s.fetched_bytes for s in shelves), sum(s.stored_bytes for s in shelves), held, device)

    def _run_layers(self, tokens: Int[np.ndarray, "B C"]) -> Float[Array, "B D"]:
        """Through all layers, with the landmark where these tokens end a block; what came out at the last token."""
        assert self.model.landmarks is not None
        x = self._embed(self._weights, jnp.asarray(tokens)).astype(jnp.float32)
        first = self.position + self.position // self.block_size
        self.position += tokens.shape[1]
        last = tokens.shape[1] - 1
        if self.position % self.block_size == 0:
            x = jnp.concatenate([x, self.model.landmarks.embedding_rows(self.batch_size)[:, None]], axis=1)
        ones = jnp.ones(x.shape[:2], jnp.int32)
        positions = first + jnp.arange(x.shape[1])[None] * ones
        seq = SeqInfo(positions, ones, jnp.zeros(x.shape[:2], bool), None)
        for layer in self.layers:
            x = layer.prefill(x, first, seq)
        return x[:, last]


def block_at(model: LM, parameter_path: ParameterPath) -> BlockModule:
    """One layer of a model, cut out of its stack."""
    module: Any = model
    for name in parameter_path.path:
        module = module[name] if isinstance(name, int) else getattr(module, name)
    if not parameter_path.stack_index:
        return module
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda x: x[parameter_path.stack_index], state))
