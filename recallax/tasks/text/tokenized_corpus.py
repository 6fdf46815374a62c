"""A corpus as one stream of token ids per split, on disk and memory-mapped: what makes packing random access.

Made once per corpus, tokenizer and grid, in the cache folder that their digests name, and checked for size when opened:

    meta.json  <split>.tokens (uint16 or uint32)  <split>.starts.npy  <split>.ends.npy  <split>.counts.npy

A document is `begin`, its ids, `end`; it starts at a multiple of the grid, and `end` fills up to the next.
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

from recallax.config import ConfigError
from recallax.tasks.base import SPLITS, Split
from recallax.tasks.encoder import Encoder
from recallax.tasks.text.cache_folder import cache_root, cached_folder
from recallax.tasks.text.recall_tokens import frequent_ngrams
from recallax.tasks.text.source import Corpus, TextSource
from recallax.tasks.text.tokenizer import Tokenizer

FORMAT_VERSION = 1
DOCUMENTS_PER_BATCH = 1024
"""Documents that are encoded at a time: a tokenizer may use all cores on them."""


class TokenStream(NamedTuple):
    """The documents of one split, one after another."""

    tokens: Integer[np.ndarray, " S"]
    """On disk."""
    starts: Int[np.ndarray, " D"]
    """Where documents begin, in `tokens`."""
    ends: Int[np.ndarray, " D"]
    """Where they end: behind their last id that is no filling."""
    counts: Int[np.ndarray, " V"]
    """How often each id is to be predicted: all but each document's first."""
    text_bytes: int
    """UTF-8 bytes of the documents."""


class TokenizedCorpus(NamedTuple):
    """A tokenized corpus."""

    folder: Path
    digest: str
    """Equal where all tokens are."""
    vocab_size: int
    streams: dict[Split, TokenStream]

    def frequent_ngrams(self, n: int, max_count: int) -> Int[np.ndarray, " F"]:
        """`frequent_ngrams` of the train split; made once, and kept beside the streams."""
        train = self.streams["train"]

        def make(folder: Path) -> None:
            np.save(folder / "ngrams.npy", frequent_ngrams(train.tokens, train.starts, n, self.vocab_size, max_count))

        return _load_ngrams(cached_folder(f"frequent/{self.digest}-{n}-{max_count}", make))


def load_tokenized_corpus(source: TextSource, tokenizer: Tokenizer, grid: int) -> TokenizedCorpus:
    """The tokens of a corpus, made if they are not in the cache. Raises ConfigError."""
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
        places = np.concatenate([np.zeros(1, np.int64), np.cumsum(-(-size // grid) * grid)])
        for name, array in {"starts": places[:-1], "ends": places[:-1] + size, "counts": counts}.items():
            np.save(folder / f"{split}.{name}.npy", array)
        meta[split] = {"slots": int(places[-1]), "documents": len(sizes), "text_bytes": text_bytes, "vocab": vocab}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def _batched_documents(documents: Iterable[str]) -> Iterable[list[str]]:
    return map(list, itertools.batched(documents, DOCUMENTS_PER_BATCH))


def _read_stream(folder: Path, split: Split) -> TokenStream:
    try:
        meta = json.loads((folder / "meta.json").read_text())[split]
        starts, ends, counts = (
            np.load(folder / f"{split}.{name}.npy", mmap_mode="r") for name in ("starts", "ends", "counts")
        )
        path, dtype = folder / f"{split}.tokens", _token_dtype(meta["vocab"])
        sizes = (path.stat().st_size, len(starts), len(ends), len(counts))
        wanted = (meta["slots"] * dtype.itemsize, meta["documents"], meta["documents"], meta["vocab"])
        if sizes != wanted:
            raise ValueError(f"sizes of {split} are {sizes}, and should be {wanted}")
        tokens = np.memmap(path, dtype, mode="r") if meta["slots"] else np.zeros(0, dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder} is damaged ({error}); delete it, and it is made again") from error
    return TokenStream(tokens, starts, ends, counts, meta["text_bytes"])
