"""Chooses an implementation of an op by name, or the first in a fixed order."""

from collections.abc import Callable, Mapping

from recallax.config import nearest

ORDER = ("xla",)
"""What `implementation=None` tries. A kernel joins the order of its device with a checked-in row that shows it agrees
with the reference and is faster there; until then it runs by name only."""


def choose[F: Callable](op: str, forms: Mapping[str, F], implementation: str | None) -> F:
    """The form that `implementation` names. Raises ValueError for a name the op does not have."""
    if implementation is None:
        implementation = next(name for name in ORDER if name in forms)
    if implementation not in forms:
        raise ValueError(f"{op} has no implementation {implementation!r}{nearest(implementation, list(forms))}")
    return forms[implementation]


def require(op: str, condition: bool, what: str) -> None:
    """Raise ValueError `op: what` unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: {what}")
