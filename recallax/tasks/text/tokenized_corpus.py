"""A tokenized corpus: one memory-mapped stream of token ids per split, which gives rows with random access.

It is created once per corpus, tokenizer and grid, in a cache folder named by their digests. Checksums of the files
are verified when it is opened:

    meta.json  <split>.tokens (uint16 or uint32)  <split>.starts.npy  <split>.ends.npy  <split>.counts.npy  sha256.json

A document is `bos_id`, its ids and `eos_id`. It starts at a multiple of the grid, and more `eos_id` fill the space to
the next document.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from recallax.tasks.base import SPLITS, Split
from recallax.tasks.encoder import Encoder
from recallax.tasks.text.cache_folder import cache_root, cached_folder
from recallax.tasks.text.recall_tokens import frequent_ngrams
from recallax.tasks.text.source import Corpus, TextSource
from recallax.tasks.text.tokenizer import Tokenizer

FORMAT_VERSION = 1
"""Version of the files, part of the digest."""
DOCUMENTS_PER_BATCH = 1024
"""Documents that are encoded in one call, in which a tokenizer may use all cores."""


class TokenStream(NamedTuple):
    """The concatenated documents of one split."""

    tokens: Integer[np.ndarray, " S"]
    """Token ids, memory-mapped."""
    starts: Int[np.ndarray, " D"]
    """First index of each document in `tokens`."""
    ends: Int[np.ndarray, " D"]
    """Last index + 1 of each document, without its fill."""
    counts: Int[np.ndarray, " V"]
    """Number of times that each id is a target; all tokens but each document's first are."""
    text_bytes: int
    """Size of the documents in UTF-8 bytes."""


class TokenizedCorpus(NamedTuple):
    """The streams of all splits."""

    folder: Path
    """Cache folder of the streams."""
    digest: str
    """Equal for equal streams."""
    vocab_size: int
    """Number of token ids."""
    streams: dict[Split, TokenStream]
    """The stream of each split."""

    def frequent_ngrams(self, n: int, max_count: int) -> Int[np.ndarray, " F"]:
        """Find the frequent n-grams of the train split; the result is cached on disk.

        Args:
            n: Length of the n-grams.
            max_count: Largest count that is not frequent.

        Returns:
            The numbers of the n-grams that occur more than `max_count` times, sorted (see `recall_tokens.ngram_ids`).
        """
        train = self.streams["train"]

        def write(folder: Path) -> None:
            np.save(folder / "ngrams.npy", frequent_ngrams(train.tokens, train.starts, n, self.vocab_size, max_count))

        return _load_ngrams(cached_folder(f"frequent/{self.digest}-{n}-{max_count}", write))


def load_tokenized_corpus(source: TextSource, tokenizer: Tokenizer, grid: int) -> TokenizedCorpus:
    """Load a tokenized corpus, and create it if it is not in the cache.

    Args:
        source: Source of the documents.
        tokenizer: Conversion of text to token ids.
        grid: Documents start at multiples of it.

    Returns:
        The corpus, memory-mapped.

    Raises:
        ConfigError: The source or the tokenizer is missing, or the cache is damaged or cannot be written.
    """
    return _load_tokenized_corpus(source, tokenizer, grid, cache_root())


@lru_cache(maxsize=8)
def _load_tokenized_corpus(source: TextSource, tokenizer: Tokenizer, grid: int, root: Path) -> TokenizedCorpus:
    corpus, encoder = source.open(), tokenizer.load()
    parts = (FORMAT_VERSION, corpus.digest, encoder.digest, encoder.bos_id, encoder.eos_id, tokenizer.vocab_size, grid)
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    folder = cached_folder(f"tokens/{digest}", partial(_write_streams, corpus, encoder, tokenizer.vocab_size, grid))
    return TokenizedCorpus(
        folder, digest, tokenizer.vocab_size, {split: _read_stream(folder, split) for split in SPLITS}
    )


@lru_cache(maxsize=8)
def _load_ngrams(folder: Path) -> Int[np.ndarray, " F"]:
    return np.load(folder / "ngrams.npy")


def _token_dtype(vocab: int) -> np.dtype:
    return np.dtype("<u2" if vocab <= 2**16 else "<u4")


def _write_streams(corpus: Corpus, encoder: Encoder, vocab: int, grid: int, folder: Path) -> None:
    meta = {}
    for split, documents in corpus.documents.items():
        sizes, counts, text_bytes = [], np.zeros(vocab, np.int64), 0
        with open(folder / f"{split}.tokens", "wb") as file:
            for texts in _batched_documents(documents):
                text_bytes += sum(len(text.encode()) for text in texts)
                for ids in encoder.encode(texts):
                    if not len(ids):
                        continue
                    fill = [encoder.eos_id] * (-(len(ids) + 2) % grid)
                    np.concatenate([[encoder.bos_id], ids, [encoder.eos_id], fill]).astype(_token_dtype(vocab)).tofile(
                        file
                    )
                    sizes.append(len(ids) + 2)
                    counts += np.bincount(ids, minlength=vocab)
        counts[encoder.eos_id] += len(sizes)
        size = np.array(sizes, np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(-(-size // grid) * grid)])
        for name, array in {"starts": starts[:-1], "ends": starts[:-1] + size, "counts": counts}.items():
            np.save(folder / f"{split}.{name}.npy", array)
        meta[split] = {"slots": int(starts[-1]), "documents": len(sizes), "text_bytes": text_bytes, "vocab": vocab}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def _batched_documents(documents: Iterable[str]) -> Iterable[list[str]]:
    return map(list, itertools.batched(documents, DOCUMENTS_PER_BATCH))


def _read_stream(folder: Path, split: Split) -> TokenStream:
    meta = json.loads((folder / "meta.json").read_text())[split]
    starts, ends, counts = (
        np.load(folder / f"{split}.{name}.npy", mmap_mode="r") for name in ("starts", "ends", "counts")
    )
    dtype = _token_dtype(meta["vocab"])
    tokens = np.memmap(folder / f"{split}.tokens", dtype, mode="r") if meta["slots"] else np.zeros(0, dtype)
    return TokenStream(tokens, starts, ends, counts, meta["text_bytes"])
