"""The corpus that recallax carries: four plays of Shakespeare by scene, and the sonnets.

219 documents, 567 kB of ASCII, in `shakespeare.txt`, with a form feed between documents. William Shakespeare died in
1616: his text is in the public domain everywhere. It was taken from Project Gutenberg's etexts of Hamlet (2ws2610),
Macbeth (2ws3410), A Midsummer Night's Dream (2ws1710), The Tempest (2ws4110) and the Sonnets (wssnt10), as the Open
Knowledge Foundation's package `shakespeare` 0.6 carries them, without Gutenberg's notices. Lists of persons are left
out, each document begins with the name of its play and act or with "SONNET", and white space is tidied.
"""

from dataclasses import dataclass
from functools import cache
from importlib import resources

from recallax.tasks.text.source import Corpus, HeldOutFractions, TextSource, in_memory_corpus

RESOURCE = "shakespeare.txt"
HELD_OUT = HeldOutFractions(valid=0.1, test=0.1)


@dataclass(frozen=True, kw_only=True)
class Shakespeare(TextSource):
    """Four plays by scene, and the sonnets; a tenth of the documents is valid, another is test."""

    def open(self) -> Corpus:
        return _load_corpus()


@cache
def _load_corpus() -> Corpus:
    whole = resources.files(__package__).joinpath(RESOURCE).read_text(encoding="ascii")
    return in_memory_corpus((text.strip("\n") for text in whole.split("\f")), HELD_OUT)
