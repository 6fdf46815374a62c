"""Checkpoints with checksums, which are verified when they are restored.

orbax stores the arrays (its v0 `CheckpointManager`, which is wrapped so that nothing else depends on it). This module
adds what orbax does not guarantee: checksums of all leaves, because orbax restores an array with a flipped bit without
an error; the saved dtypes, because orbax casts to another dtype without an error; a comparison with the config of the
run; a fallback to the step before a damaged one; files that survive a power loss; and one type of error, raised by the
call that failed. Nothing is pickled. A folder of checkpoints contains

    <step>/        a checkpoint
    trash/         checkpoints that are being deleted
    quarantine/    damaged checkpoints, for inspection
"""

import shutil
import time
import warnings
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from recallax.atomic_files import replace_path, sync_tree
from recallax.config import Config
from recallax.paths import reject_links
from recallax.train.checkpoint_description import (
    DESCRIPTION_ITEM,
    Metadata,
    list_steps,
    make_description,
    read_description,
    recorded_differences,
)
from recallax.train.leaf_checksums import damaged_leaves, describe_leaves, leaf_differences, leaf_forms
from recallax.train.log import environment
from recallax.train.process_agreement import OTHER_PROCESS, all_processes_agree, one_line, try_in_all_processes

type PyTree = Any
"""Any pytree of jax arrays, typed PRNG keys included."""

REMOVE_ATTEMPTS, REMOVE_INTERVAL_SECONDS = 40, 0.05
"""Attempts to remove the files of a failed save while orbax may still write them: two seconds in all."""


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

    A reader (`max_to_keep=None`) changes nothing in the folder, and may read while a job saves and deletes
    checkpoints. A writer must have locked the run, because it removes the files of interrupted saves.

    Saving is synchronous: when `save` returns, the checkpoint is on disk and survives a power loss, and a full disk is
    an error of that save and not of a later one. All processes of a run must make every call, on a shared folder.

    Args:
        directory: The folder.
        max_to_keep: Number of checkpoints to keep; None to open for reading only.

    Raises:
        CheckpointError: The folder cannot be opened.
        SymlinkError: A writer could write or delete outside of the folder, through a symbolic link in it.
    """

    def __init__(self, directory: Path | str, max_to_keep: int | None = 2) -> None:
        self.directory = Path(directory).absolute()
        if max_to_keep is None and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} does not exist, so there is no checkpoint to read")
        self._written_folders = [self.directory / name for name in ("", "quarantine", "trash")]
        if max_to_keep is not None:
            reject_links(*self._written_folders)
        self._manager = None if max_to_keep is None else _make_manager(self.directory, max_to_keep)

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
        description = ocp.args.JsonSave(make_description(body))
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), **{DESCRIPTION_ITEM: description})
        if self._manager is None:
            raise CheckpointError(f"step {step} was not saved: {self.directory} is open for reading only")
        if not self.directory.is_dir():  # orbax would create a new folder, without the older steps
            raise CheckpointError(f"step {step} was not saved: {self.directory} does not exist any more; restore it")
        reject_links(*self._written_folders)
        try:
            self._manager.reload()  # its cached list of steps is wrong after a failed save or a quarantine
            saved = self._manager.save(step, args=items)
            if saved and jax.process_index() == 0:
                sync_tree(self.directory / str(step))  # orbax does not
        except Exception as error:  # orbax and tensorstore raise nearly every type
            self._remove_temporary(step)
            raise CheckpointError(f"step {step} was not saved in {self.directory}: {one_line(error)}") from error
        if not saved:
            raise CheckpointError(f"step {step} was not saved in {self.directory}, which has steps {self.steps()}")
        shutil.rmtree(self.directory / "trash", ignore_errors=True)  # if this fails, the next save removes it

    def restore(
        self,
        abstract_state: PyTree,
        config: Config | None = None,
        *,
        step: int | None = None,
        find_problem: Callable[[PyTree], str] = lambda state: "",
    ) -> RestoredCheckpoint | None:
        """Restore the newest checkpoint that is not damaged.

        Damaged checkpoints are skipped with a CheckpointWarning, and a writer moves them to quarantine if an older one
        is restored. A checkpoint that was deleted while a reader opened it does not count: the folder is listed again.

        Args:
            abstract_state: A tree of `jax.ShapeDtypeStruct` or arrays; a leaf without sharding is restored to the first
                local device.
            config: Config of the run. None: do not check which run wrote the checkpoint.
            step: The only step to restore. None: the newest that is not damaged.
            find_problem: Returns why an intact state counts as damaged; an empty text if it does not. It must return
                the same in all processes.

        Returns:
            The checkpoint, with the shardings of `abstract_state`, or None if the folder has no checkpoint.

        Raises:
            CheckpointError: All checkpoints are damaged; they remain in place. Or the newest one that is not damaged
                was written with another config, or has other leaves, shapes or dtypes than `abstract_state`.
        """
        target = _with_shardings(abstract_state)
        failed: dict[int, str] = {}
        while (candidate := self._newest_step(failed, step)) is not None:
            restored, cause = self._try_restore(candidate, target, config)
            cause = cause if restored is None else find_problem(restored.state)
            if restored is not None and not cause:
                self._quarantine(failed)
                _warn_of_changed_environment(restored)
                return restored
            failed[candidate] = cause
        if damaged := self._still_there(failed):
            causes = "\n".join(f"  {self.directory / str(step)}: {cause}" for step, cause in damaged.items())
            raise CheckpointError(
                f"no checkpoint can be restored:\n{causes}\nrepair one, or start the run in a new folder"
            )
        return None

    def steps(self) -> list[int]:
        """Return the steps on disk in ascending order; reads the folder at every call, and ignores symbolic links."""
        return list_steps(self.directory)

    def wait(self) -> None:
        """Block until no checkpoint is being written."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Stop the threads of orbax."""
        if self._manager is not None:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _newest_step(self, failed: Container[int], only: int | None) -> int | None:
        """Return the newest step on disk that has not failed, which process 0 selects; None if there is none.

        If `only` is a step, other steps do not count.
        """
        newest = max((n for n in self.steps() if n not in failed and only in (None, n)), default=-1)
        if jax.process_count() > 1:
            newest = int(multihost_utils.broadcast_one_to_all(np.int64(newest)))
        return None if newest < 0 else newest

    def _try_restore(self, step: int, target: PyTree, config: Config | None) -> tuple[RestoredCheckpoint | None, str]:
        """Return the checkpoint, or None and the cause of the damage; the same in all processes."""
        folder = self.directory / str(step)
        body, cause = try_in_all_processes(lambda: read_description(folder))
        if body is None:
            return None, cause
        _check_fit(folder, body, target, config)
        state, cause = try_in_all_processes(lambda: _read_state(folder / "state", target))
        if state is None:
            return None, cause
        damaged = damaged_leaves(state, body["leaves"])
        if not all_processes_agree(not damaged):
            return None, f"state{damaged[0]} does not match its checksum" if damaged else OTHER_PROCESS
        return RestoredCheckpoint(step, state, body["meta"]), ""

    def _still_there(self, failed: Mapping[int, str]) -> dict[int, str]:
        """Return the checkpoints that could not be restored, without those that were deleted meanwhile."""
        steps = self.steps()
        return {step: cause for step, cause in failed.items() if step in steps}

    def _quarantine(self, failed: Mapping[int, str]) -> None:
        for step, cause in self._still_there(failed).items():
            source, target = self.directory / str(step), self.directory / "quarantine" / str(step)
            action = "skipped" if self._manager is None else f"moved to {target}"
            warnings.warn(f"{source} is damaged and was {action}: {cause}", CheckpointWarning, stacklevel=3)
            if self._manager is not None and jax.process_index() == 0:
                target.parent.mkdir(exist_ok=True)
                shutil.rmtree(target, ignore_errors=True)  # the same step, damaged before the run was resumed
                replace_path(source, target)
        if failed:
            all_processes_agree(True)  # other processes must not list the folder before process 0 is done

    def _remove_temporary(self, step: int) -> None:
        """Remove the files of a failed save, which orbax may still be writing, since the disk may be full."""
        for _ in range(REMOVE_ATTEMPTS):
            for path in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(REMOVE_INTERVAL_SECONDS)
            if not any(self.directory.glob(f"{step}.orbax-checkpoint-tmp*")):
                return


