# pyright: strict
"""The encoder of `BPE`: a `tokenizer.json` file of the `tokenizers` library, whose model may be of any kind."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int

from recallax.config import ConfigError
from recallax.external_file import short_repr
from recallax.tasks.encoder import Encoder
from recallax.tasks.text.optional_imports import import_optional

NO_UNKNOWN_TOKEN = "\uffff no unknown token"
"""Name of an unknown token that no vocabulary has. With it the library raises an error for an unknown character, which
it otherwise drops."""


class BPEEncoder(Encoder):
    """A tokenizer of the `tokenizers` library.

    Args:
        file: Path of the file, for error messages.
        data: Content of the file.
        eos_token: The token of the file that begins and ends documents.

    Raises:
        ConfigError: The library is missing, the file is not one of its files, or has no such token.
    """

    def __init__(self, file: str, data: bytes, eos_token: str):
        self._tokenizers = import_optional("tokenizers", "text", "a BPE tokenizer")
        self._file, self._data, self._eos_token = file, data, eos_token
        self._model = self._load_model()
        self._num_ids = 1 + max(self._model.get_vocab(with_added_tokens=True).values())
        self.bos_id = self.eos_id = self._model.token_to_id(eos_token)
        self.digest = f"bpe {hashlib.sha256(data).hexdigest()} {eos_token}"

    @property
    def num_ids(self) -> int:
        """The largest id + 1; smaller ids may be unused."""
        return self._num_ids

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
        encoded = self._encode(self._model, texts)
        for i in [i for i, ids in enumerate(encoded) if self.eos_id in ids]:
            encoded[i] = self._encode(self._split_model, [texts[i]])[0]
            if self.eos_id in encoded[i]:
                raise ConfigError(
                    f"{self._file} encodes a part of the document {short_repr(texts[i])} as {self._eos_token!r}, which "
                    "ends documents; set task.tokenizer.eos_token to a token that does not stand for text"
                )
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids if 0 <= i < self.num_ids], skip_special_tokens=True)

    def _load_model(self) -> Any:
        try:
            model = self._tokenizers.Tokenizer.from_str(self._data.decode())
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{self._file} is not a file of the tokenizers library: {error}") from error
        if model.token_to_id(self._eos_token) is None:
            raise ConfigError(
                f"{self._file} has no token {self._eos_token!r} to begin and end documents; "
                "set task.tokenizer.eos_token to a token of the file"
            )
        model.no_padding()
        model.no_truncation()
        # The spelling of a special token is encoded as text. The end of documents is special, whatever the file states.
        model.encode_special_tokens = True
        model.add_special_tokens([self._eos_token])
        if isinstance(model.model, self._tokenizers.models.BPE) and model.model.unk_token in (None, self._eos_token):
            model.model.unk_token = NO_UNKNOWN_TOKEN
        return model

    @cached_property
    def _split_model(self) -> Any:
        """The model with pieces that are cut after the first character of `eos_token`, so that no piece contains it."""
        model, pre_tokenizers = self._load_model(), self._tokenizers.pre_tokenizers
        first, rest = (re.escape(part) for part in (self._eos_token[:1], self._eos_token[1:]))
        cut = pre_tokenizers.Split(self._tokenizers.Regex(f"{first}(?={rest})"), "merged_with_previous")
        model.pre_tokenizer = pre_tokenizers.Sequence([*filter(None, [model.pre_tokenizer]), cut])
        return model

    def _encode(self, model: Any, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
        try:
            encodings = model.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise self._unknown_text(model, texts, error) from error
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def _unknown_text(self, model: Any, texts: Sequence[str], error: Exception) -> ConfigError:
        """Return an error that names the first character that has no id, or the first word of a model of words."""
        text = next(self._failing(model, texts), "")
        models = self._tokenizers.models
        by_character = isinstance(model.model, models.BPE | models.Unigram)
        part = next(self._failing(model, text if by_character else text.split()), None)
        reason = f"has no id for {part!r}, and no unknown token" if part else f"cannot encode it ({error})"
        return ConfigError(
            f"{self._file} {reason}, in the document {short_repr(text)}; use a tokenizer with all bytes or with an "
            "unknown token, or change the text"
        )

    def _failing(self, model: Any, texts: Iterable[str]) -> Iterator[str]:
        """Yield the texts that the library cannot encode."""
        for text in texts:
            try:
                model.encode(text, add_special_tokens=False)
            except Exception:  # the library raises bare Exception
                yield text
