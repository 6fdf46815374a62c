"""Generation with contexts beyond device memory: the blocks of landmark attention are stored in host memory.

The device stores the keys of the landmarks, the unfinished block, and the blocks that the current tokens read. Prompts
are read block by block, and generation runs token by token. In each layer the landmarks select blocks, the selected
blocks that are not on the device are fetched, and the layer continues. One fetch is one key/value head of one block; it
stays on the device until later tokens select other blocks. Source: Mohtashami & Jaggi 2023 (arXiv 2305.16300), section
3.2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import ConfigError
from recallax.layers.landmark import LandmarkMixer
from recallax.models.block import BlockModule
from recallax.models.lm import LM, LMConfig
from recallax.models.offloaded_layers import HostBlockStore, OffloadedLayer, ResidentLayer
from recallax.models.parameter_paths import ParameterPath, layer_paths, module_at
from recallax.types import SeqInfo

__all__ = ["OffloadStats", "OffloadedLM", "OffloadedLayer", "block_at"]

HOST_MEMORY_KIND = "pinned_host"


class OffloadStats(NamedTuple):
    """Memory statistics in bytes, counted by the arrays that were copied or are stored."""

    fetched_bytes: int
    """Copied from the host so far."""
    stored_bytes: int
    """Copied to the host so far."""
    host_bytes: int
    """Stored on the host."""
    device_bytes: int
    """Stored on the device except for weights: landmarks, unfinished and fetched blocks, states of other layers."""


class OffloadedLM:
    """Language model that stores past blocks in host memory. Each row is one document, and all have one length.

    Args:
        config: The model config.
        model: The model.
        batch_size: The number of rows.
        max_len: Largest number of tokens per row, which bounds the keys of the landmarks.

    Raises:
        ConfigError: If the model has no landmark attention, or the device has no `pinned_host` memory.
    """

    def __init__(self, config: LMConfig, model: LM, batch_size: int, max_len: int):
        if model.landmarks is None:
            raise ConfigError(f"pattern {config.pattern!r} has no landmark attention; nothing can be offloaded")
        host, device = _shardings()
        self.model, self.position, self.max_len = model, 0, max_len
        self.block_size, self.batch_size = model.landmarks.block_size, batch_size
        expanded_len = model.landmarks.expanded_length(max_len)
        self.layers = [
            OffloadedLayer(block, batch_size, expanded_len, HostBlockStore(host, device))
            if isinstance(block.mixer, LandmarkMixer)
            else ResidentLayer(block, batch_size, expanded_len)
            for block in (block_at(model, path) for path in layer_paths(config.terms))
        ]
        graphdef, self._weights = nnx.split(model)
        self._embed = jax.jit(lambda weights, tokens: nnx.merge(graphdef, weights).embedding[tokens])
        self._logits = jax.jit(lambda weights, r, position: nnx.merge(graphdef, weights).last_token_logits(r, position))

    def prefill(self, tokens: Int[np.ndarray, "B T"]) -> Float[Array, "B V"]:
        """Read further tokens.

        Args:
            tokens: Token ids.

        Returns:
            Float32 logits after the last token.

        Raises:
            ValueError: If the number of rows is wrong, there are no tokens, or they exceed `max_len`.
        """
        if tokens.shape[0] != self.batch_size or tokens.shape[1] < 1:
            raise ValueError(
                f"tokens have shape {tokens.shape}; there must be {self.batch_size} rows of at least one token"
            )
        if self.position + tokens.shape[1] > self.max_len:
            raise ValueError(f"{self.position + tokens.shape[1]} tokens exceed max_len {self.max_len}")
        start, r = 0, jnp.zeros(())
        while start < tokens.shape[1]:
            whole_block = self.position % self.block_size == 0 and tokens.shape[1] - start >= self.block_size
            count = self.block_size if whole_block else 1
            r = self._run_layers(tokens[:, start : start + count])
            start += count
        return self._logits(self._weights, r, jnp.full((self.batch_size, 1), self.position - 1))

    def generate(self, logits: Float[Array, "B V"], max_new_tokens: int) -> Int[np.ndarray, "B N"]:
        """Generate tokens greedily.

        Args:
            logits: Logits of the next token.
            max_new_tokens: The number of tokens.

        Returns:
            Token ids.
        """
        tokens = []
        for _ in range(max_new_tokens):
            tokens.append(np.asarray(logits.argmax(axis=-1), np.int32))
            logits = self.prefill(tokens[-1][:, None])
        return np.stack(tokens, axis=1)

    def stats(self) -> OffloadStats:
        """Return memory statistics.

        Returns:
            Bytes copied so far and stored now.
        """
        stores = [layer.store for layer in self.layers if isinstance(layer, OffloadedLayer)]
        return OffloadStats(
            fetched_bytes=sum(store.fetched_bytes for store in stores),
            stored_bytes=sum(store.stored_bytes for store in stores),
            host_bytes=sum(block.nbytes for store in stores for block in store.blocks.values()),
            device_bytes=sum(x.nbytes for layer in self.layers for x in layer.device_arrays()),
        )

    def _run_layers(self, tokens: Int[np.ndarray, "B C"]) -> Float[Array, "B D"]:
        """Apply all layers to tokens, and to a landmark at the end of a block; return the last token's output."""
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
    """Return one layer of a model as a module of its own.

    Args:
        model: The model.
        parameter_path: The layer's path.

    Returns:
        The layer, with its slice of stacked parameters.
    """
    module = module_at(model, parameter_path.path)
    if not parameter_path.stack_index:
        return module
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[parameter_path.stack_index], state))


def _shardings() -> tuple[jax.sharding.Sharding, jax.sharding.Sharding]:
    """Return the shardings of host and device memory on the first device."""
    device = jax.devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY_KIND not in kinds:
        raise ConfigError(f"{device} has the memories {kinds}; offloaded blocks need {HOST_MEMORY_KIND!r}")
    host, default = (
        jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
        for kind in (HOST_MEMORY_KIND, device.default_memory().kind)
    )
    return host, default
