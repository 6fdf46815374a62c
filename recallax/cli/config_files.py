"""The configs that recallax ships, by name."""

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from recallax.config import ConfigError, suggest_name

if TYPE_CHECKING:
    from recallax.train.run_config import RunConfig

CONFIG_DIR = Path(__file__).parent.parent / "configs"
"""Folder of the config files. A config's name is the name of its file."""


def config_names() -> dict[str, str]:
    """Return the first line of each config's docstring, by the config's name. No config is imported."""
    files = sorted(path for path in CONFIG_DIR.glob("*.py") if path.stem != "__init__")
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0] for path in files}


def check_config_name(name: str) -> None:
    """Raise an error that suggests the nearest name if there is no config of this name.

    Args:
        name: Name of a config.

    Raises:
        ConfigError: There is no such config.
    """
    known = list(config_names())
    if name not in known:
        raise ConfigError(f"there is no config {name!r}{suggest_name(name, known)}")


def load_config(name: str) -> "RunConfig":
    """Import a config file and return its config.

    Args:
        name: Name of a config.

    Returns:
        The config.

    Raises:
        ConfigError: There is no such config.
    """
    check_config_name(name)
    return importlib.import_module(f"recallax.configs.{name}").get_config()
