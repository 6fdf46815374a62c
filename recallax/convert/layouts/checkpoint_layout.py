"""The interface of a checkpoint layout."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

from recallax.config import ConfigError
from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import KeyMapEntry
from recallax.models.block import BlockModule
from recallax.models.lm import LM, LMConfig


class CheckpointLayout(abc.ABC):
    """A family of checkpoints: how its config.json and its weights correspond to a recallax model."""

    architecture: str | None = None
    """The class that loads the checkpoint; None if config.json names no class."""
    ignored_fields: frozenset[str] = frozenset()
    """Fields of config.json that do not change what the model computes, beside those that every layout ignores."""
    duplicates_tied_head: bool = False
    """A checkpoint with tied embeddings also contains the language model head, because its loader needs it."""

    @abc.abstractmethod
    def from_config_json(self, fields: ConfigFields) -> LMConfig:
        """Convert a config.json to a model config.

        It must read every field that changes what the model computes: the caller rejects the fields that were not read
        and are not in `ignored_fields`.

        Args:
            fields: The fields of config.json.

        Returns:
            The model config; layers that repeat are written as repeats in the pattern.

        Raises:
            ConfigError: If a field is missing, invalid, or has a value that recallax does not support.
        """

    @abc.abstractmethod
    def key_map(self, fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
        """Return the key map of a model.

        Args:
            fields: The fields of config.json.
            model: The model config that `from_config_json` returns for these fields.

        Returns:
            Entries from all keys of the checkpoint to all parameters of the model.
        """

    def to_config_json(self, model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
        """Convert a model to the fields of a config.json.

        The result may describe another model where the layout cannot represent this one: the caller compares the two.

        Args:
            model: The model; its arrays may be abstract.
            layers: Its layers in order.

        Returns:
            The fields of config.json without `architectures`, `model_type` and `dtype`.

        Raises:
            ConfigError: If the layout cannot represent the model.
        """
        raise ConfigError("each model of this layout has a layer type that recallax lacks, so none can be exported")

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Return whether a config.json has this layout although its `model_type` is not the layout's name.

        Args:
            config: The parsed config.json.

        Returns:
            False by default.
        """
        return False