def _make_manager(directory: Path, max_to_keep: int) -> Any:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep,
        todelete_subdir="trash",  # a kill while deleting in place would leave a part of a step
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
    )
    try:
        return ocp.CheckpointManager(directory, options=options)
    except Exception as error:  # orbax raises nearly every type
        raise CheckpointError(f"{directory} cannot be opened for checkpoints: {one_line(error)}") from error


def _read_state(folder: Path, target: PyTree) -> PyTree:
    """Read arrays in this process, without a barrier: processes may meet different damage."""
    import orbax.checkpoint as ocp
    from etils import epath

    handler = ocp.StandardCheckpointHandler()
    try:
        return handler.restore(epath.Path(folder), args=ocp.args.StandardRestore(target))
    finally:
        handler.close()


def _check_fit(checkpoint: Path, body: Metadata, target: PyTree, config: Config | None) -> None:
    """Raise CheckpointError if another config or another state wrote the checkpoint; the same in all processes."""
    if config is not None and (differences := recorded_differences(body["meta"], config)):
        raise CheckpointError(
            f"{checkpoint} was written by a run of another config (checkpoint -> run):\n  "
            + "\n  ".join(differences)
            + "\nrestore the config.json of the run, or move this checkpoint to the run that wrote it"
        )
    if problems := leaf_differences(body["leaves"], leaf_forms(target)):
        raise CheckpointError(
            f"{checkpoint} does not fit this state:\n  "
            + "\n  ".join(problems)
            + "\nrun the code and config that wrote it, or start in a new folder"
        )


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
