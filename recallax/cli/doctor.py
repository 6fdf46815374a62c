"""`recallax doctor`: what this machine has, and which implementation each op takes on it."""

import importlib
import importlib.metadata
import pkgutil
import re
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import jax

import recallax.pallas_kernels
from recallax.pallas_kernels import dispatch
from recallax.train.log import environment

KERNEL_PLATFORMS = {
    name: platform for platform, names in dispatch.IMPLEMENTATION_ORDER.items() for name in names if name != "xla"
}


def describe_machine() -> str:
    """Versions, devices, extras and ops as text."""
    host = environment()
    free = shutil.disk_usage(".").free
    parts = [
        "\n".join(f"{name:<14}{host[name]}" for name in ("recallax", "python", "jax", "jaxlib", "cpus"))
        + f"\ndisk free     {free / 2**30:.1f} GiB",
        _format_table(
            ("device", "kind", "memory"), [(str(d), d.device_kind, _device_memory(d)) for d in jax.local_devices()]
        ),
        _format_table(
            ("extra", "state"), [(name, _extra_status(name, packages)) for name, packages in extra_packages().items()]
        ),
        _format_table(
            ("op", "takes here", "has besides"),
            [(op, *describe_implementations(op, table)) for op, table in op_implementations().items()],
        ),
    ]
    return "\n\n".join(parts)


def op_implementations() -> dict[str, Mapping[str, Any]]:
    """The forms of every op by name."""
    package = recallax.pallas_kernels
    found = [m.name for m in pkgutil.iter_modules(package.__path__) if m.ispkg]
    return {op: importlib.import_module(f"{package.__name__}.{op}").FORMS for op in found}


def describe_implementations(op: str, table: Mapping[str, Any]) -> tuple[str, str]:
    """What `implementation=None` tries, in order, and why it passes over the others."""
    taken = dispatch.candidate_implementations(op, table)
    besides = []
    for name in table:
        kernel = KERNEL_PLATFORMS.get(name)
        if name in taken or name == "reference":
            continue
        if kernel == dispatch.platform():
            besides.append(f"{name} (by name: no recorded run shows it faster)")
        else:
            besides.append(f"{name} (needs a {kernel.upper()})" if kernel else f"{name} (by name)")
    return ", then ".join(taken), ", ".join([*besides, "reference (the definition)"])


def extra_packages() -> dict[str, list[str]]:
    """The packages that each extra of recallax adds, by name."""
    found: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("recallax") or []:
        extra, package = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement), re.match(r"[\w.-]+", requirement)
        if extra and package:
            found.setdefault(extra[1], []).append(package[0])
    return found


PLUGIN_PACKAGES = {"cuda12": "jax-cuda12-plugin", "cuda13": "jax-cuda13-plugin", "tpu": "libtpu"}
"""What an extra that names jax's own extra comes down to."""


def _extra_status(name: str, packages: list[str]) -> str:
    wanted = [PLUGIN_PACKAGES[name]] if name in PLUGIN_PACKAGES else packages
    missing = [package for package in wanted if not _installed(package)]
    return f"lacks {', '.join(missing)}: pip install 'recallax[{name}]'" if missing else "installed"


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _device_memory(device: Any) -> str:
    stats = device.memory_stats()  # None on a CPU
    return f"{stats['bytes_limit'] / 2**30:.1f} GiB" if stats and "bytes_limit" in stats else ""


def _format_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
