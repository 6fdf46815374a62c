"""Text files of one's own, turned into a TFDS corpus once and read as one."""

import glob
import hashlib
import io
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from recallax.config import ConfigError, suggest_name
from recallax.tasks.base import SPLITS, Split
from recallax.tasks.text.cache_folder import cached_folder
from recallax.tasks.text.source import Corpus, HeldOutFractions, TextSource, document_digest, split_by_content
from recallax.tasks.text.tfds import FILE_FORMAT, corpus_from_builder, import_tensorflow_datasets

DocumentUnit = Literal["file", "paragraph", "line"]
TFDS_SPLIT_NAMES: dict[Split, str] = {"train": "train", "valid": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class TextFiles(TextSource):
    """UTF-8 files; which documents are held out depends on what they say, not on their place.

    They are copied into the cache as a TFDS corpus (array_record), again whenever their contents change.
    """

    paths: tuple[str, ...]
    """Files, or patterns of them (`notes/**/*.md`)."""
    document_unit: DocumentUnit = "file"
    """What one document is: a file, what stands between blank lines, or a line."""
    valid_fraction: float = 0.05
    """Share of the documents, at least one."""
    test_fraction: float = 0.05

    def __post_init__(self) -> None:
        if self.document_unit not in get_args(DocumentUnit):
            raise ConfigError(
                f"TextFiles.document_unit is {self.document_unit!r}{suggest_name(self.document_unit, list(get_args(DocumentUnit)))}"
            )
        if not self.paths:
            raise ConfigError("TextFiles.paths is empty; give files or patterns of them")

    def open(self) -> Corpus:
        tfds = import_tensorflow_datasets()
        files = self._matching_files()
        contents = [_file_digest(file) for file in files]
        key = hashlib.sha256(
            repr((contents, self.document_unit, self.valid_fraction, self.test_fraction)).encode()
        ).hexdigest()[:32]
        folder = cached_folder(f"corpora/files-{key}", partial(self._write_tfds, tfds, files))
        return corpus_from_builder(
            tfds.builder_from_directory(folder / "recallax_text" / "1.0.0"), TFDS_SPLIT_NAMES, "text"
        )

    def _matching_files(self) -> list[Path]:
        found: list[Path] = []
        for pattern in self.paths:
            here = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
            here = [path for path in map(Path, here) if path.is_file()]
            if not here:
                raise ConfigError(
                    f"task.source.paths has {pattern!r}, and there is no such file from {Path.cwd()}; "
                    "correct it, or start where it leads somewhere"
                )
            found += here
        return list(dict.fromkeys(found))

    def _write_tfds(self, tfds: Any, files: list[Path], folder: Path) -> None:
        digests = np.array([document_digest(text) for text in self._read_documents(files)], np.int64)
        splits = split_by_content(digests, HeldOutFractions(self.valid_fraction, self.test_fraction))

        def examples(split: int) -> Iterator[tuple[int, dict[str, str]]]:
            for index, text in enumerate(self._read_documents(files)):
                if splits[index] == split:
                    yield index, {"text": text}

        with tfds.core.registered.skip_registration():  # the class is no corpus that others could ask for by name

            class RecallaxText(tfds.core.GeneratorBasedBuilder):
                VERSION = tfds.core.Version("1.0.0")

                def _info(self) -> Any:
                    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
                    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

                def _split_generators(self, _: Any) -> dict[str, Any]:
                    return {TFDS_SPLIT_NAMES[split]: examples(i) for i, split in enumerate(SPLITS)}

                def _generate_examples(self) -> Any:
                    raise NotImplementedError("its splits hold their examples")

        with redirect_stdout(io.StringIO()):  # it would tell of a download
            RecallaxText(data_dir=folder, file_format=FILE_FORMAT).download_and_prepare()

    def _read_documents(self, files: list[Path]) -> Iterator[str]:
        for file in files:
            text = _read_utf8(file)
            cuts = {
                "file": lambda t: [t],
                "line": lambda t: t.split("\n"),
                "paragraph": partial(re.split, r"\n[^\S\n]*\n"),
            }
            found = [part for part in cuts[self.document_unit](text) if part.strip()]
            if not found:
                raise ConfigError(f"{file} is empty; remove it, or leave it out of task.source.paths")
            yield from (part.strip("\n") for part in found)


def _read_utf8(file: Path) -> str:
    try:
        return file.read_bytes().decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}; convert it "
            f"(iconv -f LATIN1 -t UTF-8), or leave it out of task.source.paths"
        ) from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error


def _file_digest(file: Path) -> str:
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
