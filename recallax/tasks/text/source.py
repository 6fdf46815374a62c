"""Where text comes from: documents of three splits, and a digest of what they say."""

import abc
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from recallax.config import Config, ConfigError
from recallax.tasks.base import SPLITS, Split


class DocumentSequence(Protocol):
    """The texts of one split, in an order that never changes."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[str]: ...


class Corpus(NamedTuple):
    """A source that was found."""

    digest: str
    """Equal where the documents are."""
    documents: Mapping[Split, DocumentSequence]


class TextSource(Config, abc.ABC):
    """Which documents. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def open(self) -> Corpus:
        """Raises ConfigError where there is no such corpus, or it is not as the config says."""

    def prepare(self) -> None:
        """Fetch what `open` needs from elsewhere, if anything. Raises ConfigError."""
        return


class HeldOutFractions(NamedTuple):
    """Which share of the documents is held out."""

    valid: float
    test: float


def split_by_content(digests: Int[np.ndarray, " D"], held_out: HeldOutFractions) -> Int[np.ndarray, " D"]:
    """The split of each document, as an index into `SPLITS`: disjoint by what documents say, so also where one of them
    stands twice. In the order of their digests the first are test, the next valid; at least one each.

    Raises ConfigError where there are fewer than three different documents, or nothing is left to train on.
    """
    different, where = np.unique(digests, return_inverse=True)
    sizes = {"test": held_out.test, "valid": held_out.valid}
    if not all(0 < share < 1 for share in held_out) or sum(held_out) >= 1:
        raise ConfigError(
            f"shares of valid and test documents are {tuple(held_out)}; they must be above 0, and sum to below 1"
        )
    counts = {name: max(1, math.floor(share * len(different))) for name, share in sizes.items()}
    if sum(counts.values()) >= len(different):
        raise ConfigError(
            f"the corpus has {len(different)} different documents; train, valid and test need at least one each: give "
            "more, or let task.source.documents cut files into paragraphs or lines"
        )
    split = np.full(len(different), SPLITS.index("train"))
    split[: counts["test"] + counts["valid"]] = SPLITS.index("valid")
    split[: counts["test"]] = SPLITS.index("test")
    return split[where]


def document_digest(text: str) -> int:
    """63 bits of what a document says."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class InMemoryDocuments:
    """Documents in memory."""

    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)


def in_memory_corpus(texts: Iterable[str], held_out: HeldOutFractions) -> Corpus:
    """Documents in memory, split by what they say."""
    texts = list(texts)
    split = split_by_content(np.array([document_digest(text) for text in texts], np.int64), held_out)
    documents: dict[Split, DocumentSequence] = {
        name: InMemoryDocuments([text for text, s in zip(texts, split, strict=True) if s == i])
        for i, name in enumerate(SPLITS)
    }
    whole = hashlib.sha256(repr((held_out, texts)).encode()).hexdigest()
    return Corpus(whole, documents)
