"""Language modelling on text: documents from a source, tokenized and packed into rows with random access.

A source returns the documents of three splits: `Shakespeare` (included in recallax), `TextFiles` (the user's files) or
`Tfds` (a TFDS corpus by name). They are tokenized once into memory-mapped streams in the cache folder
(`tokenized_corpus.py`). A batch is then a function of its index: `permutation.py` selects the rows and
`language_modeling.py` reads them from the stream. So a run's position in the data is its step, on any number of
processes, and a checkpoint stores only a digest of the corpus.
"""

from recallax.tasks.text.cache_folder import cache_root, cached_folder
from recallax.tasks.text.files import TextFiles
from recallax.tasks.text.language_modeling import Text
from recallax.tasks.text.shakespeare import Shakespeare
from recallax.tasks.text.source import Corpus, DocumentSequence, HeldOutFractions, TextSource, in_memory_corpus
from recallax.tasks.text.tfds import Tfds
from recallax.tasks.text.tokenized_corpus import TokenizedCorpus, TokenStream, load_tokenized_corpus
from recallax.tasks.text.tokenizer import BPE, Bytes, SentencePiece, Tokenizer, train_bpe

__all__ = [
    "BPE",
    "Bytes",
    "Corpus",
    "DocumentSequence",
    "HeldOutFractions",
    "SentencePiece",
    "Shakespeare",
    "Text",
    "TextFiles",
    "TextSource",
    "Tfds",
    "TokenStream",
    "TokenizedCorpus",
    "Tokenizer",
    "cache_root",
    "cached_folder",
    "in_memory_corpus",
    "load_tokenized_corpus",
    "train_bpe",
]
