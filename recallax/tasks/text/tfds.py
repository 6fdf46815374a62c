"""Corpora of TensorFlow Datasets: array_record files, read at random through grain, without TensorFlow."""

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
READ_THREADS, PREFETCH_BUFFER_SIZE = 8, 512
"""Documents are read by that many threads, so many ahead of the tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Tfds(TextSource):
    """A TFDS corpus by name. It must be prepared as array_record, which `recallax corpus CONFIG --download` does."""

    name: str
    """As TFDS has it: `name`, `name/config` or `name/config:version`."""
    feature: str = "text"
    """The feature that holds the text."""
    train_split: str = "train"
    """In TFDS's split language, like the next two: `train[:98%]`. They may not overlap."""
    valid_split: str = "validation"
    test_split: str = "test"
    data_dir: str | None = None
    """Where TFDS keeps its corpora; None is where it usually does (`TFDS_DATA_DIR`, or ~/tensorflow_datasets)."""

    def open(self) -> Corpus:
        builder = self._load_builder()
        if not builder.is_prepared():
            raise ConfigError(
                f"the TFDS corpus {self.name} is not in {builder.data_path}; `recallax corpus CONFIG --download` "
                "prepares it, or set task.source.data_dir to the folder that has it"
            )
        return corpus_from_builder(
            builder, {"train": self.train_split, "valid": self.valid_split, "test": self.test_split}, self.feature
        )

    def prepare(self) -> None:
        if self._load_builder().is_prepared():
            return
        try:
            self._load_builder(file_format=FILE_FORMAT).download_and_prepare()
        except Exception as error:  # whatever a download or TFDS's code for the corpus may raise
            raise ConfigError(f"the TFDS corpus {self.name} could not be prepared: {_first_line(error)}") from error

    def _load_builder(self, file_format: str | None = None) -> Any:
        tfds = import_tensorflow_datasets()
        try:
            return tfds.builder(self.name, data_dir=self.data_dir, file_format=file_format)
        except Exception as error:  # AssertionError, ValueError and others, by what is wrong with the name
            raise ConfigError(
                f"task.source.name is {self.name!r}, which TFDS does not have ({_first_line(error)}); "
                "give name, name/config or name/config:version, and task.source.data_dir where it is your own"
            ) from error


def import_tensorflow_datasets() -> Any:
    """The library, quiet. Raises ConfigError where it is missing."""
    for name in ("grain", "array_record", "importlib_resources"):
        import_optional(name, "tfds", "a TFDS corpus")
    tfds = import_optional("tensorflow_datasets", "tfds", "a TFDS corpus")
    tfds.disable_progress_bar()
    return tfds


def corpus_from_builder(builder: Any, splits: dict[Split, str], feature: str) -> Corpus:
    """The documents of a prepared corpus. Raises ConfigError where splits, feature or file format are not as wanted."""
    info = builder.info
    if (form := info.file_format.value) != FILE_FORMAT:
        raise ConfigError(
            f"{builder.data_path} holds {form}, which has no random access; prepare it as array_record elsewhere"
        )
    if feature not in (features := list(info.features)):
        raise ConfigError(f"{info.full_name} has no feature {feature!r}; it has {', '.join(features)}")
    ranges = {split: _split_ranges(builder, spec) for split, spec in splits.items()}
    for a, b in itertools.combinations(SPLITS, 2):
        if any(x[0] == y[0] and x[1] < y[2] and y[1] < x[2] for x in ranges[a] for y in ranges[b]):
            raise ConfigError(f"{a} is {splits[a]!r} and {b} {splits[b]!r} of {info.full_name}; they may not overlap")
    sizes = [(s.name, s.num_examples, s.num_bytes, s.shard_lengths) for s in info.splits.values()]
    digest = hashlib.sha256(repr((info.full_name, feature, ranges, sizes)).encode()).hexdigest()
    return Corpus(digest, {split: _TfdsDocuments(builder, spec, feature) for split, spec in splits.items()})


def _split_ranges(builder: Any, spec: str) -> list[tuple[str, int, int]]:
    """(split, first, behind the last) of every part of a split's name."""
    splits = builder.info.splits
    try:
        parts = import_tensorflow_datasets().core.ReadInstruction.from_spec(spec).to_absolute(splits)
    except Exception as error:  # ValueError, AssertionError, KeyError
        raise ConfigError(
            f"{builder.info.full_name} has no split {spec!r}; it has {', '.join(splits)}: name parts of those, like "
            "train[:98%], train[98%:99%] and train[99%:]"
        ) from error
    whole = {part.splitname: splits[part.splitname].num_examples for part in parts}
    return [(part.splitname, *slice(part.from_, part.to).indices(whole[part.splitname])[:2]) for part in parts]


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
                    "name a feature that is text, or mend the corpus"
                ) from error


def _first_line(error: Exception) -> str:
    """The first line of an error: TFDS goes on with all corpora that there are."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
