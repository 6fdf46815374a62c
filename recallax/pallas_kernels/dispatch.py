"""Select an implementation of an op: the one that is named, or the first that the device and the arguments allow.

An implementation is a function that takes the op's validated arguments. If it does not support the device or the
arguments, it raises `Unsupported` with the reason while it is traced. A named implementation then fails with that
reason; with `implementation=None` the next candidate is tried. Kernels need the device that they are written for,
except within `interpret_kernels()`, where Pallas' interpreters run them on any machine.
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
"""Candidates of `implementation=None`. A kernel is a candidate for the ops in `VERIFIED` only; others run by name."""

VERIFIED: frozenset[tuple[str, str]] = frozenset()
"""(op, implementation) pairs with a checked-in benchmark row: it agrees with the reference and is faster than XLA."""

_xla_only = contextvars.ContextVar("xla_only", default=False)
_interpret_kernels = contextvars.ContextVar("interpret_kernels", default=False)


class Unsupported(NotImplementedError):
    """The reason why an implementation does not support its arguments or the device."""


def call_implementation(
    op: str, implementations: Mapping[str, Callable[..., Any]], implementation: str | None, *args: Any
) -> Any:
    """Call the named implementation, or the first candidate that supports the arguments.

    Args:
        op: Name of the op, for error messages and for `VERIFIED`.
        implementations: Functions by name, all with the same arguments.
        implementation: Name of the implementation; None tries the candidates of the platform in order.
        *args: Arguments of the implementation: one NamedTuple, which `reference.py` of the op declares.

    Returns:
        The result of the implementation.

    Raises:
        ValueError: The op has no implementation of that name.
        Unsupported: No implementation that was tried supports the arguments; the message lists all reasons.
    """
    if implementation is not None and implementation not in implementations:
        raise ValueError(
            f"{op} has no implementation {implementation!r}{suggest_name(implementation, list(implementations))}"
        )
    reasons = []
    for name in candidate_implementations(op, implementations) if implementation is None else (implementation,):
        try:
            return implementations[name](*args)
        except Unsupported as reason:
            reasons.append(f"{name}: {reason}")
    raise Unsupported(f"{op} cannot run: {'; '.join(reasons)}")


def candidate_implementations(op: str, implementations: Mapping[str, Callable[..., Any]]) -> list[str]:
    """Return the names of the implementations that `implementation=None` tries on the current platform, in order.

    Args:
        op: Name of the op.
        implementations: Functions by name.
    """
    if _xla_only.get():
        return ["xla"]
    return [
        name
        for name in IMPLEMENTATION_ORDER[platform()]
        if name in implementations and (name == "xla" or (op, name) in VERIFIED)
    ]


def platform() -> Platform:
    """The platform that is traced for: the device of an abstract mesh if one is set, else the default backend's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("gpu", "cuda", "rocm") else "tpu" if name == "tpu" else "cpu"


@contextlib.contextmanager
def xla_only() -> Iterator[None]:
    """Context in which `implementation=None` selects the XLA implementation.

    For programs that are exported here and run on any platform.
    """
    token = _xla_only.set(True)
    try:
        yield
    finally:
        _xla_only.reset(token)


@contextlib.contextmanager
def interpret_kernels(enabled: bool = True) -> Iterator[None]:
    """Context in which Pallas' interpreters run the kernels on any machine. Slow; for tests and debugging.

    Args:
        enabled: False: kernels inside are compiled, also within another such context.
    """
    token = _interpret_kernels.set(enabled)
    try:
        yield
    finally:
        _interpret_kernels.reset(token)


def interpreting() -> bool:
    """True within `interpret_kernels()`.

    Kernels read it where they call `pl.pallas_call`, while they are traced. A function that `jax.jit` has already
    traced keeps the value of that trace, and a backward pass that is traced outside the context is not interpreted, so
    enter the context around the whole computation.
    """
    return _interpret_kernels.get()


def require_platform(kernel_platform: Platform) -> None:
    """Raise Unsupported unless kernels for a platform can run here, on a device or in the interpreter.

    Args:
        kernel_platform: The platform that the kernel is written for.

    Raises:
        Unsupported: The current platform differs and kernels are not interpreted.
    """
    if not interpreting() and platform() != kernel_platform:
        raise Unsupported(
            f"it is for a {kernel_platform.upper()} and this is a {platform().upper()}; "
            "`recallax.pallas_kernels.dispatch.interpret_kernels()` runs it in an interpreter"
        )


def use_interpreter(kernel_platform: Platform) -> bool:
    """Check `require_platform` and return `interpreting()`."""
    require_platform(kernel_platform)
    return interpreting()


def lazy_kernel(module: str, name: str) -> Callable[..., Any]:
    """Return a function that imports a kernel's module when it is first called: importing Pallas is slow.

    Args:
        module: Import path of the module below `recallax.pallas_kernels`.
        name: Name of the function in the module.
    """

    def kernel(*args: Any) -> Any:
        return getattr(importlib.import_module(f"recallax.pallas_kernels.{module}"), name)(*args)

    return kernel


def lazy_kernels(op: str, *modules: str) -> dict[str, Callable[..., Any]]:
    """Return the kernels of an op by module name; each module is imported when its kernel is first called.

    Args:
        op: Name of the op, of its package and of the function in each module.
        *modules: Names of modules in the op's package, which are the names of the implementations.
    """
    return {module: lazy_kernel(f"{op}.{module}", op) for module in modules}


def require(op: str, condition: bool, message: str) -> None:
    """Raise ValueError `op: message` unless the condition holds.

    Args:
        op: Name of the op.
        condition: The rule.
        message: What is wrong and what the rule is.

    Raises:
        ValueError: The condition does not hold.
    """
    if not condition:
        raise ValueError(f"{op}: {message}")
