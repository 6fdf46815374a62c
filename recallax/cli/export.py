"""`recallax export`: write the weights of a run for other programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from recallax.cli.options import parse_options
from recallax.cli.outputs import NewOutputFolder
from recallax.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write the newest checkpoint of a run in a format that other programs read."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    to: Literal["safetensors", "stablehlo", "orbax"]
    """Format: safetensors with a config.json; stablehlo, compiled prefill and step programs; or orbax."""
    out: NewOutputFolder | None = None
    """Folder to create; RUN/export-FORMAT by default."""
    layout: str | None = None
    """safetensors: layout of the weights. Default: that of the import, or the first that fits the model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """safetensors and orbax: dtype of the weights. Default: that of the import, or float32."""
    shard_gb: float | None = None
    """safetensors: maximum size of a file in 10^9 bytes; 50 by default, as in transformers."""
    prefill_length: int = 64
    """stablehlo: maximum number of tokens per call of prefill."""
    max_len: int = 1024
    """stablehlo: maximum length in tokens of a sequence, for which the state has capacity."""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    options = parse_options(ExportOptions, arguments, "export")
    folder = options.out or options.run / f"export-{options.to}"
    if options.to == "stablehlo":
        if (options.layout, options.dtype, options.shard_gb) != (None, None, None):
            raise ConfigError("--layout, --dtype and --shard-gb are options of weights; programs use those of the run")
        from recallax.convert.stablehlo import export_programs

        export_programs(options.run, folder, prefill_length=options.prefill_length, max_len=options.max_len)
        print(f"stablehlo: {folder}")
        return 0
    from recallax.convert import export_run

    layout = export_run(
        options.run, options.to, folder, layout=options.layout, dtype=options.dtype, shard_gb=options.shard_gb
    )
    print(f"{options.to}: {folder}\nlayout: {layout}")
    return 0
