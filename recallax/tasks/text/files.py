"""The user's text files, converted once to a TFDS corpus in the cache."""

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

from recallax.config import ConfigError, suggest_name
from recallax.tasks.base import SPLITS, Split
from recallax.tasks.text.cache_folder import cached_folder
from recallax.tasks.text.source import Corpus, HeldOutFractions, TextSource, content_digests, split_by_content
from recallax.tasks.text.tfds import FILE_FORMAT, corpus_from_builder, import_tensorflow_datasets

FORMAT_VERSION = 2
"""Version of the rules that make documents and splits of files, part of the digest."""
DocumentUnit = Literal["file", "paragraph", "line"]
TFDS_SPLIT_NAMES: dict[Split, str] = {"train": "train", "valid": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class TextFiles(TextSource):
    """Documents of UTF-8 files, split by their content and not by their position.

    Documents that differ only in white space or byte-order marks are in one split. A byte-order mark at the start of a
    file is not text. The files are copied to the cache as a TFDS corpus (array_record), again whenever their contents
    change.
    """

    paths: tuple[str, ...]
    """Files or glob patterns (`notes/**/*.md`). The path of an existing file is not a pattern."""
    document_unit: DocumentUnit = "file"
    """Extent of one document: a file, a paragraph (between blank lines) or a line."""
    valid_fraction: float = 0.05
    """Fraction of the documents in the valid split, at least one document."""
    test_fraction: float = 0.05
    """Fraction of the documents in the test split, at least one document."""

    def __post_init__(self) -> None:
        if self.document_unit not in get_args(DocumentUnit):
            raise ConfigError(
                f"TextFiles.document_unit is {self.document_unit!r}"
                f"{suggest_name(self.document_unit, list(get_args(DocumentUnit)))}"
            )
        if not self.paths:
            raise ConfigError("TextFiles.paths is empty; give files or patterns of them")

    def open(self) -> Corpus:
        tfds = import_tensorflow_datasets()
        files = self._matching_files()
        contents = [_file_digest(file) for file in files]
        options = (FORMAT_VERSION, self.document_unit, self.valid_fraction, self.test_fraction)
        key = hashlib.sha256(repr((contents, *options)).encode()).hexdigest()[:32]
        folder = cached_folder(f"corpora/files-{key}", partial(self._write_tfds, tfds, files))
        builder = tfds.builder_from_directory(folder / "recallax_text" / "1.0.0")
        # The digest of a TFDS corpus contains sizes, which other files can have too.
        return corpus_from_builder(builder, TFDS_SPLIT_NAMES, "text")._replace(digest=f"files {key}")

    def _matching_files(self) -> list[Path]:
        files: list[Path] = []
        for pattern in self.paths:
            path = os.path.expanduser(pattern)
            matches = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
            matching_files = [path for path in map(Path, matches) if path.is_file()]
            if not matching_files:
                raise ConfigError(
                    f"task.source.paths has {pattern!r}, which matches no file in {Path.cwd()}; "
                    "correct it, or use an absolute path"
                )
            files += matching_files
        return list(dict.fromkeys(files))

    def _write_tfds(self, tfds: Any, files: list[Path], folder: Path) -> None:
        held_out = HeldOutFractions(self.valid_fraction, self.test_fraction)
        splits = split_by_content(content_digests(self._read_documents(files)), held_out)

        def examples(split: int) -> Iterator[tuple[int, dict[str, str]]]:
            for index, text in enumerate(self._read_documents(files)):
                if splits[index] == split:
                    yield index, {"text": text}

        with tfds.core.registered.skip_registration():  # TFDS must not list the class as a corpus

            class RecallaxText(tfds.core.GeneratorBasedBuilder):
                VERSION = tfds.core.Version("1.0.0")

                def _info(self) -> Any:
                    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
                    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

                def _split_generators(self, _: Any) -> dict[str, Any]:
                    return {TFDS_SPLIT_NAMES[split]: examples(i) for i, split in enumerate(SPLITS)}

                def _generate_examples(self) -> Any:
                    raise NotImplementedError("_split_generators returns the examples")

        with redirect_stdout(io.StringIO()):  # TFDS prints a message about a download
            RecallaxText(data_dir=folder, file_format=FILE_FORMAT).download_and_prepare()

    def _read_documents(self, files: list[Path]) -> Iterator[str]:
        for file in files:
            text = _read_utf8(file)
            separate = {
                "file": lambda t: [t],
                "line": lambda t: t.split("\n"),
                "paragraph": partial(re.split, r"\n[^\S\n]*\n"),
            }
            documents = [part for part in separate[self.document_unit](text) if part.strip()]
            if not documents:
                raise ConfigError(f"{file} is empty; remove it, or exclude it from task.source.paths")
            yield from (part.strip("\n") for part in documents)


def _read_utf8(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}; convert it "
            f"(iconv -f LATIN1 -t UTF-8), or exclude it from task.source.paths"
        ) from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error


def _file_digest(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
