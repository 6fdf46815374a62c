"""Tokenizers: UTF-8 bytes, or a file of the `tokenizers` or `sentencepiece` library."""

import abc
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from recallax.config import Config, ConfigError
from recallax.tasks.encoder import Encoder
from recallax.tasks.text.optional_imports import import_optional

END_OF_TEXT = "<|endoftext|>"
"""GPT-2's token between documents."""


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
    """Number of ids that the file must have, so that the model's size does not depend on the file."""
    eos_token: str = END_OF_TEXT
    """The token of the file that begins and ends documents."""

    def load(self) -> Encoder:
        return _load_cached(_BPEEncoder, self, _file_stamp(self.file))


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


class _BPEEncoder(Encoder):
    def __init__(self, config: BPE):
        tokenizers = import_optional("tokenizers", "text", "a BPE tokenizer")
        data = Path(config.file).read_bytes()
        try:
            self._model = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{config.file} is not a file of the tokenizers library: {error}") from error
        _check_vocab_size(config, self._model.get_vocab_size(with_added_tokens=True))
        eos_id = self._model.token_to_id(config.eos_token)
        if eos_id is None:
            raise ConfigError(
                f"{config.file} has no token {config.eos_token!r} to begin and end documents; "
                "set task.tokenizer.eos_token to a token of the file"
            )
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True  # encode the spelling of a special token as text
        self.bos_id = self.eos_id = eos_id
        self.digest = f"bpe {hashlib.sha256(data).hexdigest()} {config.eos_token}"

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([i for i in ids if i < self._model.get_vocab_size()], skip_special_tokens=True)


class _SentencePieceEncoder(Encoder):
    def __init__(self, config: SentencePiece):
        sentencepiece = import_optional("sentencepiece", "text", "a SentencePiece tokenizer")
        data = Path(config.file).read_bytes()
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
    model.save(str(file))
    return model.get_vocab_size()


def _file_stamp(file: str) -> tuple[int, int]:
    try:
        status = Path(file).stat()
    except OSError as error:
        raise ConfigError(
            f"task.tokenizer.file is {file!r}, which cannot be read ({error.strerror}); use an existing file"
        ) from error
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=4)
def _load_cached(kind: Any, config: Tokenizer, stamp: tuple[int, int]) -> Encoder:
    return kind(config)


def _check_vocab_size(config: BPE | SentencePiece, actual: int) -> None:
    if config.vocab_size != actual:
        raise ConfigError(
            f"task.tokenizer.vocab_size is {config.vocab_size} and {config.file} has {actual} ids; they must be "
            f"equal: set it to {actual} and model.vocab_size to at least that, or use the model's own file"
        )
