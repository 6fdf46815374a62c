"""Tests of language modelling on text: packing, recall tokens, sources, tokenizers, the cache and whole runs."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from recallax.cli.corpus import text_task_of
from recallax.cli.main import main
from recallax.config import ConfigError, from_json, to_json
from recallax.configs import based_360m_text, text_based, text_files
from recallax.models.prompts import PromptError
from recallax.tasks import SPLITS, MaskedPrefix, Split, Text
from recallax.tasks.text import (
    BPE,
    Bytes,
    SentencePiece,
    Shakespeare,
    TextFiles,
    TextSource,
    Tfds,
    recall_tokens,
    tokenized_corpus,
)
from recallax.tasks.text import cache_folder as cache_module
from recallax.tasks.text.bpe_encoder import BPEEncoder
from recallax.tasks.text.cache_folder import cache_root, cached_folder
from recallax.tasks.text.files import DocumentUnit
from recallax.tasks.text.packing import pack_rows
from recallax.tasks.text.permutation import permute_index
from recallax.tasks.text.recall_tokens import frequent_ngrams, recall_mask
from recallax.tasks.text.source import (
    Corpus,
    DocumentSequence,
    HeldOutFractions,
    InMemoryDocuments,
    content_digests,
    document_digest,
    split_by_content,
)
from recallax.tasks.text.tokenized_corpus import TokenStream
from recallax.tasks.text.tokenizer import END_OF_TEXT, train_bpe
from recallax.train.checkpoint import CheckpointError
from recallax.train.loop import evaluate_run, train
from recallax.train.program import Program
from recallax.train.run_config import RunConfig

pytestmark = pytest.mark.xdist_group("text")  # one process: the tests share runs

ROOT = Path(__file__).parents[1]
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "sees",
    "über",
    "東京",
    "and",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "ravens",
    "sing",
    "of",
    "old",
    "kings",
]


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(2, 30))) + f" {i}" for i in range(count)]


@dataclass(frozen=True, kw_only=True)
class Sentences(TextSource):
    """Documents in memory, for tests."""

    seed: int = 0
    count: int = 40

    def open(self) -> Corpus:
        documents: dict[Split, DocumentSequence] = {
            split: InMemoryDocuments(sentences(self.count, 10 * self.seed + i)) for i, split in enumerate(SPLITS)
        }
        return Corpus(f"sentences {self.seed} {self.count}", documents)


SMALL = Text(source=Sentences(), length=32, ngram_size=3, max_ngram_count=60)


# The order of rows


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000, 1023, 4097])
def test_permute_index_is_a_permutation(count: int) -> None:
    for key in (0, 1, 2**63 + 5):
        order = permute_index(np.arange(count), count, np.full(count, key, np.uint64))
        assert np.array_equal(np.sort(order), np.arange(count))


def test_permutations_of_different_keys_are_independent() -> None:
    count, keys = 7, 60_000
    every = [permute_index(np.full(keys, i), count, np.arange(keys, dtype=np.uint64)) for i in range(count)]
    for a, b in itertools.combinations(range(count), 2):  # each position alone, and each pair of positions
        pairs = Counter(zip(every[a].tolist(), every[b].tolist(), strict=True))
        expected = keys / (count * (count - 1))
        chi2 = sum((n - expected) ** 2 / expected for n in pairs.values())
        assert len(pairs) == 42 and chi2 < 41 + 5 * np.sqrt(82), (a, b, chi2)
    order = permute_index(np.arange(5000), 5000, np.full(5000, 3, np.uint64))
    assert np.mean(np.diff(order) == 1) < 0.002 and np.mean(order == np.arange(5000)) < 0.002


# Packing


def stream_of(documents: Sequence[Sequence[int]], grid: int, boundary: int = 99) -> TokenStream:
    tokens, starts, ends = [], [], []
    for document in documents:
        starts.append(len(tokens))
        tokens += [boundary, *document, boundary]
        ends.append(len(tokens))
        tokens += [boundary] * (-len(tokens) % grid)
    begin, end = (np.array(x, np.int64) for x in (starts, ends))
    return TokenStream(np.array(tokens, np.uint16), begin, end, np.zeros(100, np.int64), 0)


def reference_rows(documents: Sequence[Sequence[int]], grid: int, length: int, boundary: int = 99) -> list[list[tuple]]:
    """List (token, segment, position, target or None) of every position, document by document."""
    places: list[tuple] = []
    for number, document in enumerate(documents):
        whole = [boundary, *document, boundary]
        fill = [boundary] * (-len(whole) % grid)
        for i, token in enumerate(whole + fill):
            places.append((number, token, whole[i + 1] if i + 1 < len(whole) else None))
    rows, first = [], 0
    while True:
        row, segment, position, last = [], 0, 0, None
        for i in range(length):
            if first + i >= len(places):
                row.append((0, 0, None, None))
                continue
            number, token, target = places[first + i]
            segment, position = (segment, position + 1) if number == last else (segment + 1, 0)
            last = number
            seen = i == length - 1 or (first > 0 and i < grid - 1)
            row.append((token, segment, position, None if seen else target))
        rows.append(row)
        if first + length >= len(places):
            return rows
        first += length - grid


@pytest.mark.parametrize("grid", [1, 2, 4])
@pytest.mark.parametrize("longest", [1, 6, 60])
def test_packed_rows_match_definition(grid: int, longest: int) -> None:
    rng = np.random.default_rng(grid + longest)
    for length in (8, 12, 20):
        sizes = rng.integers(1, longest + 1, size=30)
        documents = [rng.integers(0, 90, size=n).tolist() for n in sizes]
        expected = reference_rows(documents, grid, length)
        batch = pack_rows(stream_of(documents, grid), np.arange(len(expected)), length, grid)
        for i, row in enumerate(expected):
            tokens, segments, positions, targets = zip(*row, strict=True)
            assert np.asarray(batch.tokens)[i].tolist() == list(tokens)
            assert np.asarray(batch.seq.segment_ids)[i].tolist() == list(segments)
            real = np.array(segments) > 0
            assert np.asarray(batch.seq.positions)[i][real].tolist() == [p for p in positions if p is not None]
            assert (np.asarray(batch.weights)[i] > 0).tolist() == [t is not None for t in targets]
            assert np.asarray(batch.targets)[i].tolist() == [t or 0 for t in targets]
        is_start = (np.asarray(batch.seq.positions) == 0) & (np.asarray(batch.seq.segment_ids) > 0)
        assert not np.any(np.flatnonzero(is_start.any(axis=0)) % grid)
        # Every token except a document's first is a target once.
        labelled = Counter(np.asarray(batch.targets)[np.asarray(batch.weights) > 0].tolist())
        assert labelled == Counter(itertools.chain.from_iterable(documents)) + Counter({99: len(documents)})


@pytest.mark.parametrize("grid", [1, 4])
def test_each_token_is_a_target_once_per_epoch(grid: int) -> None:
    task = replace(SMALL, grid=grid)
    for split in SPLITS:
        stream, rows = task.tokenized_corpus().streams[split], task.num_rows(split)
        batch = task.batch(3, split, 0, rows)
        labelled = np.bincount(batch.targets[batch.weights > 0], minlength=task.vocab_size)
        assert np.array_equal(labelled, stream.counts)
        texts = sentences(40, SPLITS.index(split))
        assert stream.text_bytes == sum(len(t.encode()) for t in texts) == labelled[:256].sum() and labelled[256] == 40
        decoded = [task.encoder.decode(stream.tokens[a:b].tolist()) for a, b in zip(*stream[1:3], strict=True)]
        assert decoded == texts


# The position in the data is the step


def test_batch_size_does_not_change_row_order() -> None:
    """Rows are equal for any batch size, across epochs, and so for any number of processes and at any step."""
    rows = SMALL.num_rows("train")
    whole = SMALL.batch(0, "train", 0, 3 * rows).tokens
    for size in (1, 4, rows - 1, rows + 3):
        for index in {0, 1, 2 * rows // size}:
            part = SMALL.batch(0, "train", index, size).tokens
            assert np.array_equal(part[: 3 * rows - index * size], whole[index * size : (index + 1) * size])
    readings = [Counter(row.tobytes() for row in whole[i * rows : (i + 1) * rows]) for i in range(3)]
    assert readings[0] == readings[1] == readings[2] and len(readings[0]) == rows
    orders = [[row.tobytes() for row in whole[i * rows : (i + 1) * rows]] for i in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_held_out_rows_do_not_depend_on_the_seed() -> None:
    for split in ("valid", "test"):
        rows = SMALL.num_rows(split)
        a, b = (SMALL.batch(seed, split, 0, rows + 5) for seed in (0, 7))
        assert np.array_equal(a.tokens, b.tokens)
        assert np.all(a.weights[:rows].sum(axis=1) > 0) and not a.weights[rows:].any()
        assert not SMALL.batch(0, split, 10**12, 4).weights.any()


DIGEST = """
import hashlib, json, sys
import numpy as np
from recallax.configs import text_based

