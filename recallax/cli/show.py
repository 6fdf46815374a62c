"""`recallax show`: print a resolved config, and what its model costs."""

import json
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated

import tyro

from recallax.cli.config_files import load_config
from recallax.cli.options import parse_overrides
from recallax.config import fingerprint, to_json
from recallax.models import accounting
from recallax.train.curriculum.stage_phase import describe_stages
from recallax.train.run_config import RunConfig

CONTEXT_LENGTHS = (256, 1024, 4096, 16_384)
"""Context lengths in tokens at which state bytes and FLOPs are printed, besides the lengths of the task."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Print a resolved config, its parameter count, and its state bytes and FLOPs by context length."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    name, *overrides = arguments
    options = parse_overrides(ShowOptions(config=load_config(name)), overrides, f"show {name}")
    print(describe_config(name, options.config))
    return 0


def describe_config(name: str, config: RunConfig) -> str:
    """Describe a config and what its model costs.

    Args:
        name: Name of the config.
        config: The config.

    Returns:
        Its JSON, layers, curriculum and parameter counts, and a table of state bytes per sequence and forward FLOPs per
        token by context length.
    """
    task, model = config.task, config.model
    vocab_size, longest = task.vocab_size, max(task.lengths("test"))
    flops = accounting.forward_flops(model, longest, vocab_size) / longest
    flops_labelled = accounting.forward_flops(model, longest, vocab_size, task.max_targets("test", longest)) / longest
    lines = [
        f"{name}  (fingerprint {fingerprint(config)})",
        json.dumps(to_json(config), indent=2),
        "",
        f"layers            {len(model.layer_names)}: {' '.join(_collapse_repeats(model.layer_names))}",
        f"parameters        {accounting.count_parameters(model, vocab_size):,}",
        f"  used per token  {accounting.count_active_parameters(model, vocab_size):,}",
        *(f"  {part:<30}{count:>14,}" for part, count in accounting.parameter_table(model, vocab_size).items()),
        f"forward FLOPs     {flops:,.0f} per token at {longest} tokens, matrix products only",
        f"                  {flops_labelled:,.0f} with logits at labelled positions only, as in training",
    ]
    if config.curriculum is not None:
        lines += ["", "curriculum", *describe_stages(config, config.curriculum)]
    lines += ["", f"{'context':>12}  {'state bytes':>14}  {'FLOPs per token':>16}"]
    for length in sorted({*task.lengths("test"), *CONTEXT_LENGTHS}):
        state_bytes = accounting.state_bytes(model, length, vocab_size)
        flops = accounting.forward_flops(model, length, vocab_size) / length
        lines.append(f"{length:>12,}  {state_bytes:>14,}  {flops:>16,.0f}")
    return "\n".join(lines)


def _collapse_repeats(names: list[str]) -> list[str]:
    """Write neighbours of one name as `name*n`."""
    runs = [(name, len(list(group))) for name, group in groupby(names)]
    return [name if count == 1 else f"{name}*{count}" for name, count in runs]
