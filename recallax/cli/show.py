"""`recallax show`: what a config resolves to and what its model costs."""

import json

from recallax.config import fingerprint, to_json
from recallax.models import accounting
from recallax.train.curriculum.parameter_masks import describe_stages
from recallax.train.run_config import RunConfig

CONTEXT_LENGTHS = (256, 1024, 4096, 16_384)
"""Tokens at which state bytes and FLOPs are given besides the task's own lengths."""


def describe_config(name: str, config: RunConfig) -> str:
    """The resolved value, parameters, and state bytes and forward FLOPs per token against context, as text."""
    task, model = config.task, config.model
    vocab, longest = task.vocab_size, max(task.lengths("test"))
    contexts = sorted({*task.lengths("test"), *CONTEXT_LENGTHS})
    flops = accounting.forward_flops(model, longest, vocab) / longest
    labelled = accounting.forward_flops(model, longest, vocab, task.max_targets("test", longest)) / longest
    lines = [
        f"{name}  (fingerprint {fingerprint(config)})",
        json.dumps(to_json(config), indent=2),
        "",
        f"layers            {len(model.layer_names)}: {' '.join(_collapse_repeats(model.layer_names))}",
        f"parameters        {accounting.count_parameters(model, vocab):,}",
        f"  one token takes {accounting.count_active_parameters(model, vocab):,}",
        *(f"  {part:<30}{count:>14,}" for part, count in accounting.parameter_table(model, vocab).items()),
        f"forward FLOPs     {flops:,.0f} per token at {longest} tokens, matrix products only",
        f"                  {labelled:,.0f} with logits at labelled positions only, as in training and evaluation",
        "",
        f"{'context':>12}  {'state bytes':>14}  {'FLOPs per token':>16}",
    ]
    if config.curriculum is not None:
        lines[-2:-2] = ["", "curriculum", *describe_stages(config, config.curriculum)]
    for context in contexts:
        held, spent = accounting.state_bytes(model, context, vocab), accounting.forward_flops(model, context, vocab)
        lines.append(f"{context:>12,}  {held:>14,}  {spent / context:>16,.0f}")
    return "\n".join(lines)


def _collapse_repeats(names: list[str]) -> list[str]:
    """Neighbours of one name as `name*n`."""
    runs: list[list[str]] = []
    for name in names:
        if runs and runs[-1][0] == name:
            runs[-1].append(name)
        else:
            runs.append([name])
    return [run[0] if len(run) == 1 else f"{run[0]}*{len(run)}" for run in runs]
