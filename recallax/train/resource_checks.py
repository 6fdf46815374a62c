"""Checks that memory and disk suffice for a run, and messages for the case that they do not."""

import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax

from recallax.train.checkpoint import CheckpointError, Checkpoints
from recallax.train.process_agreement import all_processes_agree, one_line
from recallax.train.program import Program
from recallax.train.run_config import RunConfig
from recallax.types import Batch

HOST_BATCHES = 3
"""Number of batches in the memory of the host: the current one, the next one, and one that is being transferred."""
CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Folder of the control group of this process, with the limit, the use and the statistics of its memory."""


class OutOfMemoryError(RuntimeError):
    """The memory of the host or of a device does not suffice for training."""


@contextmanager
def explain_out_of_memory(config: RunConfig) -> Iterator[None]:
    """Replace errors about exhausted memory by one line with the request and the remedy.

    Args:
        config: Config of the run.

    Raises:
        OutOfMemoryError: Memory was exhausted.
    """
    try:
        yield
    except MemoryError as error:
        raise _out_of_memory("the host", one_line(error), config) from error
    except (RuntimeError, ValueError) as error:  # of XLA; it raises both types
        if "RESOURCE_EXHAUSTED" not in str(error) or isinstance(error, CheckpointError | OutOfMemoryError):
            raise
        request = re.search(r"allocat\w* (\d+) bytes", str(error))
        cause = f"a request of {_format_bytes(int(request[1]))} failed" if request else one_line(error)
        raise _out_of_memory("the device", cause, config) from error


def check_state_memory(program: Program) -> None:
    """Check that the training state fits the memory, before it is allocated.

    Args:
        program: The program of the run.

    Raises:
        OutOfMemoryError: It does not fit.
    """
    num_bytes, config = _state_bytes(program, per_device=True), program.config
    _require("parameters and optimizer state", num_bytes, _device_bytes_limit(), "each device", config)
    if _device_bytes_limit() is None:  # devices of the host share its memory
        total = num_bytes * len(jax.local_devices())
        _require("parameters and optimizer state", total, available_host_bytes(), "the host", config)


def check_step_memory(program: Program, batch: Batch, phase: int) -> None:
    """Compile the training step, and check that its memory is available. The first step does not compile it again.

    Args:
        program: The program of the run, whose state has been allocated.
        batch: A batch.
        phase: Index of the phase.

    Raises:
        OutOfMemoryError: It does not suffice.
    """
    memory = program.step_memory(batch, phase)
    host_bytes = HOST_BATCHES * sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    if memory is not None:
        new_bytes = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        if (limit := _device_bytes_limit()) is not None:
            num_bytes = new_bytes + memory.argument_size_in_bytes + memory.generated_code_size_in_bytes
            _require("the training step", num_bytes, limit, "each device", program.config)
        else:
            host_bytes += new_bytes * len(jax.local_devices())
    _require("the training step and its batches", host_bytes, available_host_bytes(), "the host", program.config)


def check_disk_space(program: Program, checkpoints: Sequence[Checkpoints]) -> None:
    """Check that the disk has space for the checkpoints of runs; all processes must call it.

    A run has `train.max_to_keep` checkpoints, and one more while it writes the next.

    Args:
        program: The program of the runs.
        checkpoints: The checkpoints of each run, on one disk.

    Raises:
        CheckpointError: The disk has too little space.
    """
    folder, size = checkpoints[0].directory, _state_bytes(program, per_device=False)
    count = sum(max(0, program.config.train.max_to_keep + 1 - len(c.steps())) for c in checkpoints)
    free = shutil.disk_usage(folder).free
    if not all_processes_agree(free >= count * size):
        raise CheckpointError(
            f"{folder} has {_format_bytes(free)} of free disk space, but {count} checkpoints of {_format_bytes(size)} "
            f"need {_format_bytes(count * size)}; free some, lower train.max_to_keep, or choose another folder"
        )


def available_host_bytes() -> int | None:
    """Return the memory in bytes that this process can allocate; None where the system does not state it."""
    numbers = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        numbers.append(sum(int(fields[name].split()[0]) for name in ("MemAvailable", "SwapFree")) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    try:
        limit, used = (int((CONTROL_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
        # The use includes the cache of files, which the kernel frees on demand.
        cache = int(statistics["active_file"]) + int(statistics["inactive_file"])
        numbers.append(max(0, limit - used + cache))
    except (OSError, KeyError, ValueError):  # no control group, or "max"
        pass
    return min(numbers, default=None)


def _device_bytes_limit() -> int | None:
    """Return the memory in bytes that JAX can allocate on a device; None for a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def _state_bytes(program: Program, *, per_device: bool) -> int:
    leaves = jax.tree.leaves(program.abstract_state)
    shapes = [leaf.sharding.shard_shape(leaf.shape) if per_device else leaf.shape for leaf in leaves]
    return sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves, strict=True))


def _require(what: str, num_bytes: int, available: int | None, where: str, config: RunConfig) -> None:
    if available is not None and num_bytes > available:
        cause = f"{what} need {_format_bytes(num_bytes)}, and {_format_bytes(available)} are available"
        raise _out_of_memory(where, cause, config)


def _out_of_memory(where: str, cause: str, config: RunConfig) -> OutOfMemoryError:
    train = config.train
    remedies = [f"lower train.batch_size ({train.batch_size})"]
    remedies += [f"raise train.gradient_accumulation_steps ({train.gradient_accumulation_steps})"]
    remedies += ["set model.remat to block"] if config.model.remat == "none" else []
    remedies += [f"lower evaluate.batch_size ({config.evaluate.batch_size}) if it was evaluating"]
    return OutOfMemoryError(f"out of memory on {where}: {cause}; {', '.join(remedies)}")


def _format_bytes(num_bytes: int) -> str:
    number = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"
