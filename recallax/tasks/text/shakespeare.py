"""The included corpus: four plays of Shakespeare by scene, and the sonnets.

219 documents, 567 kB of ASCII, in `shakespeare.txt`, with a form feed between documents. William Shakespeare died in
1616: his text is in the public domain everywhere. The source is Project Gutenberg's etexts of Hamlet (2ws2610), Macbeth
(2ws3410), A Midsummer Night's Dream (2ws1710), The Tempest (2ws4110) and the Sonnets (wssnt10), as contained in the
Open Knowledge Foundation's package `shakespeare` 0.6, without Gutenberg's notices. Lists of persons are removed, each
document starts with the name of its play and act or with "SONNET", and white space is normalized.
"""

from dataclasses import dataclass
from functools import cache
from importlib import resources

from recallax.tasks.text.source import Corpus, HeldOutFractions, TextSource, in_memory_corpus

RESOURCE = "shakespeare.txt"
HELD_OUT = HeldOutFractions(valid=0.1, test=0.1)
"""About 22 documents per held-out split."""


@dataclass(frozen=True, kw_only=True)
class Shakespeare(TextSource):
    """Four plays by scene and the sonnets; a tenth of the documents is the valid split and another the test split."""

    def open(self) -> Corpus:
        return _load_corpus()


@cache
def _load_corpus() -> Corpus:
    whole = resources.files(__package__).joinpath(RESOURCE).read_text(encoding="ascii")
    return in_memory_corpus((text.strip("\n") for text in whole.split("\f")), HELD_OUT)
