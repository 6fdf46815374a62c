"""`recallax import`: make a run from an export or from a published model."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from recallax.cli.config_files import load_config
from recallax.cli.options import parse_options
from recallax.cli.outputs import OutputFolder


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Make a run from exported or published weights. train, eval and export can then open it."""

    path: tyro.conf.Positional[Path]
    """Folder with config.json and *.safetensors, or one that `export --to orbax` wrote."""
    run: OutputFolder | None = None
    """Folder of the new run; runs/imported_LAYOUT-FINGERPRINT by default."""
    config: str = "mqar_micro"
    """Config whose task, optimizer and schedule a published model gets. Weights in recallax's layout have their own."""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    options = parse_options(ImportOptions, arguments, "import")
    base_config = load_config(options.config)
    from recallax.convert import import_run

    print(f"run: {import_run(options.path, base_config, options.run)}")
    return 0
