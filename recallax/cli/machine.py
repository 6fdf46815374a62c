"""Description of this machine: versions, devices, extras and the implementations that each op selects."""

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
"""The platform that each kernel implementation needs, by the name of the implementation."""
PLUGIN_PACKAGES = {"cuda12": "jax-cuda12-plugin", "cuda13": "jax-cuda13-plugin", "tpu": "libtpu"}
"""Package that shows whether an extra is installed, for extras that only name an extra of jax."""


def describe_machine() -> str:
    """Return tables of versions, devices, extras and ops."""
    host = environment()
    free_bytes = shutil.disk_usage(".").free
    versions = [f"{name:<14}{host[name]}" for name in ("recallax", "python", "jax", "jaxlib", "cpus")]
    devices = [(str(device), device.device_kind, _device_memory(device)) for device in jax.local_devices()]
    extras = [(name, _extra_status(name, packages)) for name, packages in extra_packages().items()]
    ops = [(op, *describe_implementations(op, table)) for op, table in op_implementations().items()]
    parts = [
        "\n".join([*versions, f"{'disk free':<14}{free_bytes / 2**30:.1f} GiB"]),
        _format_table(("device", "kind", "memory"), devices),
        _format_table(("extra", "state"), extras),
        _format_table(("op", "selects", "also has"), ops),
    ]
    return "\n\n".join(parts)


def op_implementations() -> dict[str, Mapping[str, Any]]:
    """Return the implementations of every op, by the op's name."""
    package = recallax.pallas_kernels
    # `mosaic_gpu` and `mosaic_tpu` hold what the kernels share.
    ops = [m.name for m in pkgutil.iter_modules(package.__path__) if m.ispkg and m.name not in KERNEL_PLATFORMS]
    return {op: importlib.import_module(f"{package.__name__}.{op}").IMPLEMENTATIONS for op in ops}


def describe_implementations(op: str, table: Mapping[str, Any]) -> tuple[str, str]:
    """Describe how an op selects its implementation on this device.

    Args:
        op: Name of the op.
        table: Its implementations by name.

    Returns:
        The implementations that `implementation=None` tries, in order, and the others, each with the reason why it is
        not tried.
    """
    selected = dispatch.candidate_implementations(op, table)
    others = []
    for name in table:
        platform = KERNEL_PLATFORMS.get(name)
        if name in selected or name == "reference":
            continue
        if platform == dispatch.platform():
            others.append(f"{name} (by name only: no recorded run shows that it is faster)")
        else:
            others.append(f"{name} (needs a {platform.upper()})" if platform else f"{name} (by name only)")
    return ", then ".join(selected), ", ".join([*others, "reference (the definition)"])


def extra_packages() -> dict[str, list[str]]:
    """Return the packages that each extra of recallax adds, by the extra's name."""
    packages: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("recallax") or []:
        extra, package = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement), re.match(r"[\w.-]+", requirement)
        if extra and package:
            packages.setdefault(extra[1], []).append(package[0])
    return packages


def _extra_status(name: str, packages: list[str]) -> str:
    required = [PLUGIN_PACKAGES[name]] if name in PLUGIN_PACKAGES else packages
    missing = [package for package in required if not _is_installed(package)]
    return f"lacks {', '.join(missing)}: pip install 'recallax[{name}]'" if missing else "installed"


def _is_installed(package: str) -> bool:
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
