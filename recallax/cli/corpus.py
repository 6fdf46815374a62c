"""`recallax corpus` and `recallax tokenizer`: the text of a config before anything is trained on it."""

from pathlib import Path

from recallax.config import ConfigError
from recallax.tasks import SPLITS, Task, Text
from recallax.tasks.task_transform import TaskTransform
from recallax.tasks.text.tokenizer import train_bpe
from recallax.train.run_config import RunConfig


def describe_corpus(config: RunConfig, *, download: bool) -> str:
    """A table of the corpus's splits, tokenized if that had not been done. Raises ConfigError."""
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


def train_tokenizer(config: RunConfig, file: Path, vocab_size: int, *, download: bool) -> str:
    """Train a byte-level BPE on the train split of the config's text. Raises ConfigError."""
    source = text_task_of(config.task).source
    if download:
        source.prepare()
    documents = source.open().documents["train"]
    found = train_bpe(iter(documents), vocab_size, file)
    return f"{file}: {found} token ids, of {len(documents):,} documents"


def text_task_of(task: Task) -> Text:
    """The text beneath a task's transforms. Raises ConfigError where it has none."""
    while isinstance(task, TaskTransform):
        task = task.task
    if not isinstance(task, Text):
        raise ConfigError(f"the task is {type(task).__name__}, which has no text; name a config whose task is Text")
    return task
