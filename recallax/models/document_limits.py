"""Limits of a model on the documents of a row, and the check of batches against them.

Mixers that work in blocks need documents that start at multiples of a block (`MixerConfig.grid`), and prefix linear
attention reads a limited number of prefix tokens (`MixerConfig.prefix_limit`). A compiled program cannot raise an
error: there, such a mixer returns NaN in rows that exceed its limits. So batches are checked on the host before they
are passed to a program, and `raise_in_compiled_programs` adds the check to programs.
"""

import functools
import math
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool, Int

from recallax.config import ConfigError
from recallax.types import AnyArray, SeqInfo

_check_in_programs = ContextVar("check_in_programs", default=False)


class DocumentLayoutError(ConfigError):
    """The documents of a row do not fit the model; the message names the row, the token, the layer and its limit."""


class LayerLimits(NamedTuple):
    """Limits of one layer on the documents of a row."""

    layer: str
    """Name of the layer in messages, such as `Workspace of block 'memory'`."""
    grid: int
    """Documents must start at multiples of this."""
    prefix_limit: int | None
    """Largest number of prefix tokens in a row; None: no limit."""


class ExpandedRows(NamedTuple):
    """Places and positions of tokens as the layers of a model see them: without padding on the left."""

    index: Int[np.ndarray, "B T"]
    """Number of tokens and landmarks since the start of the row's first document."""
    positions: Int[np.ndarray, "B T"]
    """Position within the document, landmarks included."""
    valid: Bool[np.ndarray, "B T"]
    """False at padding."""
    prefix_sizes: Int[np.ndarray, " B"]
    """Number of prefix tokens, landmarks included."""


