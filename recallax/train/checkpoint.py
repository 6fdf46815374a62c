"""Checkpoints with checksums, which are verified when they are restored.

orbax stores the arrays (its v0 `CheckpointManager`, which is wrapped so that nothing else depends on it). This module
adds what orbax does not guarantee: a checksum per leaf, because orbax restores an array with a flipped bit without an
error; the saved dtypes, because orbax casts to another dtype without an error; a fallback to the step before a damaged
one; and one type of error, raised by the call that failed. Nothing is pickled. A folder of checkpoints contains

    <step>/        a checkpoint
    trash/         checkpoints that are being deleted
    quarantine/    damaged checkpoints, for inspection
"""

import hashlib
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from recallax.train.leaf_checksums import describe_leaves, leaf_differences
from recallax.train.log import environment

type PyTree = Any
"""Any pytree of jax arrays, typed PRNG keys included."""
type Metadata = dict[str, Any]


REMOVE_ATTEMPTS, REMOVE_INTERVAL_SECONDS = 40, 0.05
"""Attempts to remove the files of a failed save while orbax may still write them: two seconds in all."""
MAX_ERROR_LENGTH = 300
"""Characters of an error of orbax that are shown."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none can be restored; the message has the step, path and cause."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was skipped, or a run resumes with other versions or devices."""


class RestoredCheckpoint(NamedTuple):
    """A verified checkpoint."""

    step: int
    state: PyTree
    metadata: Metadata
    """The metadata given to `save`, and `environment`, the versions and devices that wrote it."""


