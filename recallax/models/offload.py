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
from recallax.layers.landmark import LandmarkMixer, Looked
from recallax.models.block import BlockModule
from recallax.models.lm import LM, LMConfig
from recallax.models.pattern import parse
from recallax.models.placement import Place, layer_places
from recallax.pallas_kernels.landmark_attention import Taken
from recallax.types import SeqInfo

type Own = tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]]
"""Keys and values of the unfinished block."""
type Key = tuple[int, int, int]
"""Row, key/value head, block."""


class Traffic(NamedTuple):
    """Bytes, counted by the arrays that moved or are held."""

    fetched: int
    """From the host so far."""
    stored: int
    """To the host so far."""
    host: int
    """Held on the host now."""
    device: int
    """Held on the device now besides the weights: landmarks, unfinished blocks, fetched ones, other layers' states."""


class Shelf:
    """The blocks of one layer: all on the host, the last ones read on the device."""

    def __init__(self, host: jax.sharding.Sharding, device: jax.sharding.Sharding):
        self.host, self.device = host, device
        self.blocks: dict[Key, Array] = {}
        self.near: dict[Key, Array] = {}
        self.fetched = self.stored = 0

    def put(self, key: Key, block: Float[Array, "2 L K"]) -> None:
        self.blocks[key] = jax.device_put(block, self.host)
        self.stored += block.nbytes

    def get(self, keys: Sequence[Key]) -> list[Array]:
        """The blocks on the device; others that are there are let go."""
        missing = [key for key in keys if key not in self.near]
        self.fetched += sum(self.blocks[key].nbytes for key in missing)
        arrived = dict(zip(missing, jax.device_put([self.blocks[key] for key in missing], self.device), strict=True))
        self.near = {key: self.near[key] if key in self.near else arrived[key] for key in keys}
        return list(self.near.values())


