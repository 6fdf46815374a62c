"""Corpora of TensorFlow Datasets: array_record files, read with random access through grain, without TensorFlow."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from recallax.config import ConfigError
from recallax.tasks.base import SPLITS, Split
from recallax.tasks.text.optional_imports import import_optional
from recallax.tasks.text.source import Corpus, TextSource

FILE_FORMAT = "array_record"
"""The TFDS file format with random access."""
READ_THREADS, PREFETCH_BUFFER_SIZE = 8, 512
"""Threads that read documents, and documents that are read ahead of the tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Tfds(TextSource):
    """A TFDS corpus by name, prepared as array_record (`recallax corpus CONFIG --download` does this)."""

    name: str
    """TFDS name: `name`, `name/config` or `name/config:version`."""
    feature: str = "text"
    """The feature that contains the text."""
    train_split: str = "train"
    """Train split in TFDS's split language, such as `train[:98%]`. The three splits must not overlap."""
    valid_split: str = "validation"
    """Valid split in TFDS's split language."""
    test_split: str = "test"
    """Test split in TFDS's split language."""
    data_dir: str | None = None
    """Folder of the TFDS corpora; None is TFDS's default (`TFDS_DATA_DIR`, or ~/tensorflow_datasets)."""

    def open(self) -> Corpus:
        builder = self._load_builder()
        if not builder.is_prepared():
            raise ConfigError(
                f"the TFDS corpus {self.name} is not in {builder.data_path}; `recallax corpus CONFIG --download` "
                "prepares it, or set task.source.data_dir to its folder"
            )
        return corpus_from_builder(
            builder, {"train": self.train_split, "valid": self.valid_split, "test": self.test_split}, self.feature
        )

    def prepare(self) -> None:
        if self._load_builder().is_prepared():
            return
        try:
            self._load_builder(file_format=FILE_FORMAT).download_and_prepare()
        except Exception as error:  # downloads and the corpus's own code may raise anything
            raise ConfigError(f"the TFDS corpus {self.name} could not be prepared: {_first_line(error)}") from error

    def _load_builder(self, file_format: str | None = None) -> Any:
        tfds = import_tensorflow_datasets()
        try:
            return tfds.builder(self.name, data_dir=self.data_dir, file_format=file_format)
        except Exception as error:  # AssertionError, ValueError and others
            raise ConfigError(
                f"task.source.name is {self.name!r}, which TFDS does not have ({_first_line(error)}); "
                "use name, name/config or name/config:version, and set task.source.data_dir for a corpus of your own"
            ) from error


def import_tensorflow_datasets() -> Any:
    """Import tensorflow_datasets, with its progress bar disabled.

    Returns:
        The module.

    Raises:
        ConfigError: It, or a library that it needs here, is missing.
    """
    for name in ("grain", "array_record", "importlib_resources"):
        import_optional(name, "tfds", "a TFDS corpus")
    tfds = import_optional("tensorflow_datasets", "tfds", "a TFDS corpus")
    tfds.disable_progress_bar()
    return tfds


def corpus_from_builder(builder: Any, splits: dict[Split, str], feature: str) -> Corpus:
    """Open a prepared TFDS corpus.

    Args:
        builder: The corpus's `DatasetBuilder`.
        splits: Each split in TFDS's split language.
        feature: The feature that contains the text.

    Returns:
        The documents of all splits.

    Raises:
        ConfigError: The file format has no random access, the feature or a split does not exist, or splits overlap.
    """
    info = builder.info
    if (file_format := info.file_format.value) != FILE_FORMAT:
        raise ConfigError(
            f"{builder.data_path} has the file format {file_format}, which has no random access; prepare the corpus as "
            "array_record in another folder"
        )
    if feature not in (features := list(info.features)):
        raise ConfigError(f"{info.full_name} has no feature {feature!r}; it has {', '.join(features)}")
    ranges = {split: _split_ranges(builder, spec) for split, spec in splits.items()}
    for a, b in itertools.combinations(SPLITS, 2):
        if any(x[0] == y[0] and x[1] < y[2] and y[1] < x[2] for x in ranges[a] for y in ranges[b]):
            raise ConfigError(f"{a} is {splits[a]!r} and {b} {splits[b]!r} of {info.full_name}; they must not overlap")
    sizes = [(s.name, s.num_examples, s.num_bytes, s.shard_lengths) for s in info.splits.values()]
    digest = hashlib.sha256(repr((info.full_name, feature, ranges, sizes)).encode()).hexdigest()
    return Corpus(digest, {split: _TfdsDocuments(builder, spec, feature) for split, spec in splits.items()})


def _split_ranges(builder: Any, spec: str) -> list[tuple[str, int, int]]:
    """Parse a split: (TFDS split, first index, last index + 1) of each part."""
    splits = builder.info.splits
    try:
        parts = import_tensorflow_datasets().core.ReadInstruction.from_spec(spec).to_absolute(splits)
    except Exception as error:  # ValueError, AssertionError, KeyError
        raise ConfigError(
            f"{builder.info.full_name} has no split {spec!r}; it has {', '.join(splits)}: use parts of these, such as "
            "train[:98%], train[98%:99%] and train[99%:]"
        ) from error
    sizes = {part.splitname: splits[part.splitname].num_examples for part in parts}
    return [(part.splitname, *slice(part.from_, part.to).indices(sizes[part.splitname])[:2]) for part in parts]


class _TfdsDocuments:
    """The documents of one split."""

    def __init__(self, builder: Any, spec: str, feature: str):
        self._records = builder.as_data_source(split=spec)
        self._feature = feature
        self._name = f"{builder.info.full_name} {spec}"

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[str]:
        grain = import_optional("grain", "tfds", "a TFDS corpus")
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCH_BUFFER_SIZE)
        for index, record in enumerate(grain.MapDataset.source(self._records).to_iter_dataset(options)):
            try:
                yield record[self._feature].decode()
            except (UnicodeDecodeError, AttributeError) as error:
                raise ConfigError(
                    f"document {index} of {self._name} is not UTF-8 text in {self._feature!r} ({error}); "
                    "set task.source.feature to a text feature, or repair the corpus"
                ) from error


def _first_line(error: Exception) -> str:
    """The first line of an error, since TFDS appends a list of all corpora."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
