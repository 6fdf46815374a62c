"""Chooses an implementation of an op: the one that is named, or the first that the device and the arguments allow.

A form is a function with the op's own arguments. One that cannot run here, or not on these arguments, raises
`Unsupported` with the reason while it is traced. A form that was named then fails with that reason; otherwise the next
one is tried. Kernels need the device they are written for, except inside `interpreted()`, where Pallas' interpreters
run them on any machine.
"""

import contextlib
import contextvars
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax

from recallax.config import suggest_name

type Platform = Literal["cpu", "gpu", "tpu"]

IMPLEMENTATION_ORDER: dict[Platform, tuple[str, ...]] = {
    "cpu": ("xla",),
    "gpu": ("mosaic_gpu", "cudnn", "xla"),
    "tpu": ("mosaic_tpu", "splash", "xla"),
}
"""What `implementation=None` tries. A kernel is tried for the ops in `VERIFIED` only; until then it runs by name."""

VERIFIED: frozenset[tuple[str, str]] = frozenset()
"""(op, form) with a checked-in row that shows it agrees with the reference and is faster there than the XLA form."""

_xla_only = contextvars.ContextVar("portable", default=False)
_interpret_kernels = contextvars.ContextVar("interpreting", default=False)


class Unsupported(NotImplementedError):
    """Why a form declines its arguments or the device."""


def call_implementation(
    op: str, implementations: Mapping[str, Callable[..., Any]], implementation: str | None, *arguments: Any
) -> Any:
    """The result of the form that `implementation` names, or of the first that takes the arguments.

    Raises ValueError for a name the op does not have, and Unsupported with the reasons of all that were tried.
    """
    if implementation is not None and implementation not in implementations:
        raise ValueError(
            f"{op} has no implementation {implementation!r}{suggest_name(implementation, list(implementations))}"
        )
    reasons = []
    for name in candidate_implementations(op, implementations) if implementation is None else (implementation,):
        try:
            return implementations[name](*arguments)
        except Unsupported as reason:
            reasons.append(f"{name}: {reason}")
    raise Unsupported(f"{op} cannot run: {'; '.join(reasons)}")


def candidate_implementations(op: str, implementations: Mapping[str, Callable[..., Any]]) -> list[str]:
    """What `implementation=None` tries for the platform at hand, in order."""
    if _xla_only.get():
        return ["xla"]
    return [
        name
        for name in IMPLEMENTATION_ORDER[platform()]
        if name in implementations and (name == "xla" or (op, name) in VERIFIED)
    ]


def platform() -> Platform:
    """What is being traced for: the device of an abstract mesh where one is set, else the default backend's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("gpu", "cuda", "rocm") else "tpu" if name == "tpu" else "cpu"


@contextlib.contextmanager
def xla_only() -> Iterator[None]:
    """Within it `implementation=None` takes the XLA form: for programs that are traced here and run anywhere."""
    token = _xla_only.set(True)
    try:
        yield
    finally:
        _xla_only.reset(token)


@contextlib.contextmanager
def interpret_kernels() -> Iterator[None]:
    """Within it Pallas' interpreters run the kernels on any machine: slow, for tests and to look inside."""
    token = _interpret_kernels.set(True)
    try:
        yield
    finally:
        _interpret_kernels.reset(token)


def use_interpreter(kernel_platform: Platform) -> bool:
    """Whether a kernel for that platform is to be interpreted. Raises Unsupported where it can run in no way."""
    if _interpret_kernels.get():
        return True
    if platform() != kernel_platform:
        raise Unsupported(
            f"it is for a {kernel_platform.upper()} and this is a {platform().upper()}; `interpreted()` runs it"
        )
    return False


def lazy_kernel(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of a kernel's module, imported when it is first called: Pallas takes long to load."""

    def form(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments)

    return form


def require(op: str, condition: bool, message: str) -> None:
    """Raise ValueError `op: what` unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: {message}")