task, (count, steps, size) = text_based.get_config().task, json.loads(sys.argv[1])
digests = {}
for step in steps:
    batch = task.batch(0, "train", step, size)
    leaves = [*batch[:-1], *batch.seq[:-1]]
    for process in range(count):
        part = slice(process * size // count, (process + 1) * size // count)
        digests[f"{step} {process}"] = hashlib.sha256(b"".join(leaf[part].tobytes() for leaf in leaves)).hexdigest()
foreign = [m for m in ("tensorflow", "tensorflow_datasets", "grain", "tokenizers", "sentencepiece") if m in sys.modules]
print(json.dumps({"rows": digests, "data": task.data_digest(), "foreign": foreign}))
"""


@pytest.mark.fault("R16")
def test_rows_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """A process with an empty cache computes the same rows for each of 1, 2 or 4 processes, at any step.

    The included corpus needs no optional library.
    """
    task, size, steps = (
        text_based.get_config().task,
        8,
        [0, 3, 228, 229, 10**6],
    )  # step 228 crosses an epoch
    environment = {**os.environ, "RECALLAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", DIGEST, json.dumps([4, steps, size])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    assert output["foreign"] == [] and output["data"] == task.data_digest()
    for step in steps:
        batch = task.batch(0, "train", step, size)
        leaves = [*batch[:-1], *batch.seq[:-1]]
        for process in range(4):
            part = slice(process * size // 4, (process + 1) * size // 4)
            digest = hashlib.sha256(b"".join(leaf[part].tobytes() for leaf in leaves)).hexdigest()
            assert output["rows"][f"{step} {process}"] == digest


# Recall tokens


def reference_recall_mask(tokens: list[int], segments: list[int], n: int, frequent: set[tuple]) -> list[bool]:
    """Apply Zoology's definition token by token."""
    mask = []
    for t in range(len(tokens)):
        first = next(i for i in range(len(tokens)) if segments[i] == segments[t])
        gram = tuple(tokens[t - n + 1 : t + 1])
        inside = t - n + 1 >= first
        before = [tuple(tokens[s - n + 1 : s + 1]) for s in range(first + n - 1, t)] if inside else []
        mask.append(inside and gram in before and gram not in frequent)
    return mask


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("above", [0, 8, 1000])
def test_recall_tokens_match_definition(n: int, above: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall_tokens, "TOKENS_PER_PIECE", 7)
    monkeypatch.setattr(recall_tokens, "HASH_BITS", 2)  # few counters, so that n-grams collide
    rng, vocab = np.random.default_rng(n), 5
    sizes = rng.integers(1, 20, size=40)
    documents = [rng.choice(vocab - 1, size=k, p=[0.55, 0.25, 0.1, 0.1]).tolist() for k in sizes]
    stream = stream_of(documents, 1, boundary=vocab - 1)
    counted = Counter(
        tuple(stream.tokens[i : i + n].tolist())
        for a, b in zip(stream.starts, stream.ends, strict=True)
        for i in range(a, b - n + 1)
    )
    frequent_set = {gram for gram, count in counted.items() if count > above}
    numbers = frequent_ngrams(stream.tokens, stream.starts, n, vocab, above)
    assert numbers.tolist() == sorted(
        sum(x * vocab ** (n - 1 - i) for i, x in enumerate(gram)) for gram in frequent_set
    )
    batch = pack_rows(stream, np.arange(20), 16, 1)
    mask = recall_mask(np.asarray(batch.tokens), np.asarray(batch.seq.segment_ids), n, vocab, numbers)
    for row, segments, marks in zip(batch.tokens.tolist(), batch.seq.segment_ids.tolist(), mask, strict=True):
        real = [i for i, s in enumerate(segments) if s]
        expected = reference_recall_mask([row[i] for i in real], [segments[i] for i in real], n, frequent_set)
        assert marks[real].tolist() == expected
    assert mask.any() == (above == 1000 or (above == 8 and n > 1)) and (len(frequent_set) > 0) == (above < 1000)


def test_recall_tokens_do_not_cross_documents() -> None:
    rng = np.random.default_rng(0)
    tokens, segments = rng.integers(0, 3, size=(50, 24)), np.sort(rng.integers(1, 6, size=(50, 24)), axis=1)
    for n in (1, 2, 3):
        mask = recall_mask(tokens, segments, n, 3, np.zeros(0, np.int64))
        for row, own, marks in zip(tokens.tolist(), segments.tolist(), mask, strict=True):
            assert marks.tolist() == reference_recall_mask(row, own, n, set())


def test_target_group_is_that_of_the_predicted_token() -> None:
    for split in SPLITS:
        batch = SMALL.batch(0, split, 0, 20)
        numbers = SMALL.tokenized_corpus().frequent_ngrams(3, 60)
        frequent_set = {(x // 257**2, x // 257 % 257, x % 257) for x in numbers.tolist()}
        for row, segments, group, weights in zip(
            batch.tokens.tolist(), batch.seq.segment_ids.tolist(), batch.group, batch.weights, strict=True
        ):
            recall = reference_recall_mask(row, segments, 3, frequent_set)
            assert [bool(group[t]) for t in np.flatnonzero(weights)] == [recall[t + 1] for t in np.flatnonzero(weights)]
        assert 0.02 < batch.group[batch.weights > 0].mean() < 0.8


# Sources


def test_included_corpus() -> None:
    corpus = Shakespeare().open()
    texts = {split: list(documents) for split, documents in corpus.documents.items()}
    assert {split: len(documents) for split, documents in corpus.documents.items()} == {
        "train": 177,
        "valid": 21,
        "test": 21,
    }
    whole = [text for split in SPLITS for text in texts[split]]
    assert len(set(whole)) == 219 and all(text.isascii() and len(text) > 500 for text in whole)
    assert sum(text.startswith("SONNET ") for text in whole) == 154
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = ROOT / "recallax/tasks/text"
    assert list(folder.glob(data["recallax.tasks.text"][0])) == [folder / "shakespeare.txt"], "it goes into the wheel"
    assert (folder / "shakespeare.txt").stat().st_size < 600_000


def test_splits_are_disjoint_by_content() -> None:
    texts = sentences(200) * 3
    digests = np.array([document_digest(text) for text in texts])
    split = split_by_content(digests, HeldOutFractions(0.1, 0.2))
    by_text = {text: {s for t, s in zip(texts, split, strict=True) if t == text} for text in set(texts)}
    assert all(len(splits) == 1 for splits in by_text.values())
    assert Counter(next(iter(s)) for s in by_text.values()) == {0: 140, 1: 20, 2: 40}
    order = np.random.default_rng(0).permutation(len(texts))
    assert np.array_equal(split_by_content(digests[order], HeldOutFractions(0.1, 0.2)), split[order])
    assert Counter(split_by_content(digests[:3], HeldOutFractions(0.01, 0.01)).tolist()) == {0: 1, 1: 1, 2: 1}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with its own cache."""
    monkeypatch.setenv("RECALLAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


def documents_by_split(source: TextSource) -> dict[Split, list[str]]:
    return {split: list(documents) for split, documents in source.open().documents.items()}


def test_document_units_of_files(folder: Path) -> None:
    texts = sentences(12)
    write(folder / "a/one.txt", "\r\n\r\n".join(texts[:5]) + "\r\n")
    write(folder / "a/b/two.txt", "\n \n\n".join(texts[5:8]) + "\n\n\n")
    write(folder / "three.md", "\n".join(texts[8:]))
    paths = ("a/**/*.txt", "*.md")
    third = "\n".join(texts[8:])
    first, second = "\n\n".join(texts[:5]) + "\n", "\n \n\n".join(texts[5:8]) + "\n\n\n"
    expected: dict[DocumentUnit, list[str]] = {
        "file": [first, second, third],
        "paragraph": [*texts[:8], third],
        "line": texts,
    }
    for cut, documents in expected.items():
        by_split = documents_by_split(TextFiles(paths=paths, document_unit=cut))
        assert sorted(itertools.chain(*by_split.values())) == sorted(text.strip("\n") for text in documents)
        assert all(by_split.values())
    source = TextFiles(paths=paths, document_unit="line")
    before, made_before = source.open().digest, sorted((folder / "cache/corpora").iterdir())
    assert source.open().digest == before and sorted((folder / "cache/corpora").iterdir()) == made_before
    write(folder / "three.md", "\n".join(texts[8:-1]))
    assert source.open().digest != before and len(documents_by_split(source)["train"]) == 9
    assert "tensorflow" not in sys.modules


@pytest.fixture(scope="module")
def tfds_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared TFDS corpus in a data folder, with 30 train and 6 test documents."""
    tfds = pytest.importorskip("tensorflow_datasets")
    tfds.disable_progress_bar()
    data = tmp_path_factory.mktemp("tfds")

    class SomeBooks(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("2.0.1")

        def _info(self):
            features = {name: tfds.features.Text() for name in ("title", "body", "raw")}
            features["year"] = tfds.features.Scalar(np.int64)
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            def examples(texts: list[str]):
                rest = {"title": "", "raw": b"na\xefve", "year": 1900}
                return ((i, {"body": text, **rest}) for i, text in enumerate(texts))

            return {"train": examples(sentences(30)), "test": examples(sentences(6, 1))}

        def _generate_examples(self):
            raise NotImplementedError

    SomeBooks(data_dir=data, file_format="array_record").download_and_prepare()
    return data


def test_tfds_corpus_by_name(tfds_data: Path, folder: Path) -> None:
    source = Tfds(
        name="some_books", feature="body", train_split="train[:80%]", valid_split="train[80%:]", data_dir=str(tfds_data)
    )
    documents = documents_by_split(source)
    assert {split: len(texts) for split, texts in documents.items()} == {"train": 24, "valid": 6, "test": 6}
    assert sorted(documents["train"] + documents["valid"]) == sorted(sentences(30))
    assert sorted(documents["test"]) == sorted(sentences(6, 1))
    assert (
        documents_by_split(source) == documents
        and source.open().digest == replace(source, name="some_books:2.0.1").open().digest
    )
    task = Text(source=source, length=16)
    batch = task.batch(0, "valid", 0, task.num_rows("valid"))
    assert batch.weights.sum() == sum(len(text.encode()) + 1 for text in documents["valid"])
    assert from_json(to_json(task), Text) == task
    assert "tensorflow" not in sys.modules


REFUSED_TFDS = [
    ({"name": "no_such_books"}, ["task.source.name is 'no_such_books'", "TFDS does not have"]),
    ({"name": "lm1b"}, ["lm1b is not in", "recallax corpus CONFIG --download", "task.source.data_dir"]),
    ({"feature": "text"}, ["some_books/2.0.1 has no feature 'text'", "title, body, raw, year"]),
    ({}, ["has no split 'validation'", "train, test", "train[98%:99%]"]),
    (
        {"valid_split": "train[20:]", "train_split": "train[:21]"},
        ["train is 'train[:21]' and valid 'train[20:]'", "not overlap"],
    ),
    ({"valid_split": "test"}, ["valid is 'test' and test 'test'", "not overlap"]),
]


@pytest.mark.parametrize(("change", "parts"), REFUSED_TFDS, ids=[next(iter(c), "split") for c, _ in REFUSED_TFDS])
def test_invalid_tfds_corpora_are_rejected(tfds_data: Path, change: dict[str, str], parts: list[str]) -> None:
    source = replace(Tfds(name="some_books", feature="body", data_dir=str(tfds_data)), **change)
    with pytest.raises(ConfigError) as error:
        source.open()
    for part in parts:
        assert part in str(error.value), error.value


def test_invalid_tfds_features_and_formats_are_rejected(tfds_data: Path, tmp_path: Path) -> None:
    source = Tfds(name="some_books", valid_split="train[:1]", train_split="train[1:]", data_dir=str(tfds_data))
    for feature in ("raw", "year"):
        documents = replace(source, feature=feature).open().documents["valid"]
        with pytest.raises(
            ConfigError, match=rf"document 0 of some_books/2.0.1 train\[:1\] is not UTF-8 .*'{feature}'"
        ):
            list(documents)
    shutil.copytree(tfds_data / "some_books", tmp_path / "some_books")
    info = tmp_path / "some_books/2.0.1/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        ConfigError,
        match=r"2.0.1 has the file format tfrecord, which has no random access; prepare the corpus as array_record",
    ):
        replace(source, feature="body", data_dir=str(tmp_path)).open()


def test_missing_tfds_corpus_is_prepared(tfds_data: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A corpus that TFDS can prepare, like those that it downloads."""
    source = Tfds(
        name="some_books",
        feature="body",
        train_split="train[:9]",
        valid_split="train[9:]",
        data_dir=str(folder / "new"),
    )
    with pytest.raises(ConfigError, match=r"some_books is not in .*/new/some_books/2.0.1"):
        source.open()
    source.prepare()
    documents = documents_by_split(source)
    assert sorted(documents["train"] + documents["valid"]) == sorted(sentences(30))
    before = sorted((folder / "new").rglob("*"))
    source.prepare()
    assert sorted((folder / "new").rglob("*")) == before


def test_byte_order_mark_and_brackets_of_file_names(folder: Path) -> None:
    for i, text in enumerate(sentences(5)):
        write(folder / f"notes[{i}].txt", ("\ufeff" if i % 2 else "") + text)
    found = documents_by_split(TextFiles(paths=tuple(f"notes[{i}].txt" for i in range(5))))
    assert sorted(itertools.chain(*found.values())) == sorted(sentences(5))
    write(folder / "notes4.txt", "of a pattern")
    (folder / "notes[4].txt").unlink()
    found = documents_by_split(TextFiles(paths=("notes?0].txt", "notes?1].txt", "notes[4].txt")))
    assert "of a pattern" in itertools.chain(*found.values())


def test_documents_that_differ_in_white_space_are_in_one_split(folder: Path) -> None:
    texts = sentences(30)
    variants = [text.replace(" ", end) for text in texts for end in (" ", "  ", "\t", "\u00a0")]
    variants += ["\ufeff" + text for text in texts]
    write(folder / "file.txt", "\n".join(["first", *variants]))
    found = documents_by_split(TextFiles(paths=("file.txt",), document_unit="line"))
    contents = {split: {"".join(text.replace("\ufeff", "").split()) for text in found[split]} for split in SPLITS}
    assert all(not contents[a] & contents[b] for a, b in itertools.combinations(SPLITS, 2))
    assert sum(map(len, found.values())) == 151
    # Without such variants the splits are those of the digests of the documents.
    assert content_digests(texts).tolist() == [document_digest(text) for text in texts]


def test_changed_files_of_equal_size_are_another_corpus(folder: Path) -> None:
    write(folder / "file.txt", "\n".join(sentences(9)))
    source = TextFiles(paths=("file.txt",), document_unit="line")
    before = source.open().digest
    write(folder / "file.txt", "\n".join(text.replace("a", "o") for text in sentences(9)))
    assert source.open().digest != before


def check_files_are_rejected(
    parts: list[str], *paths: str, documents: DocumentUnit = "file", valid: float = 0.05, test: float = 0.05
) -> None:
    with pytest.raises(ConfigError) as error:
        TextFiles(paths=paths, document_unit=documents, valid_fraction=valid, test_fraction=test).open()
    for part in parts:
        assert part in str(error.value), error.value


def test_invalid_files_are_rejected(folder: Path) -> None:
    check_files_are_rejected(["'*.txt'", "matches no file", str(folder), "correct it"], "*.txt")
    write(folder / "good.txt", "\n\n".join(sentences(9)))
    (folder / "latin.txt").write_bytes("good\nna\xefve".encode("latin-1"))
    check_files_are_rejected(["latin.txt is not UTF-8", "byte 0xef at offset 7", "iconv"], "*.txt")
    write(folder / "latin.txt", " \n\n")
    check_files_are_rejected(["latin.txt is empty", "remove it"], "*.txt")
    check_files_are_rejected(["1 different documents", "at least one each", "paragraph or line"], "good.txt")
    check_files_are_rejected(["(0.7, 0.3)", "a sum below 1"], "good.txt", documents="paragraph", valid=0.7, test=0.3)
    assert not list((folder / "cache/corpora").glob("files-*")), "what fails leaves nothing"
    with pytest.raises(ConfigError, match="paths is empty"):
        TextFiles(paths=())


def test_missing_library_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "file", "text")
    cases = {
        "tensorflow_datasets": (Tfds(name="lm1b").open, "recallax[tfds]"),
        "grain": (TextFiles(paths=("file",)).open, "recallax[tfds]"),
        "tokenizers": (BPE(file="file", vocab_size=300).load, "recallax[text]"),
        "sentencepiece": (SentencePiece(file="file", vocab_size=300).load, "recallax[text]"),
    }
    for name, (use, remedy) in cases.items():
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError) as error:
            use()
        assert name in str(error.value) and f"pip install '{remedy}'" in str(error.value)
        monkeypatch.undo()
        monkeypatch.chdir(folder)


# Tokenizers


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("bpe") / "deep/bpe.json"
    assert train_bpe(iter(sentences(60)), 300, file) == 300
    return file


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    file = tmp_path_factory.mktemp("sentencepiece") / "model"
    with open(file, "wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences(60)), model_writer=out, vocab_size=300, byte_fallback=True,
            num_threads=1, minloglevel=2,
        )  # fmt: skip
    return file


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece"])
def test_tokenizer_round_trip(kind: str, request: pytest.FixtureRequest) -> None:
    file = "" if kind == "bytes" else str(request.getfixturevalue(f"{kind}_file"))
    tokenizer = {
        "bytes": Bytes(),
        "bpe": BPE(file=file, vocab_size=300),
        "sentencepiece": SentencePiece(file=file, vocab_size=300),
    }[kind]
    encoder = tokenizer.load()
    texts = [*sentences(5, 3), "ünseen 漢字 ☃", f"no {END_OF_TEXT} here, and no </s> or <s>"]
    texts += [] if kind == "sentencepiece" else [" spaces   stay\n\n\tas they are "]
    encoded = encoder.encode(texts)
    for text, ids in zip(texts, encoded, strict=True):
        assert ids.dtype == np.int64 and ids.min() >= 0 and ids.max() < tokenizer.vocab_size
        assert encoder.bos_id not in ids and encoder.eos_id not in ids
        assert encoder.decode([encoder.bos_id, *ids.tolist(), encoder.eos_id]) == text
    assert kind != "bpe" or len(encoded[0]) < 0.7 * len(texts[0].encode())
    assert encoder.decode([encoder.bos_id, 10**6]) == "" and encoder.encode([""])[0].size == 0
    task = Text(source=Sentences(), tokenizer=tokenizer, length=8)
    corpus, valid = task.tokenized_corpus(), sentences(40, 1)
    assert corpus.vocab_size == task.vocab_size == tokenizer.vocab_size
    stream = corpus.streams["valid"]
    assert [encoder.decode(stream.tokens[a:b].tolist()) for a, b in zip(*stream[1:3], strict=True)] == valid


def bpe_encoder(model: dict, *, eos: str = "</s>", added: Sequence[dict] = (), **parts: dict) -> BPEEncoder:
    """Return the encoder of a `tokenizer.json` that is written out, so that it may have any ids."""
    pytest.importorskip("tokenizers")
    defaults = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
    }
    data = {**defaults, "added_tokens": list(added), "model": model, **parts}
    return BPEEncoder("tokenizer.json", json.dumps(data).encode(), eos)


LETTERS = {letter: i for i, letter in enumerate("ab</s>")}
NOT_SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
WORDS_SPLIT = {"type": "WhitespaceSplit"}


def bpe_model(**options: object) -> dict:
    return {"type": "BPE", "vocab": {**LETTERS, "</": 6, "s>": 7, "</s>": 9}, "merges": [], **options}


@pytest.mark.parametrize(
    ("encoder", "expected"),
    [
        (lambda: bpe_encoder(bpe_model(), added=[{"id": 9, "content": "</s>", **NOT_SPECIAL}]), [0, 2, 3, 4, 5, 1]),
        (lambda: bpe_encoder(bpe_model(merges=["< /", "s >", "</ s>"])), [0, 2, 3, 7, 1]),
    ],
    ids=["added token that is not special", "result of merges"],
)
def test_spelled_boundary_is_text(encoder: Callable[[], BPEEncoder], expected: list[int]) -> None:
    loaded = encoder()
    assert [ids.tolist() for ids in loaded.encode(["ab", "a</s>b"])] == [[0, 1], expected]
    assert loaded.decode([0, *expected, 9]).replace(" ", "") == "aa</s>b"


def test_spelled_boundary_of_words_is_text() -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1, "<unk>": 2}, "unk_token": "<unk>"}
    assert bpe_encoder(model, pre_tokenizer=WORDS_SPLIT).encode(["a </s> a"])[0].tolist() == [0, 2, 2, 0]
    model["unk_token"] = "</s>"
    with pytest.raises(ConfigError, match=r"document 'a b' as '</s>', which ends documents; set .*eos_token"):
        bpe_encoder(model, pre_tokenizer=WORDS_SPLIT).encode(["a", "a b"])


@pytest.mark.parametrize(
    ("model", "parts", "message"),
    [
        (bpe_model(), {}, r"no id for 'é', and no unknown token, in the document 'abé'"),
        (bpe_model(unk_token="</s>"), {}, r"no id for 'é'"),
        (
            {"type": "WordLevel", "vocab": {"ab": 0, "</s>": 1}, "unk_token": "?"},
            {"pre_tokenizer": WORDS_SPLIT},
            "'abé'",
        ),
        (
            {"type": "Unigram", "vocab": [["a", -1.0], ["b", -1.0], ["</s>", -1.0]], "unk_id": None},
            {},
            r"no id for 'é'",
        ),
    ],
    ids=["bpe", "boundary as unknown token", "words", "unigram"],
)
def test_text_without_ids_is_rejected(model: dict, parts: dict, message: str) -> None:
    encoder = bpe_encoder(model, **parts)
    assert len(encoder.encode(["ab"])[0])
    with pytest.raises(ConfigError, match=message):
        encoder.encode(["ab", "abé"])


def test_vocabulary_with_unused_ids(tmp_path: Path) -> None:
    encoder = bpe_encoder(bpe_model())
    assert encoder.num_ids == 10 and encoder.decode([-1, 0, 8, 1, 10, 2**40]).replace(" ", "") == "ab"
    file = tmp_path / "tokenizer.json"
    file.write_bytes(encoder._data)
    with pytest.raises(ConfigError, match="has 10 ids"):
        BPE(file=str(file), vocab_size=9, eos_token="</s>").load()

    @dataclass(frozen=True, kw_only=True)
    class Letters(TextSource):
        def open(self) -> Corpus:
            return Corpus("letters", {split: InMemoryDocuments(["abba", "aab"]) for split in SPLITS})

    task = Text(source=Letters(), tokenizer=BPE(file=str(file), vocab_size=10, eos_token="</s>"), length=4)
    metrics = task.metrics("test", np.array([9.0, 0.0]), np.array([9.0, 0.0]))
    assert metrics["bits_per_byte"] == pytest.approx(9 / 7 / np.log(2)) and task.chance() == pytest.approx(4 / 9)


def test_continuation_keeps_its_leading_space(sentencepiece_file: Path) -> None:
    model = {"type": "BPE", "vocab": {"\u2581": 0, "a": 1, "\u2581a": 2, "</s>": 3}, "merges": ["\u2581 a"]}
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    cases = [
        (bpe_encoder(model, pre_tokenizer=space, decoder=space), "a", "a a"),
        (SentencePiece(file=str(sentencepiece_file), vocab_size=300).load(), "the quick", "the quick fox"),
        (Bytes().load(), "a", "a \u00e9"),
    ]
    for encoder, prompt, whole in cases:
        prompt_ids, ids = (x.tolist() for x in encoder.encode([prompt, whole]))
        assert ids[: len(prompt_ids)] == prompt_ids
        rest = encoder.decode_continuation([encoder.bos_id, *prompt_ids], ids[len(prompt_ids) :])
        assert rest == whole.removeprefix(prompt) and rest[0] == " "
    assert Bytes().load().decode_continuation([97, 0xC3], [0xA9, 98]) == "\u00e9b"


def test_large_vocabularies_use_uint32() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wide(Bytes):
        @property
        def vocab_size(self) -> int:
            return 2**16 + 257

        def load(self):
            encoder = Bytes().load()
            plain = encoder.encode
            encoder.encode = lambda texts: [ids + 2**16 for ids in plain(texts)]
            encoder.digest = "wide"
            return encoder

    wide, narrow = (Text(source=Sentences(), tokenizer=t, length=8).batch(0, "test", 0, 9) for t in (Wide(), Bytes()))
    assert np.array_equal(np.where(narrow.tokens == 256, 256, narrow.tokens + 2**16), wide.tokens)


def test_invalid_tokenizers_are_rejected(bpe_file: Path, sentencepiece_file: Path, tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_text("{}")
    cases = [
        (BPE(file=str(bpe_file), vocab_size=400), ["vocab_size is 400", "has 300 ids", "set it to 300", "model.vocab"]),
        (BPE(file=str(bpe_file), vocab_size=300, eos_token="<s>"), ["no token '<s>'", "task.tokenizer.eos_token"]),
        (BPE(file=str(junk), vocab_size=300), [str(junk), "not a file of the tokenizers library"]),
        (BPE(file="nowhere", vocab_size=300), ["'nowhere'", "No such file"]),
        (SentencePiece(file=str(sentencepiece_file), vocab_size=320), ["vocab_size is 320", "has 300 ids"]),
        (SentencePiece(file=str(junk), vocab_size=300), [str(junk), "not a model of sentencepiece"]),
    ]
    for tokenizer, parts in cases:
        with pytest.raises(ConfigError) as error:
            tokenizer.load()
        for part in parts:
            assert part in str(error.value), error.value
    with pytest.raises(ConfigError, match="at least 257"):
        train_bpe(iter(["text"]), 256, junk)
    config = text_based.get_tiny()
    with pytest.raises(ConfigError, match=r"model.vocab_size is 256; the task has 257 token ids"):
        Program(replace(config, model=replace(config.model, vocab_size=256)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 3}, r"length is 3 and grid 1; .* at least 4"),
        ({"length": 24, "grid": 5}, "multiple of grid"),
        ({"length": 24, "grid": 24}, "at least 2 grid"),
        ({"ngram_size": 8}, r"ngram_size is 8 with 257 token ids; it must be from 1 to 7"),
        ({"ngram_size": 0}, "from 1 to 7"),
        ({"max_ngram_count": -1}, "at least 0"),
    ],
)
def test_invalid_text_tasks_are_rejected(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **change)


def test_rows_longer_than_a_split_are_rejected() -> None:
    task = replace(SMALL, length=10**5)
    with pytest.raises(ConfigError, match=r"length is 100000 and the train split has \d{4} tokens in 40 documents"):
        task.batch(0, "train", 0, 1)


# The cache


def test_concurrent_processes_create_cache_folder_once(folder: Path) -> None:
    calls: list[Path] = []

    def make(into: Path) -> None:
        calls.append(into)
        (into / "part").write_text("whole")

    threads = [threading.Thread(target=cached_folder, args=("some/thing", make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and (cache_root() / "some/thing/part").read_text() == "whole"
    assert cached_folder("some/thing", make) == cache_root() / "some/thing" and len(calls) == 1


def test_first_cache_writer_wins_without_locks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    def quick(into: Path) -> None:
        (into / "part").write_text("first")

    def slow(into: Path) -> None:
        (into / "part").write_text("second")
        cached_folder("thing", quick)

    monkeypatch.setattr(cache_module.fcntl, "flock", refuse)
    assert (cached_folder("thing", slow) / "part").read_text() == "first"
    assert [path.name for path in cache_root().iterdir() if path.name.endswith(".tmp")] == []


@pytest.mark.fault("R9")
def test_failed_cache_write_leaves_no_folder(folder: Path) -> None:
    def fail(into: Path) -> None:
        (into / "part").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder("thing", fail)
    assert [path.name for path in cache_root().iterdir()] == [".thing.lock"]


@pytest.mark.fault("R7")
@pytest.mark.parametrize("change", [lambda data: data[:-2], lambda data: bytes([data[0] ^ 1]) + data[1:]])
def test_damaged_cache_is_reported(
    change: Callable[[bytes], bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = replace(SMALL, source=Sentences(seed=1))
    damaged = task.tokenized_corpus().folder / "valid.tokens"
    damaged.write_bytes(change(damaged.read_bytes()))
    other = folder / "elsewhere"
    other.symlink_to(folder / "cache")  # the same files for a process that has not opened them yet
    monkeypatch.setenv("RECALLAX_CACHE", str(other))
    with pytest.raises(ConfigError, match=r"is damaged \(the checksum of valid.tokens .*; delete it"):
        task.tokenized_corpus()


def test_cache_without_checksums_is_created_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(SMALL, source=Sentences(seed=2))
    corpus = task.tokenized_corpus()
    tokens = corpus.folder / "train.tokens"
    expected = tokens.read_bytes()
    tokens.write_bytes(b"\0" * len(expected))
    (corpus.folder / cache_module.CHECKSUM_FILE).unlink()
    other = folder / "elsewhere"
    other.symlink_to(folder / "cache")
    monkeypatch.setenv("RECALLAX_CACHE", str(other))
    again = task.tokenized_corpus()
    assert again.digest == corpus.digest and tokens.read_bytes() == expected


@pytest.mark.fault("R10")
def test_unwritable_cache_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(SMALL, source=Sentences(seed=1))
    write(folder / "file", "")
    monkeypatch.setenv("RECALLAX_CACHE", str(folder / "file/cache"))
    with pytest.raises(ConfigError, match=r"cannot be written: .*RECALLAX_CACHE"):
        task.tokenized_corpus()


# Runs


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    jax.config.update("jax_disable_most_optimizations", True)
    config, folder = text_based.get_tiny(), tmp_path_factory.mktemp("run") / "text"
    train(config, folder, name="text_based")
    return config, folder


def test_text_metrics_match_losses(tiny_run: tuple[RunConfig, Path]) -> None:
    """The metrics are recomputed from the logits of every target."""
    config, folder = tiny_run
    metrics = evaluate_run(folder, "test")
    from recallax.train.inference import load_trained_model

    task, model = load_trained_model(folder)
    call = jax.jit(lambda tokens, seq: model(tokens, seq)[0])
    losses, groups = [], []
    for index in range(config.evaluate.batches):
        batch = task.batch(0, "test", index, config.evaluate.batch_size)
        logits = np.asarray(call(jax.numpy.asarray(batch.tokens), batch.seq), np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(logits, np.asarray(batch.targets)[..., None], axis=-1)[..., 0]
        labelled = np.asarray(batch.weights) > 0
        losses.append((np.log(np.exp(logits).sum(axis=-1)) - chosen)[labelled])
        groups.append(np.asarray(batch.group)[labelled])
    loss, group = np.concatenate(losses), np.concatenate(groups)
    stream = text_task_of(task).tokenized_corpus().streams["test"]
    expected = {
        "perplexity": np.exp(loss.mean()),
        "perplexity/other": np.exp(loss[group == 0].mean()),
        "perplexity/recall": np.exp(loss[group == 1].mean()),
        "share/recall": group.mean(),
        "bits_per_byte": loss.mean() / np.log(2) * (stream.text_bytes + 21) / stream.text_bytes,
    }
    assert 0.01 < group.mean() < 0.5
    assert {k.removeprefix("measure/"): v for k, v in metrics.items() if k.startswith("measure/")} == pytest.approx(
        expected, rel=1e-4
    )


def test_report_shows_text_metrics(tiny_run: tuple[RunConfig, Path], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert main(["report", str(tiny_run[1]), "--out", str(page)]) == 0
    perplexity = f"{evaluate_run(tiny_run[1], 'test')['measure/perplexity/recall']:.4g}"
    for text in (page.read_text(), page.with_suffix(".md").read_text().replace("\\", "")):
        assert "perplexity/recall" in text and perplexity in text and "bits_per_byte" in text
    assert "perplexity/other" in page.with_suffix(".csv").read_text()


def test_generate_command_returns_text(
    tiny_run: tuple[RunConfig, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from recallax.models.generation import Generator
    from recallax.train import inference

    labelled = []
    original = Generator.prefill

    def prefill(self, prompts, *arguments, **options):
        labelled.append([row[ok].tolist() for row, ok in zip(prompts.tokens, prompts.valid, strict=True)])
        return original(self, prompts, *arguments, **options)

    def written(*options: str) -> str:
        assert main(["generate", str(tiny_run[1]), "--max-new-tokens", "5", *options]) == 0
        return capsys.readouterr().out

    monkeypatch.setattr(Generator, "prefill", prefill)
    once = written("--prompt", "To bé", "")
    assert labelled == [[[256, *"To bé".encode()], [256]]]
    assert once == written("--prompt", "To bé", "")
    written("--context", "Hark! ", "--prompt", "who")
    assert labelled[2] == [[256, *b"Hark! "]]
    with pytest.raises(PromptError, match="prompt '' is empty"):
        inference.continue_prompts(
            tiny_run[1], [""], "Hark", inference.ContextRepetition(), inference.GenerationOptions(max_new_tokens=1)
        )
    encoder = Bytes().load()
    ids = [*b"\x1b[2Jno\ntricks", 256, 255]
    assert inference._decode_text(encoder, [256], ids) == "\\x1b[2Jno\ntricks\ufffd"


def test_generation_stops_at_end_of_document(tiny_run: tuple[RunConfig, Path], monkeypatch) -> None:
    from recallax.models.generation import Generator
    from recallax.train import inference

    stops = []
    original = Generator.__init__
    monkeypatch.setattr(
        Generator,
        "__init__",
        lambda self, *a, **options: (stops.append(options["stop_token_ids"]), original(self, *a, **options))[1],
    )
    inference.continue_prompts(
        tiny_run[1],
        ["a"],
        None,
        inference.ContextRepetition(),
        inference.GenerationOptions(max_new_tokens=1, stop_token_ids=(7,)),
    )
    assert stops == [(7, 256)]


@pytest.mark.fault("R17")
def test_run_with_changed_corpus_is_not_resumed(folder: Path) -> None:
    write(folder / "corpus.txt", "\n".join(sentences(60)))
    tiny = text_based.get_tiny()
    source = TextFiles(paths=("corpus.txt",), document_unit="line", valid_fraction=0.2, test_fraction=0.2)
    config = replace(tiny, task=replace(tiny.task, source=source))
    first = train(config, folder / "run", name="files")
    assert train(config, folder / "run", name="files") == first
    write(folder / "corpus.txt", "\n".join(sentences(61)))
    tokenized_corpus._load_tokenized_corpus.cache_clear()  # as in a new process
    with pytest.raises(CheckpointError, match=r"step 4 was trained on other data .* the corpus or the tokenizer file"):
        train(config, folder / "run", name="files")
    (folder / "corpus.txt").unlink()
    tokenized_corpus._load_tokenized_corpus.cache_clear()
    with pytest.raises(ConfigError, match="matches no file"):
        train(config, folder / "new", name="files")
    assert not (folder / "new").exists(), "what is refused claims no folder"


SHORT = ["--task.length=32", "--train.steps=60", "--train.batch-size=8", "--train.log-every=1", "--train.save-every=20"]
SHORT += ["--evaluate.batches=2", "--evaluate.batch-size=8", "--evaluate.every=30", "--model.d-model=16"]


def processes(folder: Path, count: int) -> list[subprocess.Popen]:
    """Start the processes of one run, with one device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": ""}
    started = []
    for i in range(count):
        command = [sys.executable, "-m", "recallax", "train", "text_based", *SHORT, f"--run={folder}"]
        if count > 1:
            command += [f"--distributed.coordinator-address={address}", f"--distributed.num-processes={count}"]
            command += [f"--distributed.process-id={i}"]
        started.append(subprocess.Popen(command, env={**os.environ, **flags}, stdout=subprocess.DEVNULL))
    return started


def finish(started: list[subprocess.Popen]) -> list[int]:
    try:
        return [process.wait(400) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.mark.fault("R16")
@pytest.mark.full
def test_run_resumes_with_another_number_of_processes(tmp_path: Path) -> None:
    """Two processes are stopped and four resume: the losses equal those of an uninterrupted run."""

    def losses(folder: Path) -> dict[tuple, float]:
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return {(r["kind"], r["step"], r.get("split")): r["loss"] for r in rows if r["kind"] in ("train", "eval")}

    changing, one = tmp_path / "changing", tmp_path / "one"
    pair = processes(changing, 2)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (changing / "log.jsonl").exists() and '"train"' in (changing / "log.jsonl").read_text():
            break
        time.sleep(0.02)
    pair[1].send_signal(signal.SIGTERM)
    assert finish(pair) == [75, 75]
    reached = max(step for kind, step, _ in losses(changing) if kind == "train")
    assert 0 < reached < 60, "it was stopped on the way"
    assert finish(processes(changing, 4)) == [0] * 4
    assert finish(processes(one, 1)) == [0]
    expected, actual = losses(one), losses(changing)
    assert actual.keys() == expected.keys() and len(actual) == 60 + 3
    for where, loss in expected.items():
        assert actual[where] == pytest.approx(loss, rel=1e-4), where


def test_masked_prefix_on_text() -> None:
    task = MaskedPrefix(task=SMALL, prefix_length=8)
    batch = task.batch(0, "train", 0, 50)
    masked = batch.tokens == 257
    assert (
        task.vocab_size == 258
        and masked.any()
        and task.data_digest() == SMALL.data_digest()
        and task.encoder is not None
    )
    assert np.all(np.asarray(batch.seq.positions)[masked] < 8)
    measures = task.metrics("test", np.array([6.0, 2.0]), np.array([3.0, 1.0]))
    assert measures["perplexity"] == pytest.approx(np.exp(2)) and measures["share/recall"] == 0.25


def test_text_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "corpus.txt", "\n".join(sentences(80)))
    source = ["--task.source.paths", "corpus.txt", "--task.source.document-unit", "line", "--task.length", "16"]
    assert main(["corpus", "text_files", *source]) == 0
    header, *rows, where = capsys.readouterr().out.splitlines()
    assert header.split() == ["split", "documents", "tokens", "bytes", "bytes/token", "rows"]
    counts = {row.split()[0]: [int(x.replace(",", "")) for x in row.split()[1:4]] for row in rows}
    assert [counts[split][0] for split in SPLITS] == [72, 4, 4] and Path(where.removeprefix("tokens: ")).is_dir()
    assert all(tokens == text_bytes + documents for documents, tokens, text_bytes in counts.values())
    assert main(["tokenizer", "text_files", "--out", "bpe.json", "--vocab-size", "280", *source[:4]]) == 0
    assert "bpe.json: 280 token ids, of 72 documents" in capsys.readouterr().out
    assert BPE(file="bpe.json", vocab_size=280).load().encode(["of the quick fox over a lazy dog"])[0].size < 32
    assert main(["corpus", "mqar_micro"]) == 2 and "the task is MQAR, which has no text" in capsys.readouterr().err
    assert main(["train", "text_files"]) == 2 and "1 different documents" in capsys.readouterr().err
    assert not (folder / "runs").exists(), "what is refused claims no folder"


def test_text_configs_name_their_corpora() -> None:
    published = based_360m_text.get_config()
    assert published.task.vocab_size == 50_257 and published.model.vocab_size == 50_264
    assert text_task_of(published.task).source == Tfds(name="pg19", feature="book_text")
    assert isinstance(text_task_of(text_files.get_config().task).source, TextFiles)