@dataclass(frozen=True, kw_only=True)
class DocumentLimits:
    """Limits of the layers of a model."""

    layers: tuple[LayerLimits, ...]
    """The layers that have limits; others are omitted."""
    landmark_block_size: int | None = None
    """Tokens of a document before each landmark that the model inserts; None: it inserts none."""

    @property
    def grid(self) -> int:
        """Multiple of tokens, landmarks not included, at which packed documents fit every layer."""
        grid, block_size = math.lcm(*(layer.grid for layer in self.layers)), self.landmark_block_size
        if grid == 1 or block_size is None:
            return grid
        return block_size * (grid // math.gcd(grid, block_size + 1))  # each block has one landmark more

    def check_batch(self, seq: SeqInfo, *, continued: bool = False) -> None:
        """Check the documents of a batch.

        Args:
            seq: Positions, document ids and prefixes of rows; arrays on the host or on a device.
            continued: The rows may start in the middle of a document, as in a prefill that continues a state.

        Raises:
            DocumentLayoutError: A row exceeds the limits of a layer.
        """
        if not self.layers:
            return
        segment_ids, rows = np.asarray(seq.segment_ids), self._expand(seq)
        origin = _origins(rows) if continued else np.zeros(len(segment_ids), np.int64)
        for layer in self.layers:
            if layer.grid > 1:
                _check_grid(layer, rows, segment_ids, origin, self.landmark_block_size)
            if layer.prefix_limit is not None and rows.prefix_sizes.max(initial=0) > layer.prefix_limit:
                row = int(rows.prefix_sizes.argmax())
                raise DocumentLayoutError(f"row {row} has {_excess(int(rows.prefix_sizes[row]), layer)}")

    def check_call(self, seq: SeqInfo, *, continued: bool = False) -> None:
        """Check the documents of a call of the model, which may be a part of a compiled program.

        Args:
            seq: Positions, document ids and prefixes of rows, perhaps traced; `raise_in_compiled_programs` determines
                whether traced ones are checked when the program runs.
            continued: The rows may start in the middle of a document.

        Raises:
            DocumentLayoutError: A row exceeds the limits of a layer.
        """
        arrays = seq[:3]
        if not self.layers or not all(_is_readable(array) for array in arrays):
            return
        if not any(isinstance(array, Tracer) for array in arrays):
            self.check_batch(seq, continued=continued)
        elif _check_in_programs.get():
            jax.debug.callback(functools.partial(_check_arrays, self, continued), *arrays)

    def check_task(self, name: str, grid: int | None, prefix_length: int) -> None:
        """Check what a task states about its rows, before there is a batch.

        Args:
            name: Name of the task in messages.
            grid: Documents of the task start at multiples of it; None: the task does not state it.
            prefix_length: Largest number of prefix tokens of a document.

        Raises:
            DocumentLayoutError: Rows of the task would exceed the limits of a layer.
        """
        if grid is not None and grid % self.grid:
            layers = ", ".join(layer.layer for layer in self.layers if layer.grid > 1)
            raise DocumentLayoutError(
                f"the grid of {name} is {grid}, and documents must start at multiples of {self.grid} tokens for "
                f"{layers}; set the grid of the task to {math.lcm(grid, self.grid)}"
            )
        if self.landmark_block_size is not None:
            prefix_length += prefix_length // self.landmark_block_size
        for layer in self.layers:
            if layer.prefix_limit is not None and prefix_length > layer.prefix_limit:
                raise DocumentLayoutError(f"rows of {name} have {_excess(prefix_length, layer)}")

    def _expand(self, seq: SeqInfo) -> ExpandedRows:
        """Move rows to the left, and insert the places of landmarks."""
        positions, segment_ids, prefix = (np.asarray(part) for part in seq[:3])
        valid, positions = segment_ids > 0, positions.astype(np.int64)
        index = np.arange(valid.shape[1])[None] - valid.argmax(axis=1)[:, None]
        in_prefix = prefix & valid
        if self.landmark_block_size is None:
            return ExpandedRows(index, positions, valid, in_prefix.sum(axis=1))
        before_landmark = valid & (positions % self.landmark_block_size == self.landmark_block_size - 1)
        index = index + np.cumsum(before_landmark, axis=1) - before_landmark
        prefix_sizes = in_prefix.sum(axis=1) + (in_prefix & before_landmark).sum(axis=1)
        return ExpandedRows(index, positions + positions // self.landmark_block_size, valid, prefix_sizes)


@contextmanager
def raise_in_compiled_programs() -> Generator[None]:
    """Check the documents of every call of a model in compiled programs too, for debugging.

    Programs that violate the limits of a model return NaN. Within this context they raise an error when they run, with
    the message of `DocumentLayoutError`. Programs are compiled again when the context is entered and left, and each
    call copies positions and document ids to the host.

    Yields:
        None.
    """
    token = _check_in_programs.set(True)
    jax.clear_caches()
    try:
        yield
        jax.effects_barrier()  # errors of programs that still run belong to this context
    finally:
        _check_in_programs.reset(token)
        jax.clear_caches()


def _check_arrays(
    limits: DocumentLimits, continued: bool, positions: AnyArray, segment_ids: AnyArray, prefix: AnyArray
) -> None:
    limits.check_batch(SeqInfo(positions, segment_ids, prefix), continued=continued)


def _is_readable(array: AnyArray) -> bool:
    """Return False for an array of which another process holds a part."""
    return not isinstance(array, jax.Array) or isinstance(array, Tracer) or array.is_fully_addressable


def _origins(rows: ExpandedRows) -> Int[np.ndarray, " B"]:
    """Position of the first token of each row."""
    first = rows.valid.argmax(axis=1)[:, None]
    return np.take_along_axis(rows.positions, first, axis=1)[:, 0]


def _check_grid(
    layer: LayerLimits,
    rows: ExpandedRows,
    segment_ids: Int[np.ndarray, "B T"],
    origin: Int[np.ndarray, " B"],
    landmark_block_size: int | None,
) -> None:
    """Raise DocumentLayoutError unless every document has consecutive positions and starts at a multiple of the grid.

    Multiples are counted from the start of the row's first document, which lies `origin` places before the row.
    """
    start = rows.index - rows.positions  # place at which the document of a token starts
    follows = np.zeros_like(rows.valid)
    follows[:, 1:] = segment_ids[:, 1:] == segment_ids[:, :-1]
    is_jump = np.zeros_like(rows.valid)
    is_jump[:, 1:] = follows[:, 1:] & (start[:, 1:] != start[:, :-1])
    is_jump |= ~follows & (rows.positions != 0) & (rows.index > 0)
    is_off_grid = (start + origin[:, None]) % layer.grid != 0
    wrong = rows.valid & (is_jump | is_off_grid)
    if not wrong.any():
        return
    row, token = (int(i) for i in np.argwhere(wrong)[0])
    if is_jump[row, token]:
        raise DocumentLayoutError(
            f"row {row} has a document with position {rows.positions[row, token]} at token {token}; {layer.layer} "
            "needs documents with consecutive positions from 0, without padding inside"
        )
    landmarks = "" if landmark_block_size is None else f" and landmarks (one after every {landmark_block_size} tokens)"
    raise DocumentLayoutError(
        f"row {row} has a document that starts at token {token}; {layer.layer} needs documents that start at multiples "
        f"of {layer.grid} tokens{landmarks} from the start of the row's first document: pad documents to these "
        "multiples, or pack one document per row (the task Text has the option `grid`)"
    )


def _excess(prefix_size: int, layer: LayerLimits) -> str:
    """Return the end of a message about rows with too many prefix tokens."""
    return (
        f"{prefix_size} prefix tokens; {layer.layer} reads at most {layer.prefix_limit}: shorten the prefix, or "
        "increase max_prefix_len"
    )
