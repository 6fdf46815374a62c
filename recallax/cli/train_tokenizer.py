"""`recallax tokenizer`: train a BPE tokenizer on the text of a config."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from recallax.cli.config_files import load_config
from recallax.cli.corpus import text_task_of
from recallax.cli.options import parse_overrides
from recallax.cli.outputs import OutputFile
from recallax.tasks.text.tokenizer import train_bpe
from recallax.train.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Train a byte-level BPE tokenizer on the train split of a config's text."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    out: OutputFile = Path("tokenizer.json")
    """File to write. Give its name to the BPE tokenizer of a config."""
    vocab_size: int = 8192
    """Maximum number of token ids, including the 256 bytes and the document boundary."""
    download: bool = False
    """Download and prepare the corpus if it is not there yet (TFDS: as array_record)."""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    name, *overrides = arguments
    options = parse_overrides(TokenizerOptions(config=load_config(name)), overrides, f"tokenizer {name}")
    print(train_tokenizer(options.config, options.out, options.vocab_size, download=options.download))
    return 0


def train_tokenizer(config: RunConfig, file: Path, vocab_size: int, *, download: bool) -> str:
    """Train a byte-level BPE tokenizer on the train split of a config's text.

    Args:
        config: A config whose task is Text.
        file: File to write.
        vocab_size: Maximum number of token ids.
        download: Download and prepare the corpus first.

    Returns:
        A line with the file, the number of token ids and the number of documents.

    Raises:
        ConfigError: The task has no text, or the corpus is missing.
    """
    source = text_task_of(config.task).source
    if download:
        source.prepare()
    documents = source.open().documents["train"]
    size = train_bpe(iter(documents), vocab_size, file)
    return f"{file}: {size} token ids, of {len(documents):,} documents"
