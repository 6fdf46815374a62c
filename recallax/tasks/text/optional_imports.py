"""Libraries that only some text needs: imported where they are used, named with their extra where they are missing."""

import importlib
from typing import Any

from recallax.config import ConfigError


def import_optional(name: str, extra: str, purpose: str) -> Any:
    """The module. Raises ConfigError naming the extra that brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{purpose} needs the package {name} ({error}): pip install 'recallax[{extra}]'") from error
