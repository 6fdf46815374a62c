"""Layer patterns: a hybrid as a string over named blocks.

    pattern := term+        term := (name | "(" pattern ")") ["*" n]

`conv (based window conv*3)*5 conv` is a convolution, five periods of five layers, and a convolution. Every `*n` becomes
one scan over stacked parameters; every occurrence of a name owns its weights.
"""

import re
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from recallax.config import ConfigError, suggest_name
from recallax.external_file import short_repr

MAX_LAYERS = 4_096
"""Largest number of layers; the deepest published transformer has 1,000 (DeepNet, arXiv 2203.00555)."""
MAX_PATTERN_DEPTH = 16
"""Largest number of nested groups."""
MAX_PATTERN_TOKENS = 4 * MAX_LAYERS
"""Largest number of names, counts, brackets and signs in a pattern."""


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
        ConfigError: If the pattern is empty, has a syntax error, contains an unknown name, has more than `MAX_LAYERS`
            layers, or is nested deeper than `MAX_PATTERN_DEPTH`.

    Examples:
        >>> parse_pattern("(mixer mlp)*2", ["mixer", "mlp"])[0].repeat
        2
    """
    tokens = deque(re.findall(r"[A-Za-z_]\w*|[0-9]+|\S", pattern))
    if len(tokens) > MAX_PATTERN_TOKENS:
        raise _too_many_layers(pattern)
    terms = _parse_terms(tokens, block_names, pattern, depth=0)
    if tokens:
        raise ConfigError(f"pattern {short_repr(pattern)} has an unexpected {tokens[0]!r}")
    return terms


def flatten_pattern(terms: tuple[Term, ...]) -> list[str]:
    """Return the name of the block of each layer.

    Args:
        terms: A parsed pattern.

    Returns:
        One name per layer.

    Examples:
        >>> flatten_pattern(parse_pattern("conv (based*2 window)*2", ["conv", "based", "window"]))
        ['conv', 'based', 'based', 'window', 'based', 'based', 'window']
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

    Raises:
        ConfigError: If there are no layers.

    Examples:
        >>> compress_pattern(["based", "based", "window", "based", "based", "window"])
        '(based*2 window)*2'
    """
    names = list(block_names)
    if not names:
        raise ConfigError("there are no layers; a model needs at least one")
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


def _parse_terms(tokens: deque[str], block_names: list[str], pattern: str, depth: int) -> tuple[Term, ...]:
    """Remove the terms of one group from the start of the tokens, and return them."""
    if depth > MAX_PATTERN_DEPTH:
        raise ConfigError(
            f"pattern {short_repr(pattern)} is nested too deep; it may have at most {MAX_PATTERN_DEPTH} nested groups"
        )
    terms: list[Term] = []
    while tokens and tokens[0] != ")":
        body = _parse_body(tokens, block_names, pattern, depth)
        terms.append(Term(body, _parse_repeat(tokens, pattern)))
    if not terms:
        names = ", ".join(block_names)
        raise ConfigError(f"pattern {short_repr(pattern)} has an empty part; name at least one block of {names}")
    if sum(term.num_layers for term in terms) > MAX_LAYERS:
        raise _too_many_layers(pattern)
    return tuple(terms)


def _parse_body(tokens: deque[str], block_names: list[str], pattern: str, depth: int) -> "str | tuple[Term, ...]":
    head = tokens.popleft()
    if head == "(":
        body = _parse_terms(tokens, block_names, pattern, depth + 1)
        if not tokens:
            raise ConfigError(f"pattern {short_repr(pattern)} has a '(' without a ')'")
        tokens.popleft()
        return body
    if head in block_names:
        return head
    if re.fullmatch(r"[A-Za-z_]\w*", head):
        raise ConfigError(
            f"pattern {short_repr(pattern)} names the block {short_repr(head)}, which does not exist"
            f"{suggest_name(head, block_names)}"
        )
    raise ConfigError(
        f"pattern {short_repr(pattern)} has an unexpected {short_repr(head)}; a term is a name or '(' pattern ')'"
    )


def _parse_repeat(tokens: deque[str], pattern: str) -> int:
    """Remove `* n` from the start of the tokens, and return n; 1 if there is none."""
    if not tokens or tokens[0] != "*":
        return 1
    tokens.popleft()
    count = tokens.popleft() if tokens else ""
    if not re.fullmatch("[0-9]+", count) or not (digits := count.lstrip("0")):
        raise ConfigError(f"pattern {short_repr(pattern)} has a '*' without a count of at least 1 after it")
    if len(digits) > len(str(MAX_LAYERS)):
        raise _too_many_layers(pattern)
    return int(digits)


def _too_many_layers(pattern: str) -> ConfigError:
    return ConfigError(f"pattern {short_repr(pattern)} has too many layers; a model may have at most {MAX_LAYERS}")
