"""The interface between text and the token ids of a task."""

import abc
import itertools
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

        Raises:
            ConfigError: The vocabulary has no id for a part of a text, or only a boundary id.
        """

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids.

        Args:
            ids: Any integers.

        Returns:
            The text. Special and unknown ids are skipped; bytes that are not UTF-8 become U+FFFD.
        """

    def decode_continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Decode token ids that continue a prompt.

        Many decoders remove a space at the start of a text. It stays here, because the ids are decoded together with
        the prompt.

        Args:
            prompt: Token ids of the prompt.
            ids: Token ids after the prompt.

        Returns:
            The text after that of the prompt. A character whose bytes the prompt begins belongs to it.
        """
        whole = self.decode([*prompt, *ids])
        common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.decode(prompt), whole, strict=False))
        return whole[len(list(common)) :]