class Checkpoints:
    """The checkpoints of a run; a context manager that closes them.

    A reader (`max_to_keep=None`) changes nothing in the folder, and may read while a job writes. A writer must have
    locked the run, because it removes the files of interrupted saves.

    Saving is synchronous: when `save` returns, the checkpoint is on disk, and a full disk is an error of that save and
    not of a later one. All processes of a run must make every call, on a shared folder. Checksums then cover the leaves
    that a process can read completely, not arrays that are sharded between processes.

    Args:
        directory: The folder.
        max_to_keep: Number of checkpoints to keep; None to open for reading only.

    Raises:
        CheckpointError: The folder cannot be opened.
    """

    def __init__(self, directory: Path | str, max_to_keep: int | None = 2) -> None:
        self.directory = Path(directory).absolute()
        self._writable = max_to_keep is not None
        self._manager = _make_manager(self.directory, max_to_keep)

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
        """Write a checkpoint.

        Args:
            step: Number of the step.
            state: A tree of jax arrays.
            metadata: JSON values, such as the config and its fingerprint.

        Raises:
            CheckpointError: The checkpoint was not written; older ones are unchanged.
            ValueError: A number in `metadata` is not finite.
            TypeError: `metadata` is not JSON, or a leaf of `state` is not a jax array.
        """
        import orbax.checkpoint as ocp

        body = {"meta": {**metadata, "environment": environment()}, "leaves": describe_leaves(state)}
        body = json.loads(json.dumps(body, allow_nan=False))  # as restore reads it
        record = ocp.args.JsonSave({"body": body, "sha256": _json_sha256(body)})
        if not self.directory.is_dir():  # orbax would create a new folder, without the older steps
            raise CheckpointError(f"step {step} was not saved: {self.directory} does not exist any more; restore it")
        try:
            self._manager.reload()  # its cached list of steps is wrong after a failed save or a quarantine
            saved = self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=record))
        except Exception as error:  # orbax and tensorstore raise nearly every type
            self._remove_temporary(step)
            raise CheckpointError(f"step {step} was not saved in {self.directory}: {_one_line(error)}") from error
        if not saved:
            raise CheckpointError(f"step {step} was not saved in {self.directory}, which has steps {self.steps()}")
        shutil.rmtree(self.directory / "trash", ignore_errors=True)  # if this fails, the next save removes it

    def restore(self, abstract_state: PyTree) -> RestoredCheckpoint | None:
        """Restore the newest checkpoint that is not damaged.

        Damaged checkpoints are skipped with a CheckpointWarning, and moved to quarantine if an older one is restored.

        Args:
            abstract_state: A tree of `jax.ShapeDtypeStruct` or arrays; a leaf without sharding is restored to the first
                local device.

        Returns:
            The checkpoint, with the shardings of `abstract_state`, or None if the folder has no checkpoint.

        Raises:
            CheckpointError: All checkpoints are damaged; they remain in place. Or the newest one that is not damaged
                has other leaves, shapes or dtypes than `abstract_state`.
        """
        target, expected = _with_shardings(abstract_state), describe_leaves(abstract_state)
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            restored, cause = self._try_restore(step, target, expected)
            if restored is not None:
                self._quarantine(damaged)
                _warn_of_changed_environment(restored)
                return restored
            damaged[step] = cause
        if damaged:
            causes = "\n".join(f"  {self.directory / str(step)}: {cause}" for step, cause in damaged.items())
            raise CheckpointError(
                f"no checkpoint can be restored:\n{causes}\nrepair one, or move all away to train from the start"
            )
        return None

    def steps(self) -> list[int]:
        """Return the steps on disk in ascending order; reads the folder at every call, and ignores symbolic links."""
        if not self.directory.is_dir():
            return []
        entries = [e for e in os.scandir(self.directory) if e.is_dir(follow_symlinks=False)]
        return sorted(int(e.name) for e in entries if e.name.isascii() and e.name.isdecimal())

    def wait(self) -> None:
        """Block until no checkpoint is being written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Stop the threads of orbax."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _try_restore(
        self, step: int, target: PyTree, expected: dict[str, Metadata]
    ) -> tuple[RestoredCheckpoint | None, str]:
        """Return the checkpoint, or None and the cause of the damage; the same in all processes."""
        restored, cause = None, "another process found it damaged"
        try:
            restored = self._restore_step(step, target, expected)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged file makes orbax raise nearly every type
            cause = _one_line(error)
        return (restored, "") if _all_processes_agree(restored is not None) else (None, cause)

    def _restore_step(self, step: int, target: PyTree, expected: dict[str, Metadata]) -> RestoredCheckpoint:
        import orbax.checkpoint as ocp

        record = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        body = record["body"]
        if _json_sha256(body) != record["sha256"]:
            raise ValueError("its description does not match its checksum")
        if problems := leaf_differences(body["leaves"], expected):
            raise CheckpointError(
                f"{self.directory / str(step)} does not fit this state:\n  "
                + "\n  ".join(problems)
                + "\nrun the code and config that wrote it, or start in a new folder"
            )
        state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))).state
        for name, leaf in describe_leaves(state).items():
            saved = body["leaves"][name]["sha256"]
            if None not in (saved, leaf["sha256"]) and saved != leaf["sha256"]:
                raise ValueError(f"state{name} does not match its checksum")
        return RestoredCheckpoint(step, state, body["meta"])

    def _quarantine(self, damaged: Mapping[int, str]) -> None:
        for step, cause in damaged.items():
            source, target = self.directory / str(step), self.directory / "quarantine" / str(step)
            action = f"moved to {target}" if self._writable else "skipped"
            warnings.warn(f"{source} is damaged and was {action}: {cause}", CheckpointWarning, stacklevel=3)
            if self._writable and jax.process_index() == 0:
                target.parent.mkdir(exist_ok=True)
                shutil.rmtree(target, ignore_errors=True)  # the same step, damaged before the run was resumed
                source.rename(target)
        if damaged:
            _all_processes_agree(True)  # other processes must not list the folder before process 0 is done

    def _remove_temporary(self, step: int) -> None:
        """Remove the files of a failed save, which orbax may still be writing, since the disk may be full."""
        for _ in range(REMOVE_ATTEMPTS):
            for path in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(REMOVE_INTERVAL_SECONDS)
            if not any(self.directory.glob(f"{step}.orbax-checkpoint-tmp*")):
                return


def _make_manager(directory: Path, keep: int | None) -> Any:
    import orbax.checkpoint as ocp

    if keep is None and not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist, so there is no checkpoint to read")
    writing: dict[str, Any] = {
        "max_to_keep": keep,
        "todelete_subdir": "trash",  # a kill while deleting in place would leave a part of a step
        "cleanup_tmp_directories": True,
    }
    reading: dict[str, Any] = {"read_only": True, "create": False, "save_interval_steps": 0}
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **(reading if keep is None else writing))
    logger = logging.getLogger("absl")
    logger.addFilter(_is_not_read_only_warning)
    try:
        return ocp.CheckpointManager(directory, options=options)
    except Exception as error:  # orbax raises nearly every type
        raise CheckpointError(f"{directory} cannot be opened for checkpoints: {_one_line(error)}") from error
    finally:
        logger.removeFilter(_is_not_read_only_warning)


def _is_not_read_only_warning(record: logging.LogRecord) -> bool:
    """Return False for orbax's warning that a read-only manager is read only."""
    return "read only" not in record.getMessage()


def _json_sha256(body: Metadata) -> str:
    """Return the SHA-256 of the canonical JSON. Raises ValueError or TypeError for values that are not JSON."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _with_shardings(abstract_state: PyTree) -> PyTree:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default), abstract_state
    )


def _warn_of_changed_environment(restored: RestoredCheckpoint) -> None:
    """Warn if a run resumes with other versions or devices, which may change the rounding of results."""
    old, new = restored.metadata["environment"], environment()
    changes = [f"{name} {old.get(name)!r} -> {new[name]!r}" for name in new if old.get(name) != new[name]]
    if changes:
        warnings.warn(
            f"step {restored.step} resumes in another environment, so not bit for bit: {', '.join(changes)}",
            CheckpointWarning,
            stacklevel=3,
        )


def _all_processes_agree(verdict: bool) -> bool:
    """Return True if `verdict` is True in every process; also a barrier between them."""
    if jax.process_count() == 1:
        return verdict
    return bool(multihost_utils.process_allgather(np.asarray(verdict)).all())


def _one_line(error: Exception) -> str:
    """Return the type and the start of the text of an error on one line; tensorstore's texts have kilobytes."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_ERROR_LENGTH]
