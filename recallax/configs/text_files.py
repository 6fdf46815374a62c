"""A small BASED on your own text files, as bytes; the model of `text_based`.

Question: which perplexity does it reach on them? Needs the extra `tfds`: the files are converted to a TFDS corpus in
the cache folder. Expected: as `text_based` on as much text. Cost: a few minutes on two CPU cores.

    recallax train text_files --task.source.paths "notes/**/*.md" --task.source.document-unit file
"""

from dataclasses import replace

from recallax.configs import text_based
from recallax.tasks import Text
from recallax.tasks.text import TextFiles
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    source = TextFiles(paths=("*.txt",), document_unit="paragraph")
    return replace(text_based.get_config(), task=Text(source=source, length=256, ngram_size=6, max_ngram_count=50))


def get_tiny() -> RunConfig:
    return replace(text_based.get_tiny(), task=text_based.tiny_text(24))
