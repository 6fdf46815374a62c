"""Text: documents from a source, through a tokenizer, packed into rows that any step finds by itself.

A source (`Shakespeare`, which recallax carries; `TextFiles` of one's own; `Tfds`, a TFDS corpus by name) gives
documents of three splits. They are tokenized once, into memory-mapped streams in the cache folder (`tokens.py`). A
batch is then arithmetic on its number: `shuffle.py` says which rows, `task.py` cuts them out of the stream. So a
run's position in the data is its step, on any number of processes, and nothing of it is in a checkpoint but a digest
of the corpus.
"""

from recallax.tasks.text.files import TextFiles
from recallax.tasks.text.language_modeling import Text
from recallax.tasks.text.shakespeare import Shakespeare
from recallax.tasks.text.source import TextSource
from recallax.tasks.text.tfds import Tfds
from recallax.tasks.text.tokenizer import BPE, Bytes, SentencePiece, Tokenizer

__all__ = ["BPE", "Bytes", "SentencePiece", "Shakespeare", "Text", "TextFiles", "TextSource", "Tfds", "Tokenizer"]
