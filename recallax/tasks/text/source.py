"""Text sources: documents of three splits and a digest of their content."""

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
    """The texts of one split, in a fixed order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[str]: ...


class Corpus(NamedTuple):
    """The documents of an opened source."""

    digest: str
    """Equal for equal documents."""
    documents: Mapping[Split, DocumentSequence]
    """The texts of each split."""


class TextSource(Config, abc.ABC):
    """A source of documents. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def open(self) -> Corpus:
        """Open the corpus.

        Returns:
            The documents of all splits.

        Raises:
            ConfigError: The corpus is missing or does not fit the config.
        """

    def prepare(self) -> None:
        """Download or convert what `open` needs; does nothing by default.

        Raises:
            ConfigError: The corpus cannot be prepared.
        """
        return


class HeldOutFractions(NamedTuple):
    """Fractions of the documents in the held-out splits."""

    valid: float
    test: float


BYTE_ORDER_MARK = "\ufeff"
"""U+FEFF, which some programs write at the start of a file."""


def split_by_content(digests: Int[np.ndarray, " D"], held_out: HeldOutFractions) -> Int[np.ndarray, " D"]:
    """Assign documents to splits by their content, so that copies of a document are in one split.

    In the order of their digests the first documents are the test split and the next ones the valid split, at least one
    each.

    Args:
        digests: Digest of each document; see `content_digests`.
        held_out: Fractions of the different documents in valid and test.

    Returns:
        The split of each document, as an index into `SPLITS`.

    Raises:
        ConfigError: There are fewer than three different documents, or none remains for training.
    """
    different, inverse = np.unique(digests, return_inverse=True)
    fractions = {"test": held_out.test, "valid": held_out.valid}
    if not all(0 < fraction < 1 for fraction in held_out) or sum(held_out) >= 1:
        raise ConfigError(
            f"the fractions of valid and test documents are {tuple(held_out)}; they must be above 0 with a sum below 1"
        )
    counts = {name: max(1, math.floor(fraction * len(different))) for name, fraction in fractions.items()}
    if sum(counts.values()) >= len(different):
        raise ConfigError(
            f"the corpus has {len(different)} different documents; train, valid and test need at least one each: add "
            "documents, or set task.source.document_unit to paragraph or line"
        )
    split = np.full(len(different), SPLITS.index("train"))
    split[: counts["test"] + counts["valid"]] = SPLITS.index("valid")
    split[: counts["test"]] = SPLITS.index("test")
    return split[inverse]


def document_digest(text: str) -> int:
    """Hash a document.

    Args:
        text: The document.

    Returns:
        A non-negative integer of 63 bits.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def content_digests(texts: Iterable[str]) -> Int[np.ndarray, " D"]:
    """Hash documents so that those which differ only in white space or byte-order marks have one digest.

    Args:
        texts: The documents; they are read once.

    Returns:
        The smallest `document_digest` of the documents that are equal to each without white space and marks. So it is
        that of the document itself unless another document is equal in this sense.
    """
    pairs = [(document_digest(text), document_digest(_without_space(text))) for text in texts]
    own, content = np.array(pairs, np.int64).reshape(-1, 2).T
    different, group = np.unique(content, return_inverse=True)
    smallest = np.full(len(different), np.iinfo(np.int64).max)
    np.minimum.at(smallest, group, own)
    return smallest[group]


def _without_space(text: str) -> str:
    return "".join(text.replace(BYTE_ORDER_MARK, " ").split())


@dataclass(frozen=True)
class InMemoryDocuments:
    """The texts of one split, in memory."""

    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)


def in_memory_corpus(texts: Iterable[str], held_out: HeldOutFractions) -> Corpus:
    """Make a corpus of documents in memory, split by their content.

    Args:
        texts: All documents.
        held_out: Fractions of the documents in valid and test.

    Returns:
        The corpus.

    Raises:
        ConfigError: There are too few different documents; see `split_by_content`.
    """
    texts = list(texts)
    split = split_by_content(content_digests(texts), held_out)
    documents: dict[Split, DocumentSequence] = {
        name: InMemoryDocuments([text for text, s in zip(texts, split, strict=True) if s == i])
        for i, name in enumerate(SPLITS)
    }
    digest = hashlib.sha256(repr((held_out, texts)).encode()).hexdigest()
    return Corpus(digest, documents)
