"""Language modelling as a task: next-token prediction in rows of packed documents."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt64

from recallax.config import ConfigError, require_at_least
from recallax.tasks.base import SPLITS, Split, Task
from recallax.tasks.encoder import Encoder
from recallax.tasks.text.packing import num_rows, pack_rows
from recallax.tasks.text.permutation import permute_index, splitmix64
from recallax.tasks.text.recall_tokens import recall_mask
from recallax.tasks.text.shakespeare import Shakespeare
from recallax.tasks.text.source import TextSource
from recallax.tasks.text.tokenized_corpus import TokenizedCorpus, load_tokenized_corpus
from recallax.tasks.text.tokenizer import Bytes, Tokenizer
from recallax.types import Batch

GROUPS = ("other", "recall")
"""Groups of targets; `recall_tokens.py` defines recall tokens."""
MAX_EXPONENT = 700.0
"""Largest loss in nats whose perplexity is a finite float64."""


@dataclass(frozen=True, kw_only=True)
class Text(Task):
    """Language modelling on packed documents; no state and no attention crosses a document boundary.

    Row i contains `length` tokens of the stream, from token i * (length - grid) on. Consecutive rows overlap by `grid`
    tokens, and each token except a document's first is a target exactly once per epoch. A document that is cut at the
    start of a row starts there at position 0, without state from the row before. Each epoch has its own random order of
    the rows, computed from the seed and the number of the epoch. Valid and test have the same order for every seed, and
    their rows after the first epoch have weight 0.
    """

    source: TextSource = Shakespeare()
    """Source of the documents."""
    tokenizer: Tokenizer = Bytes()
    """Conversion of text to token ids."""
    length: int = 256
    """Row length in tokens."""
    grid: int = 1
    """Documents start at multiples of it, for mixers that work in blocks; it must divide `length`."""
    ngram_size: int = 2
    """Length n of the n-grams that define recall tokens (2 in Zoology)."""
    max_ngram_count: int = 1250
    """Largest number of occurrences in the train split of an n-gram whose repeats count as recall (1250 in Zoology)."""

    def __post_init__(self) -> None:
        if self.grid < 1 or self.length % self.grid or self.length < max(4, 2 * self.grid):
            raise ConfigError(
                f"Text.length is {self.length} and grid {self.grid}; length must be a multiple of grid, at least "
                "2 grid, and at least 4"
            )
        if self.ngram_size < 1 or self.tokenizer.vocab_size**self.ngram_size >= 2**63:
            raise ConfigError(
                f"Text.ngram_size is {self.ngram_size} with {self.tokenizer.vocab_size} token ids; it must be from 1 "
                f"to {math.floor(63 / math.log2(self.tokenizer.vocab_size))}, so that an n-gram fits in 63 bits"
            )
        require_at_least(0, "Text.", max_ngram_count=self.max_ngram_count)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def groups(self) -> tuple[str, ...]:
        return GROUPS

    @property
    def document_grid(self) -> int | None:
        """None with a grid of 1: a corpus of one document per split suits mixers that work in blocks."""
        return self.grid if self.grid > 1 else None

    @property
    def encoder(self) -> Encoder:
        return self.tokenizer.load()

    def tokenized_corpus(self) -> TokenizedCorpus:
        """Return the tokenized corpus, and create it if it is not in the cache.

        Returns:
            The corpus.

        Raises:
            ConfigError: The source or the tokenizer is missing, or a split is shorter than a row.
        """
        corpus = load_tokenized_corpus(self.source, self.tokenizer, self.grid)
        for split in SPLITS:
            slots, documents = len(corpus.streams[split].tokens), len(corpus.streams[split].starts)
            if slots < self.length:
                raise ConfigError(
                    f"Text.length is {self.length} and the {split} split has {slots} tokens in {documents} documents; "
                    "a row must not be longer: reduce length, or add text"
                )
        return corpus

    def data_digest(self) -> str:
        return self.tokenized_corpus().digest

    def lengths(self, split: Split) -> tuple[int, ...]:
        return (self.length,)

    def max_targets(self, split: Split, length: int) -> int:
        # The exact bound is length - 1, but logits at all positions cost less than selecting all but one.
        return length

    def num_rows(self, split: Split) -> int:
        """Count the rows of a split.

        Args:
            split: Name of the split.

        Returns:
            The number of rows of one epoch.
        """
        return num_rows(self.tokenized_corpus().streams[split], self.length, self.grid)

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        if seed < 0 or index < 0:
            raise ValueError(f"seed is {seed} and index is {index}; both must be at least 0")
        corpus = self.tokenized_corpus()
        stream = corpus.streams[split]
        count = num_rows(stream, self.length, self.grid)
        epoch, first = divmod(index * size, count)  # Python integers, which do not overflow
        order = first + np.arange(size)
        epochs = np.array([(epoch + i) % 2**64 for i in range(size // count + 2)], np.uint64)[order // count]
        keys = _permutation_keys(seed if split == "train" else 0, split, epochs)
        batch = pack_rows(stream, permute_index(order % count, count, keys), self.length, self.grid)
        frequent = corpus.frequent_ngrams(self.ngram_size, self.max_ngram_count)
        tokens, segments = np.asarray(batch.tokens), np.asarray(batch.seq.segment_ids)
        group = np.zeros_like(tokens)
        group[:, :-1] = recall_mask(tokens, segments, self.ngram_size, self.vocab_size, frequent)[:, 1:]
        is_repeated = (epochs > 0) & (split != "train")
        return batch._replace(weights=np.where(is_repeated[:, None], 0, batch.weights).astype(np.float32), group=group)

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Return the next token of the row, which is the target at every labelled position."""
        answers = np.zeros_like(tokens)
        answers[:, :-1] = tokens[:, 1:]
        return answers

    def chance(self) -> float:
        """Compute the accuracy of the most frequent token of the train split."""
        train, test = (self.tokenized_corpus().streams[split].counts for split in ("train", "test"))
        return float(test[np.argmax(train)] / test.sum())

    def metrics(
        self, split: Split, loss: Float[np.ndarray, " groups"], weight: Float[np.ndarray, " groups"]
    ) -> Mapping[str, float]:
        """Compute perplexities, the share of recall tokens, and bits per UTF-8 byte.

        Bits per byte are those per token times the tokens per byte of the whole split.
        """
        stream = self.tokenized_corpus().streams[split]
        mean = loss.sum() / weight.sum()
        metrics = {
            "perplexity": _perplexity(mean),
            "bits_per_byte": float(mean / math.log(2) * stream.counts.sum() / stream.text_bytes),
            "share/recall": float(weight[GROUPS.index("recall")] / weight.sum()),
        }
        groups = zip(GROUPS, loss, weight, strict=True)
        return metrics | {f"perplexity/{name}": _perplexity(total / w) for name, total, w in groups if w > 0}


def _permutation_keys(seed: int, split: Split, epochs: UInt64[np.ndarray, " B"]) -> UInt64[np.ndarray, " B"]:
    """Key of the row order of each epoch."""
    domain = np.full(len(epochs), seed % 2**64, np.uint64)
    return splitmix64(splitmix64(splitmix64(domain) + np.uint64(SPLITS.index(split))) + epochs)


def _perplexity(loss: float) -> float:
    return float(np.exp(min(loss, MAX_EXPONENT)))
