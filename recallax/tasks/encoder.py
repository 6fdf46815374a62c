"""The interface between text and the token ids of a task."""

import abc
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


class Encoder(abc.ABC):
    """A loaded tokenizer."""

    bos_id: int
    """The id that begins every document, so that the document's first token is a target too."""
    eos_id: int
    """The id that ends every document."""
    digest: str
    """Equal for encoders that encode every text alike."""

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
        """Encode texts.

        Args:
            texts: Any Unicode texts.

        Returns:
            The token ids of each text, int64. They never contain `bos_id` or `eos_id`, even if a text spells them.
        """

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids.

        Args:
            ids: Any integers.

        Returns:
            The text. Special and unknown ids are skipped; bytes that are not UTF-8 become U+FFFD.
        """
