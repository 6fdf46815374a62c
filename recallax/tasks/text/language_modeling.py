"""Text as a task: the next token, in rows that documents are packed into."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt64

from recallax.config import ConfigError
from recallax.tasks.base import SPLITS, Split, Task
from recallax.tasks.encoder import Encoder
from recallax.tasks.text.permutation import permute_index, splitmix64
from recallax.tasks.text.recall_tokens import recall_mask
from recallax.tasks.text.shakespeare import Shakespeare
from recallax.tasks.text.source import TextSource
from recallax.tasks.text.tokenized_corpus import TokenizedCorpus, TokenStream, load_tokenized_corpus
from recallax.tasks.text.tokenizer import Bytes, Tokenizer
from recallax.types import Batch, SeqInfo

GROUPS = ("other", "recall")


@dataclass(frozen=True, kw_only=True)
class Text(Task):
    """Language modelling. A row is `length` tokens of a split's stream of documents, which never see each other.

    Row i of a split starts at i (length - grid), so neighbours share one cell of the grid, and every token but each
    document's first is predicted in exactly one row. What a row cuts off a document's front counts from position 0, as
    nothing is carried over. One reading of a split takes its rows in a random order that is computed from the seed and
    the number of the reading; for valid and test it is the same with every seed, and what goes beyond one reading
    weighs nothing.
    """

    source: TextSource = Shakespeare()
    tokenizer: Tokenizer = Bytes()
    length: int = 256
    grid: int = 1
    """Documents begin at multiples of it, for mixers that work in blocks; it must divide `length`."""
    ngram_size: int = 2
    """Tokens of what must stand in the context before, for its last to be a recall token (2: Zoology's bigrams)."""
    max_ngram_count: int = 1250
    """Occurrences in training beyond which an n-gram counts as known by heart, and its last token under "other"."""

    def __post_init__(self) -> None:
        if self.grid < 1 or self.length % self.grid or self.length < max(4, 2 * self.grid):
            raise ConfigError(
                f"Text.length is {self.length} and grid {self.grid}; length must be a multiple of grid, at least twice "
                "as long, and at least 4"
            )
        if self.ngram_size < 1 or self.tokenizer.vocab_size**self.ngram_size >= 2**63:
            raise ConfigError(
                f"Text.ngram_size is {self.ngram_size} with {self.tokenizer.vocab_size} token ids; it must be from 1 to "
                f"{math.floor(63 / math.log2(self.tokenizer.vocab_size))}, so that n-grams can be told apart in 63 bits"
            )
        if self.max_ngram_count < 0:
            raise ConfigError(f"Text.max_ngram_count is {self.max_ngram_count}; it must be at least 0")

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def groups(self) -> tuple[str, ...]:
        return GROUPS

    @property
    def encoder(self) -> Encoder:
        return self.tokenizer.load()

    def tokenized_corpus(self) -> TokenizedCorpus:
        """The tokenized corpus, made if need be. Raises ConfigError where it is missing or shorter than a row."""
        found = load_tokenized_corpus(self.source, self.tokenizer, self.grid)
        for split in SPLITS:
            slots, documents = len(found.streams[split].tokens), len(found.streams[split].starts)
            if slots < self.length:
                raise ConfigError(
                    f"Text.length is {self.length} and the {split} split has {slots} tokens in {documents} documents; "
                    "a row may not be longer: shorten it, or give more text"
                )
        return found

    def data_digest(self) -> str:
        return self.tokenized_corpus().digest

    def lengths(self, split: Split) -> tuple[int, ...]:
        return (self.length,)

    def max_targets(self, split: Split, length: int) -> int:
        # One less in truth; but logits at all places cost less than picking all but one.
        return length

    def num_rows(self, split: Split) -> int:
        """Rows of one reading."""
        return _num_rows(self.tokenized_corpus().streams[split], self.length, self.grid)

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        if seed < 0 or index < 0:
            raise ValueError(f"seed is {seed} and index is {index}; both must be at least 0")
        corpus = self.tokenized_corpus()
        stream = corpus.streams[split]
        count = _num_rows(stream, self.length, self.grid)
        reading, place = divmod(index * size, count)  # of Python's numbers, which have no end
        places = place + np.arange(size)
        readings = np.array([(reading + more) % 2**64 for more in range(size // count + 2)], np.uint64)[places // count]
        keys = _permutation_keys(seed if split == "train" else 0, split, readings)
        batch = pack_rows(stream, permute_index(places % count, count, keys), self.length, self.grid)
        known = corpus.frequent_ngrams(self.ngram_size, self.max_ngram_count)
        tokens, segments = np.asarray(batch.tokens), np.asarray(batch.seq.segment_ids)
        group = np.zeros_like(tokens)
        group[:, :-1] = recall_mask(tokens, segments, self.ngram_size, self.vocab_size, known)[:, 1:]
        again = (readings > 0) & (split != "train")
        return batch._replace(weights=np.where(again[:, None], 0, batch.weights).astype(np.float32), group=group)

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """The token that follows in the row: what is labelled is followed by its target."""
        answers = np.zeros_like(tokens)
        answers[:, :-1] = tokens[:, 1:]
        return answers

    def chance(self) -> float:
        """Always the commonest token of the train split."""
        train, test = (self.tokenized_corpus().streams[split].counts for split in ("train", "test"))
        return float(test[np.argmax(train)] / test.sum())

    def metrics(
        self, split: Split, loss: Float[np.ndarray, " groups"], weight: Float[np.ndarray, " groups"]
    ) -> Mapping[str, float]:
        """Perplexities, and bits per UTF-8 byte of the text at the tokens per byte of the whole split."""
        stream = self.tokenized_corpus().streams[split]
        mean = loss.sum() / weight.sum()
        found = {
            "perplexity": _perplexity(mean),
            "bits_per_byte": float(mean / math.log(2) * stream.counts.sum() / stream.text_bytes),
            "share/recall": float(weight[GROUPS.index("recall")] / weight.sum()),
        }
        each = zip(GROUPS, loss, weight, strict=True)
        return found | {f"perplexity/{name}": _perplexity(total / w) for name, total, w in each if w > 0}


def pack_rows(stream: TokenStream, rows: Int[np.ndarray, " B"], length: int, grid: int) -> Batch:
    """Rows of a stream by number. Every label is of group 0."""
    first = rows * (length - grid)
    time = np.arange(length)
    at = first[:, None] + time
    real = at < len(stream.tokens)
    tokens = np.asarray(stream.tokens[np.minimum(at, len(stream.tokens) - 1)]).astype(np.int32) * real

    after, before = np.searchsorted(stream.starts, first, "right"), np.searchsorted(stream.starts, first + length)
    begun = np.zeros(real.shape, bool)
    row = np.repeat(np.arange(len(rows)), before - after)
    document = np.arange(len(row)) + np.repeat(after - np.cumsum(before - after) + before - after, before - after)
    begun[row, np.asarray(stream.starts[document]) - first[row]] = True

    segment = np.cumsum(begun, axis=1)
    ends = np.asarray(stream.ends[after[:, None] - 1 + segment])
    asked = at + 1 < ends
    asked[:, -1] = False
    asked[rows > 0, : grid - 1] = False  # the row before has asked them
    targets = np.zeros_like(tokens)
    targets[:, :-1] = tokens[:, 1:] * asked[:, :-1]
    seq = SeqInfo(
        (time - np.maximum.accumulate(np.where(begun, time, 0), axis=1)).astype(np.int32),
        ((segment + 1) * real).astype(np.int32),
        np.zeros(real.shape, bool),
    )
    return Batch(tokens, targets, asked.astype(np.float32), np.zeros_like(tokens), np.zeros_like(tokens), seq)


def _num_rows(stream: TokenStream, length: int, grid: int) -> int:
    return -(-(len(stream.tokens) - grid) // (length - grid))


def _permutation_keys(seed: int, split: Split, epochs: UInt64[np.ndarray, " B"]) -> UInt64[np.ndarray, " B"]:
    """A key for the order of each reading."""
    domain = np.full(len(epochs), seed % 2**64, np.uint64)
    return splitmix64(splitmix64(splitmix64(domain) + np.uint64(SPLITS.index(split))) + epochs)


def _perplexity(loss: float) -> float:
    return float(np.exp(min(loss, 700.0)))
