"""Recall tasks and text: labelled batches as a pure function of (seed, split, index), each task with an exact solver.

Every task is a frozen config that subclasses `Task`. Batches are numpy arrays, so a task can be used without the rest
of recallax. Valid and test batches label only the answers; their slices (lengths, numbers of pairs) alternate from
batch to batch.
"""

from recallax.tasks.base import SPLITS, Split, Task, batch_rng, most_frequent_token_accuracy
from recallax.tasks.copying import Copying
from recallax.tasks.encoder import Encoder
from recallax.tasks.induction import InductionHeads
from recallax.tasks.key_retrieval import KeyRetrieval
from recallax.tasks.mad import Compression, Memorization, SelectiveCopying
from recallax.tasks.mad_recall import FuzzyRecall, InContextRecall, NoisyRecall
from recallax.tasks.masked_prefix import MaskedPrefix, masked_prefix_loss_weights
from recallax.tasks.mqar import MQAR, ZOOLOGY_MIX, ZOOLOGY_TEST, MixtureSlice
from recallax.tasks.overwrites import OverwriteRecall, OverwriteSlice
from recallax.tasks.repeated_context import ContextRepetition, JRTPrompt, PrefixFill, RepeatedContext
from recallax.tasks.set_disjointness import SetDisjointness
from recallax.tasks.state_tracking import StateTracking
from recallax.tasks.task_transform import TaskTransform
from recallax.tasks.text import BPE, Bytes, SentencePiece, Shakespeare, Text, TextFiles, TextSource, Tfds, Tokenizer

__all__ = [
    "BPE",
    "MQAR",
    "SPLITS",
    "ZOOLOGY_MIX",
    "ZOOLOGY_TEST",
    "Bytes",
    "Compression",
    "ContextRepetition",
    "Copying",
    "Encoder",
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
    "RepeatedContext",
    "SelectiveCopying",
    "SentencePiece",
    "SetDisjointness",
    "Shakespeare",
    "Split",
    "StateTracking",
    "Task",
    "TaskTransform",
    "Text",
    "TextFiles",
    "TextSource",
    "Tfds",
    "Tokenizer",
    "batch_rng",
    "masked_prefix_loss_weights",
    "most_frequent_token_accuracy",
]
