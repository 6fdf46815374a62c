"""From text to token ids and back: bytes, or a file of the `tokenizers` or of the `sentencepiece` library."""

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
"""GPT-2's name for what stands between documents."""


class Tokenizer(Config, abc.ABC):
    """Which ids text becomes. Subclasses are frozen dataclasses."""

    vocab_size: int
    """Every id is below it (a field that the file is held to, or a property)."""

    @abc.abstractmethod
    def load(self) -> Encoder:
        """Raises ConfigError where a library or a file is missing, or the file is not what the config says."""


@dataclass(frozen=True, kw_only=True)
class Bytes(Tokenizer):
    """UTF-8's bytes, and id 256 before and behind each document."""

    @property
    def vocab_size(self) -> int:
        return 257

    def load(self) -> Encoder:
        return _ByteEncoder()


@dataclass(frozen=True, kw_only=True)
class BPE(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library; `recallax tokenizer` trains one."""

    file: str
    vocab_size: int
    """Ids that the file must have, so that the model's size does not depend on a file."""
    eos_token: str = END_OF_TEXT
    """The file's token that begins and ends documents."""

    def load(self) -> Encoder:
        return _load_cached(_BPEEncoder, self, _file_stamp(self.file))


@dataclass(frozen=True, kw_only=True)
class SentencePiece(Tokenizer):
    """A model file of the `sentencepiece` library; its BOS (or else its EOS) begins a document and its EOS ends it."""

    file: str
    vocab_size: int
    """Ids that the file must have, so that the model's size does not depend on a file."""

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
        boundary = self._model.token_to_id(config.eos_token)
        if boundary is None:
            raise ConfigError(
                f"{config.file} has no token {config.eos_token!r}, which would begin and end documents; "
                "name one that it has as task.tokenizer.boundary"
            )
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True  # a text that spells a special token is text
        self.bos_id = self.eos_id = boundary
        self.digest = f"bpe {hashlib.sha256(data).hexdigest()} {config.eos_token}"

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
        found = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int64) for one in found]

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
            raise ConfigError(f"{config.file} has no EOS, which ends documents; train it with one")
        self.bos_id = self.eos_id if self.bos_id < 0 else self.bos_id
        self.digest = f"sentencepiece {hashlib.sha256(data).hexdigest()}"

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
        return [np.array(ids, np.int64) for ids in self._model.encode(list(texts), out_type=int)]

    def decode(self, ids: Sequence[int]) -> str:
        size = self._model.vocab_size()
        known = [int(i) for i in ids if 0 <= i < size and not self._model.is_control(int(i))]
        return self._model.decode(known)


def train_bpe(texts: Iterable[str], vocab_size: int, file: Path) -> int:
    """Write a byte-level BPE of at most that many ids, `END_OF_TEXT` among them, as `BPE` reads it. The 256 bytes are
    always among them, so that any text can be encoded. Returns the number of ids; raises ConfigError."""
    if vocab_size < 257:
        raise ConfigError(f"vocab_size is {vocab_size}; it must be at least 257, for the 256 bytes and the boundary")
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
        found = Path(file).stat()
    except OSError as error:
        raise ConfigError(
            f"task.tokenizer.file is {file!r}, which cannot be read ({error.strerror}); name a file that is there"
        ) from error
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=4)
def _load_cached(kind: Any, config: Tokenizer, stamp: tuple[int, int]) -> Encoder:
    return kind(config)


def _check_vocab_size(config: BPE | SentencePiece, actual: int) -> None:
    if config.vocab_size != actual:
        raise ConfigError(
            f"task.tokenizer.vocab_size is {config.vocab_size} and {config.file} has {actual} ids; the two must be "
            f"equal: set it to {actual}, and model.vocab_size to at least that, or name the file that the model is for"
        )
