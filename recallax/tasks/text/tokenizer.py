"""Tokenizers: UTF-8 bytes, or a file of the `tokenizers` or `sentencepiece` library."""

import abc
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from recallax.atomic_files import write_atomic
from recallax.config import Config, ConfigError
from recallax.external_file import read_regular_file
from recallax.tasks.encoder import Encoder
from recallax.tasks.text.bpe_encoder import BPEEncoder
from recallax.tasks.text.optional_imports import import_optional

END_OF_TEXT = "<|endoftext|>"
"""GPT-2's token between documents."""
MAX_FILE_BYTES = 2**30
"""Size of a tokenizer's file; the largest published ones have some tens of megabytes."""


class Tokenizer(Config, abc.ABC):
    """A tokenizer's config. Subclasses are frozen dataclasses."""

    vocab_size: int
    """Number of token ids; a field that the file must match, or a property."""

    @abc.abstractmethod
    def load(self) -> Encoder:
        """Load the tokenizer.

        Returns:
            The encoder.

        Raises:
            ConfigError: A library or a file is missing, or the file does not match the config.
        """


@dataclass(frozen=True, kw_only=True)
class Bytes(Tokenizer):
    """UTF-8 bytes, with id 256 before and after each document."""

    @property
    def vocab_size(self) -> int:
        return 257

    def load(self) -> Encoder:
        return _ByteEncoder()


@dataclass(frozen=True, kw_only=True)
class BPE(Tokenizer):
    """A `tokenizer.json` file of the `tokenizers` library; `recallax tokenizer` trains one."""

    file: str
    """Path of the file."""
    vocab_size: int
    """The largest id of the file + 1, which is given so that the model's size does not depend on the file."""
    eos_token: str = END_OF_TEXT
    """The token of the file that begins and ends documents."""

    def load(self) -> Encoder:
        return _load_cached(_load_bpe, self, _file_stamp(self.file))


@dataclass(frozen=True, kw_only=True)
class SentencePiece(Tokenizer):
    """A model file of the `sentencepiece` library, whose BOS (or else EOS) begins a document and whose EOS ends it."""

    file: str
    """Path of the file."""
    vocab_size: int
    """Number of ids that the file must have, so that the model's size does not depend on the file."""

    def load(self) -> Encoder:
        return _load_cached(_SentencePieceEncoder, self, _file_stamp(self.file))


class _ByteEncoder(Encoder):
    bos_id = eos_id = 256
    digest = "bytes"

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class _SentencePieceEncoder(Encoder):
    def __init__(self, config: SentencePiece):
        sentencepiece = import_optional("sentencepiece", "text", "a SentencePiece tokenizer")
        data = _read_file(config.file)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except Exception as error:  # RuntimeError, OSError and others
            raise ConfigError(f"{config.file} is not a model of sentencepiece: {error}") from error
        _check_vocab_size(config, self._model.vocab_size())
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        if self.eos_id < 0:
            raise ConfigError(f"{config.file} has no EOS token to end documents; train it with one")
        self.bos_id = self.eos_id if self.bos_id < 0 else self.bos_id
        self.digest = f"sentencepiece {hashlib.sha256(data).hexdigest()}"

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
        return [np.array(ids, np.int64) for ids in self._model.encode(list(texts), out_type=int)]

    def decode(self, ids: Sequence[int]) -> str:
        size = self._model.vocab_size()
        known = [int(i) for i in ids if 0 <= i < size and not self._model.is_control(int(i))]
        return self._model.decode(known)


def _load_bpe(config: BPE) -> Encoder:
    encoder = BPEEncoder(config.file, _read_file(config.file), config.eos_token)
    _check_vocab_size(config, encoder.num_ids)
    return encoder


def train_bpe(texts: Iterable[str], vocab_size: int, file: Path) -> int:
    """Train a byte-level BPE tokenizer and write it to a file for `BPE`.

    All 256 bytes are tokens, so any text can be encoded, and `END_OF_TEXT` is a token too.

    Args:
        texts: Documents to train on.
        vocab_size: Largest number of token ids.
        file: The `tokenizer.json` to write.

    Returns:
        The number of token ids, which is below `vocab_size` if the texts have too few pairs to merge.

    Raises:
        ConfigError: `vocab_size` is below 257, or the `tokenizers` library is missing.
        OSError: The file cannot be written.
    """
    if vocab_size < 257:
        raise ConfigError(f"vocab_size is {vocab_size}; it must be at least 257, for the 256 bytes and {END_OF_TEXT}")
    tokenizers = import_optional("tokenizers", "text", "a BPE tokenizer")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, model.to_str(pretty=True))
    return model.get_vocab_size()


def _file_stamp(file: str) -> tuple[int, int]:
    try:
        status = Path(file).stat()
    except OSError as error:
        raise _unreadable(file, error) from error
    return status.st_size, status.st_mtime_ns


def _read_file(file: str) -> bytes:
    try:
        return read_regular_file(Path(file), MAX_FILE_BYTES)
    except OSError as error:
        raise _unreadable(file, error) from error
    except ValueError as error:
        raise ConfigError(f"task.tokenizer.file is {file!r}, but {error}; use the file of a tokenizer") from error


def _unreadable(file: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"task.tokenizer.file is {file!r}, which cannot be read ({error.strerror}); use an existing file"
    )


@lru_cache(maxsize=4)
def _load_cached(load: Callable[[Any], Encoder], config: Tokenizer, stamp: tuple[int, int]) -> Encoder:
    return load(config)


def _check_vocab_size(config: BPE | SentencePiece, actual: int) -> None:
    if config.vocab_size != actual:
        raise ConfigError(
            f"task.tokenizer.vocab_size is {config.vocab_size} and {config.file} has {actual} ids; they must be "
            f"equal: set it to {actual} and model.vocab_size to at least that, or use the model's own file"
        )
