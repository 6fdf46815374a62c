"""What stands between text and the token ids of a task that has text."""

import abc
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


class Encoder(abc.ABC):
    """A tokenizer that is ready for use."""

    bos_id: int
    """The id that every document begins with, so that its first token is predicted too."""
    eos_id: int
    """The id that every document ends with."""
    digest: str
    """Equal where the same text becomes the same ids."""

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
        """The ids of each text alone, int64; no text becomes `bos_id` or `eos_id`, whatever it says."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text; ids that stand for none are left out, bytes that are no UTF-8 are replaced."""
