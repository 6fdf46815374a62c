"""Layer patterns: a hybrid as a string over named blocks.

    pattern := term+        term := (name | "(" pattern ")") ["*" n]

`conv (based window conv*3)*5 conv` is a convolution, five periods of five layers, and a convolution. Every `*n` becomes
one scan over stacked parameters; every occurrence of a name owns its weights.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from recallax.config import ConfigError, suggest_name


class Term(NamedTuple):
    """A named block or a group of terms, repeated."""

    body: "str | tuple[Term, ...]"
    """The name of a block, or a group."""
    repeat: int
    """The number of repetitions."""

    @property
    def period(self) -> int:
        """Number of layers in one repetition."""
        return 1 if isinstance(self.body, str) else sum(term.num_layers for term in self.body)

    @property
    def num_layers(self) -> int:
        """Number of layers in all repetitions."""
        return self.period * self.repeat


def parse_pattern(pattern: str, block_names: list[str]) -> tuple[Term, ...]:
    """Parse a pattern.

    Args:
        pattern: The pattern.
        block_names: The names that it may contain.

    Returns:
        The terms.

    Raises:
        ConfigError: If the pattern is empty, has a syntax error, or contains an unknown name.
    """
    tokens = re.findall(r"[A-Za-z_]\w*|\d+|\S", pattern)
    terms, rest = _parse_terms(tokens, block_names, pattern)
    if rest:
        raise ConfigError(f"pattern {pattern!r} has an unexpected {rest[0]!r}")
    return terms


def flatten_pattern(terms: tuple[Term, ...]) -> list[str]:
    """Return the name of the block of each layer.

    Args:
        terms: A parsed pattern.

    Returns:
        One name per layer.
    """
    return [
        name
        for term in terms
        for _ in range(term.repeat)
        for name in ([term.body] if isinstance(term.body, str) else flatten_pattern(term.body))
    ]


def compress_pattern(block_names: Sequence[str]) -> str:
    """Write layers as a pattern with repeats: whole periods as `(...)*n`, runs of one block as `name*n`.

    Args:
        block_names: The name of the block of each layer.

    Returns:
        The pattern. It is short, but not always the shortest.
    """
    names = list(block_names)
    period = next(n for n in range(1, len(names) + 1) if names[:n] * (len(names) // n) == names)
    runs: list[list[str]] = []
    for name in names[:period]:
        if runs and runs[-1][0] == name:
            runs[-1].append(name)
        else:
            runs.append([name])
    body = " ".join(run[0] if len(run) == 1 else f"{run[0]}*{len(run)}" for run in runs)
    count = len(names) // period
    if count == 1:
        return body
    return f"{body}*{count}" if period == 1 else f"({body})*{count}"


def _parse_terms(tokens: list[str], block_names: list[str], pattern: str) -> tuple[tuple[Term, ...], list[str]]:
    terms: list[Term] = []
    while tokens and tokens[0] != ")":
        head, tokens = tokens[0], tokens[1:]
        if head == "(":
            body, tokens = _parse_terms(tokens, block_names, pattern)
            if not tokens:
                raise ConfigError(f"pattern {pattern!r} has a '(' without a ')'")
            tokens = tokens[1:]
        elif head in block_names:
            body = head
        elif re.fullmatch(r"[A-Za-z_]\w*", head):
            raise ConfigError(
                f"pattern {pattern!r} names the block {head!r}, which does not exist{suggest_name(head, block_names)}"
            )
        else:
            raise ConfigError(f"pattern {pattern!r} has an unexpected {head!r}; a term is a name or '(' pattern ')'")
        repeat = 1
        if tokens[:1] == ["*"]:
            if len(tokens) < 2 or not tokens[1].isdigit() or int(tokens[1]) < 1:
                raise ConfigError(f"pattern {pattern!r} has a '*' without a count of at least 1 after it")
            repeat, tokens = int(tokens[1]), tokens[2:]
        terms.append(Term(body, repeat))
    if not terms:
        raise ConfigError(f"pattern {pattern!r} has an empty part; name at least one block of {', '.join(block_names)}")
    return tuple(terms), tokens
