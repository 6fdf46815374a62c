"""Recall tasks: streams of labelled sequences, each a pure function of (seed, split, index) with an exact solver.

Every task is a frozen config (`base.Task`); batches are numpy arrays, so a task can be used without the rest of
recallax. Valid and test batches label only what the task asks; their slices (lengths, numbers of pairs) take turns.
"""

from recallax.tasks.base import SPLITS, Split, Task
from recallax.tasks.copying import Copying
from recallax.tasks.induction import InductionHeads
from recallax.tasks.key_retrieval import KeyRetrieval
from recallax.tasks.mad import Compression, Memorization, SelectiveCopying
from recallax.tasks.mad_recall import FuzzyRecall, InContextRecall, NoisyRecall
from recallax.tasks.masked_prefix import MaskedPrefix
from recallax.tasks.mqar import MQAR, ZOOLOGY_MIX, ZOOLOGY_TEST, MixtureSlice
from recallax.tasks.overwrites import OverwriteRecall, OverwriteSlice
from recallax.tasks.repeated_context import ContextRepetition, JRTPrompt, PrefixFill
from recallax.tasks.set_disjointness import SetDisjointness
from recallax.tasks.state_tracking import StateTracking
from recallax.tasks.text import Text

__all__ = [
    "MQAR",
    "SPLITS",
    "ZOOLOGY_MIX",
    "ZOOLOGY_TEST",
    "Compression",
    "ContextRepetition",
    "Copying",
    "FuzzyRecall",
    "InContextRecall",
    "InductionHeads",
    "JRTPrompt",
    "KeyRetrieval",
    "MaskedPrefix",
    "Memorization",
    "MixtureSlice",
    "NoisyRecall",
    "OverwriteRecall",
    "OverwriteSlice",
    "PrefixFill",
    "SelectiveCopying",
    "SetDisjointness",
    "Split",
    "StateTracking",
    "Task",
    "Text",
]
