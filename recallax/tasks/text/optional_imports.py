"""Imports of optional libraries."""

import importlib
from typing import Any

from recallax.config import ConfigError


def import_optional(name: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional library.

    Args:
        name: Name of the module.
        extra: The extra of recallax that installs it.
        purpose: What needs it, for the error message.

    Returns:
        The module.

    Raises:
        ConfigError: The module cannot be imported; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{purpose} needs the package {name} ({error}): pip install 'recallax[{extra}]'") from error
