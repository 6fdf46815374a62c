"""`recallax corpus`: download and tokenize the text of a config, and print its size."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from recallax.cli.config_files import load_config
from recallax.cli.options import parse_overrides
from recallax.config import ConfigError
from recallax.tasks import SPLITS, Task, Text
from recallax.tasks.task_transform import TaskTransform
from recallax.train.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """Tokenize the text of a config, and print the size of each split."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    download: bool = False
    """Download and prepare the corpus if it is not there yet (TFDS: as array_record)."""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    name, *overrides = arguments
    options = parse_overrides(CorpusOptions(config=load_config(name)), overrides, f"corpus {name}")
    print(describe_corpus(options.config, download=options.download))
    return 0


def describe_corpus(config: RunConfig, *, download: bool) -> str:
    """Tokenize a corpus, unless that has been done before, and describe it.

    Args:
        config: A config whose task is Text.
        download: Download and prepare the corpus first.

    Returns:
        A table of the corpus's splits: documents, tokens, bytes, bytes per token and rows.

    Raises:
        ConfigError: The task has no text, or the corpus is missing.
    """
    task = text_task_of(config.task)
    if download:
        task.source.prepare()
    corpus = task.tokenized_corpus()
    lines = [("split", "documents", "tokens", "bytes", "bytes/token", "rows")]
    for split in SPLITS:
        stream = corpus.streams[split]
        tokens = int(stream.counts.sum())
        counts = (len(stream.starts), tokens, stream.text_bytes, task.num_rows(split))
        documents, tokens, text_bytes, rows = (f"{count:,}" for count in counts)
        ratio = f"{stream.text_bytes / stream.counts.sum():.2f}"
        lines.append((split, documents, tokens, text_bytes, ratio, rows))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*table, f"tokens: {corpus.folder}"])


def text_task_of(task: Task) -> Text:
    """Return the text task inside a task's transforms.

    Args:
        task: A task.

    Returns:
        The Text task.

    Raises:
        ConfigError: The task is not Text, nor a transform of it.
    """
    while isinstance(task, TaskTransform):
        task = task.task
    if not isinstance(task, Text):
        raise ConfigError(f"the task is {type(task).__name__}, which has no text; name a config whose task is Text")
    return task