class Marked:
    """One layer of landmark attention: its weights, its state on the device, its blocks on the host."""

    def __init__(self, block: BlockModule, rows: int, max_len: int, shelf: Shelf):
        mixer = block.mixer
        assert isinstance(mixer, LandmarkMixer) and isinstance(block.channel, RecurrentMixer)
        if mixer.retrieval is None:
            raise ConfigError("top_k is None, which reads all blocks; to keep them on the host give a top_k")
        self.graph, self.weights = nnx.split(block)
        self.real, self.groups, self.share = mixer.real, mixer.kv_heads, mixer.heads // mixer.kv_heads
        state = jax.eval_shape(lambda: mixer.init_state(rows, max_len))
        self.best = None if state.best is None else jnp.zeros(state.best.shape, state.best.dtype)
        self.marks = jnp.zeros(state.cache.marks.shape, state.cache.marks.dtype)
        unfinished = jnp.zeros(state.cache.own_k.shape, state.cache.own_k.dtype)
        self.own: Own = (unfinished, unfinished)
        self.channel = block.channel.init_state(rows, max_len)
        self.shelf = shelf

    def arrays(self) -> list[Array]:
        """What is on the device."""
        return jax.tree.leaves((self.marks, self.own, self.best, self.channel, list(self.shelf.near.values())))

    def feed(self, r: Float[Array, "B C D"], first: int, seq: SeqInfo) -> Float[Array, "B C D"]:
        """C tokens of one block, the first at position `first`."""
        at = jnp.asarray(first)
        looked, self.own, self.best = _look_at(self.graph, self.weights, r, at, self.marks, self.own, self.best)
        buffer, where = self._fetched(np.asarray(looked.index))
        blocks = (self.marks, buffer, where, self.own)
        r, self.channel = _read_from(self.graph, self.weights, r, looked, blocks, seq, self.channel)
        if (first + r.shape[1]) % (self.real + 1) == 0:
            self._finish(first // (self.real + 1), looked.k[:, -1])
        return r

    def _fetched(self, index: Int[np.ndarray, "B C X N"]) -> tuple[Float[Array, "U 2 L K"], Int[Array, "B C H N"]]:
        """The chosen blocks behind one of zeros, and which of them each head reads."""
        rows, chunk, _, count = index.shape
        heads = self.groups * self.share
        index = np.broadcast_to(index, (rows, chunk, heads, count))
        row, head = np.arange(rows)[:, None, None, None], np.arange(heads)[None, None, :, None]
        held = index < self.marks.shape[1]
        code = np.where(held, (index * self.groups + head // self.share) * rows + row, -1)
        wanted = [int(c) for c in np.unique(code) if c >= 0]
        keys = [(c % rows, c // rows % self.groups, c // rows // self.groups) for c in wanted]
        size = 1 << len(keys).bit_length()  # few sizes, so that few programs are compiled
        nothing = jnp.zeros((2, *self.own[0].shape[1:2], self.own[0].shape[3]), self.own[0].dtype)
        buffer = jnp.stack([nothing, *self.shelf.get(keys), *[nothing] * (size - 1 - len(keys))])
        where = np.searchsorted(wanted, code) + 1 if wanted else np.zeros_like(code)
        return buffer, jnp.asarray(np.where(held, where, 0))

    def _finish(self, number: int, mark: Float[Array, "B G K"]) -> None:
        self.marks = self.marks.at[:, number].set(mark)
        for row in range(mark.shape[0]):
            for group in range(self.groups):
                self.shelf.put((row, group, number), jnp.stack([x[row, :, group] for x in self.own]))


class Plain:
    """Any other layer, whose state stays on the device."""

    def __init__(self, block: BlockModule, rows: int, max_len: int):
        self.graph, self.weights = nnx.split(block)
        self.state = block.init_state(rows, max_len)

    def arrays(self) -> list[Array]:
        """What is on the device."""
        return jax.tree.leaves(self.state)

    def feed(self, r: Float[Array, "B C D"], first: int, seq: SeqInfo) -> Float[Array, "B C D"]:
        """C further tokens."""
        r, self.state = _prefill(self.graph, self.weights, r, seq, self.state)
        return r


@partial(jax.jit, static_argnums=0)
def _look_at(
    graph: nnx.GraphDef, weights: nnx.State, r: Array, first: Array, marks: Array, own: Own, best: Array | None
) -> tuple[Looked, Own, Array | None]:
    """What tokens of one block want to read, and their block with them; layers of one kind share the program."""
    block = nnx.merge(graph, weights)
    looked, best = block.mixer.look(block.mixer_norm(r), first, marks, best)
    place = first % (own[0].shape[1] + 1) + jnp.arange(r.shape[1])

    def written(x: Array, new: Array) -> Array:
        return jnp.where(place[0] == 0, 0, x).at[:, place].set(new.astype(x.dtype), mode="drop")  # not the landmark

    return looked, (written(own[0], looked.k), written(own[1], looked.v)), best


@partial(jax.jit, static_argnums=0)
def _read_from(
    graph: nnx.GraphDef,
    weights: nnx.State,
    r: Float[Array, "B C D"],
    looked: Looked,
    blocks: tuple[Array, Array, Array, Own],
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
    taken = Taken(chosen, buffer[where, 0], buffer[where, 1])
    y = block.mixer.read_taken(looked, taken, looked.index < marks.shape[1], *own)
    r = r + y.astype(r.dtype)
    y, state, _ = block.channel.prefill(block.channel_norm(r), seq, state)
    return r + y.astype(r.dtype), state


@partial(jax.jit, static_argnums=0)
def _prefill(
    graph: nnx.GraphDef, weights: nnx.State, r: Float[Array, "B C D"], seq: SeqInfo, state: State
) -> tuple[Float[Array, "B C D"], State]:
    return nnx.merge(graph, weights).prefill(r, seq, state)[:2]


class Offloaded:
    """A model that reads documents of one length, one per row, with the blocks of its past on the host."""

    def __init__(self, config: LMConfig, model: LM, rows: int, max_len: int):
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
        self.every, self.rows = model.landmarks.every, rows
        long = model.landmarks.length(max_len)
        blocks = [block_at(model, place) for place in layer_places(parse(config.pattern, list(config.blocks)))]
        self.layers = [
            Marked(block, rows, long, Shelf(host, near))
            if isinstance(block.mixer, LandmarkMixer)
            else Plain(block, rows, long)
            for block in blocks
        ]
        self._graph, self._weights = nnx.split(model)
        self._embed = jax.jit(lambda weights, tokens: nnx.merge(self._graph, weights).embedding[tokens])
        self._logits = jax.jit(lambda weights, r, at: nnx.merge(self._graph, weights).read_last(r, at))

    def feed(self, tokens: Int[np.ndarray, "B T"]) -> Float[Array, "B V"]:
        """Float32 logits behind the last of these further tokens."""
        if tokens.shape[0] != self.rows or tokens.shape[1] < 1:
            raise ValueError(f"tokens have shape {tokens.shape}; there must be {self.rows} rows of at least one token")
        if self.position + tokens.shape[1] > self.max_len:
            raise ValueError(f"{self.position + tokens.shape[1]} tokens exceed max_len {self.max_len}")
        done, r = 0, jnp.zeros(())
        while done < tokens.shape[1]:
            left = tokens.shape[1] - done
            count = self.every if self.position % self.every == 0 and left >= self.every else 1
            r = self._layers(tokens[:, done : done + count])
            done += count
        return self._logits(self._weights, r, jnp.full((self.rows, 1), self.position - 1))

    def generate(self, logits: Float[Array, "B V"], count: int) -> Int[np.ndarray, "B N"]:
        """The next tokens, each the likeliest."""
        found = []
        for _ in range(count):
            found.append(np.asarray(logits.argmax(axis=-1), np.int32))
            logits = self.feed(found[-1][:, None])
        return np.stack(found, axis=1)

    def traffic(self) -> Traffic:
        """Bytes moved so far and held now."""
        shelves = [layer.shelf for layer in self.layers if isinstance(layer, Marked)]
        held = sum(block.nbytes for shelf in shelves for block in shelf.blocks.values())
        device = sum(x.nbytes for layer in self.layers for x in layer.arrays())
        return Traffic(sum(s.fetched for s in shelves), sum(s.stored for s in shelves), held, device)

    def _layers(self, tokens: Int[np.ndarray, "B C"]) -> Float[Array, "B D"]:
        """Through all layers, with the landmark where these tokens end a block; what came out at the last token."""
        assert self.model.landmarks is not None
        x = self._embed(self._weights, jnp.asarray(tokens)).astype(jnp.float32)
        first = self.position + self.position // self.every
        self.position += tokens.shape[1]
        last = tokens.shape[1] - 1
        if self.position % self.every == 0:
            x = jnp.concatenate([x, self.model.landmarks.rows(self.rows)[:, None]], axis=1)
        ones = jnp.ones(x.shape[:2], jnp.int32)
        positions = first + jnp.arange(x.shape[1])[None] * ones
        seq = SeqInfo(positions, ones, jnp.zeros(x.shape[:2], bool), None)
        for layer in self.layers:
            x = layer.feed(x, first, seq)
        return x[:, last]


def block_at(model: LM, place: Place) -> BlockModule:
    """One layer of a model, cut out of its stack."""
    module: Any = model
    for name in place.path:
        module = module[name] if isinstance(name, int) else getattr(module, name)
    if not place.index:
        return module
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda x: x[place.index], state))
