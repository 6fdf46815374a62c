"""Recall tasks: streams of labelled sequences, each a pure function of (seed, split, index) with an exact solver.

Every task is a frozen config (`base.Task`); batches are numpy arrays, so a task can be used without the rest of
recallax. Valid and test batches label only what the task asks; their slices (lengths, numbers of pairs) take turns.
"""

from recallax.tasks.base import SPLITS, Split, Task
from recallax.tasks.mqar import MQAR, ZOOLOGY_MIX, ZOOLOGY_TEST, Segment
from recallax.tasks.set_disjointness import SetDisjointness

__all__ = ["MQAR", "SPLITS", "ZOOLOGY_MIX", "ZOOLOGY_TEST", "Segment", "SetDisjointness", "Split", "Task"]
