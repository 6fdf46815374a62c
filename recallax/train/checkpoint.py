"""Checkpoints that are proven before they are trusted.

orbax stores the arrays (its v0 `CheckpointManager`, wrapped so that nothing else depends on it). What it does not
promise is added here: a checksum per leaf, since a flipped bit in an array restores without complaint; the saved
dtypes, since another dtype is cast without complaint; a fall back to the step before a damaged one; and errors of one
type at the call that failed. Nothing is pickled. In a folder of checkpoints:

    <step>/  a checkpoint        trash/  on its way to deletion        quarantine/  damaged steps, kept for a look
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
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from recallax.train.log import environment

type PyTree = Any
"""Any pytree of jax arrays, typed PRNG keys included."""
type Metadata = dict[str, Any]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none can be restored; the message names step, path and cause."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over, or one is continued under other circumstances."""


class RestoredCheckpoint(NamedTuple):
    """A checkpoint that passed every check."""

    step: int
    state: PyTree
    metadata: Metadata
    """What was given to `save`, and `environment`: the versions and devices that wrote it."""


class Checkpoints:
    """The newest `max_to_keep` checkpoints of a run; with `keep=None` for reading only, also while a job is writing there.

    A reader changes nothing in the folder: it passes over damaged steps where they lie. A writer must hold the
    run's lock, because it removes what looks like an interrupted save.

    Saving is synchronous: when `save` returns, the step is on disk, and a full disk is an error of that save and not
    of a later one. With several processes all of them make every call, on a folder that they share; checksums then
    cover the leaves that each process can see whole (replicated or its own), not arrays sharded between processes.
    """

    def __init__(self, directory: Path | str, max_to_keep: int | None = 2) -> None:
        self.directory = Path(directory).absolute()
        self._writable = max_to_keep is not None
        self._manager = _make_manager(self.directory, max_to_keep)

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
        """Write a checkpoint. `metadata` is plain JSON: the config and its fingerprint, what the run counts.

        Raises CheckpointError if the step is not on disk afterwards (older steps are untouched), ValueError or
        TypeError if `metadata` is not JSON or a leaf of `state` is not a jax array.
        """
        import orbax.checkpoint as ocp

        body = {"meta": {**metadata, "environment": environment()}, "leaves": _describe_leaves(state)}
        body = json.loads(json.dumps(body, allow_nan=False))  # as it will be read
        record = ocp.args.JsonSave({"body": body, "sha256": _json_sha256(body)})
        if not self.directory.is_dir():  # orbax would make a new one, and the older steps would be forgotten
            raise CheckpointError(f"step {step} was not saved: {self.directory} has vanished; bring it back")
        try:
            self._manager.reload()  # its cached list of steps is wrong after a failure or a quarantine
            saved = self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=record))
        except Exception as error:  # orbax and tensorstore raise nearly every type
            self._remove_temporary(step)
            raise CheckpointError(f"step {step} was not saved in {self.directory}: {_one_line(error)}") from error
        if not saved:
            raise CheckpointError(f"step {step} was not saved in {self.directory}, which has steps {self.steps()}")
        shutil.rmtree(self.directory / "trash", ignore_errors=True)  # what stays is removed after the next save

    def restore(self, abstract_state: PyTree) -> RestoredCheckpoint | None:
        """The newest sound checkpoint, on the shardings of `abstract_state`; None if there is no checkpoint at all.

        `abstract_state` is a tree of `jax.ShapeDtypeStruct` (without a sharding: the first local device) or arrays.
        A damaged step is passed over with a CheckpointWarning and moved to quarantine once an older one is sound.
        Raises CheckpointError if none is, leaving all in place, or if a sound step has other leaves, shapes or
        dtypes than `abstract_state`: then the code has changed, and an older step would not help.
        """
        target, wanted = _with_shardings(abstract_state), _describe_leaves(abstract_state)
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            restored, cause = self._try_restore(step, target, wanted)
            if restored is not None:
                self._quarantine(damaged)
                _warn_of_changed_environment(restored)
                return restored
            damaged[step] = cause
        if damaged:
            causes = "\n".join(f"  {self.directory / str(step)}: {cause}" for step, cause in damaged.items())
            raise CheckpointError(
                f"no checkpoint can be restored:\n{causes}\nrepair one, or move them away to start from scratch"
            )
        return None

    def steps(self) -> list[int]:
        """Steps on disk, ascending; read from the folder at every call. Symbolic links do not count."""
        if not self.directory.is_dir():
            return []
        entries = [e for e in os.scandir(self.directory) if e.is_dir(follow_symlinks=False)]
        return sorted(int(e.name) for e in entries if e.name.isascii() and e.name.isdecimal())

    def wait(self) -> None:
        """Block until nothing is being written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Let go of orbax's threads."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _try_restore(
        self, step: int, target: PyTree, wanted: dict[str, Metadata]
    ) -> tuple[RestoredCheckpoint | None, str]:
        """The checkpoint, or None and why it is damaged; all processes come to the same verdict."""
        restored, cause = None, "damaged as another process sees it"
        try:
            restored = self._restore_step(step, target, wanted)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged file makes orbax raise nearly every type
            cause = _one_line(error)
        return (restored, "") if _all_processes_agree(restored is not None) else (None, cause)

    def _restore_step(self, step: int, target: PyTree, wanted: dict[str, Metadata]) -> RestoredCheckpoint:
        import orbax.checkpoint as ocp

        record = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        body = record["body"]
        if _json_sha256(body) != record["sha256"]:
            raise ValueError("its description does not match its checksum")
        if problems := _leaf_differences(body["leaves"], wanted):
            raise CheckpointError(
                f"{self.directory / str(step)} does not fit this state:\n  "
                + "\n  ".join(problems)
                + "\nrun the code and config that wrote it, or start in a new folder"
            )
        state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))).state
        for name, leaf in _describe_leaves(state).items():
            saved = body["leaves"][name]["sha256"]
            if None not in (saved, leaf["sha256"]) and saved != leaf["sha256"]:
                raise ValueError(f"state{name} does not match its checksum")
        return RestoredCheckpoint(step, state, body["meta"])

    def _quarantine(self, damaged: Mapping[int, str]) -> None:
        for step, cause in damaged.items():
            source, target = self.directory / str(step), self.directory / "quarantine" / str(step)
            fate = f"moved to {target}" if self._writable else "passed over"
            warnings.warn(f"{source} is damaged and was {fate}: {cause}", CheckpointWarning, stacklevel=3)
            if self._writable and jax.process_index() == 0:
                target.parent.mkdir(exist_ok=True)
                shutil.rmtree(target, ignore_errors=True)  # the same step, damaged in an earlier life of the run
                source.rename(target)
        if damaged:
            _all_processes_agree(True)  # nobody lists the folder before process 0 is done

    def _remove_temporary(self, step: int) -> None:
        """What a failed save leaves would keep a full disk full; orbax may still be writing some of it."""
        for _ in range(40):
            for path in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.05)
            if not any(self.directory.glob(f"{step}.orbax-checkpoint-tmp*")):
                return


def _make_manager(directory: Path, keep: int | None) -> Any:
    import orbax.checkpoint as ocp

    if keep is None and not directory.is_dir():
        raise CheckpointError(f"{directory} is not there, so it has no checkpoints to read")
    writing: dict[str, Any] = {
        "max_to_keep": keep,
        "todelete_subdir": "trash",  # deleting in place can be killed half-way and leave half a step that is listed
        "cleanup_tmp_directories": True,
    }
    reading: dict[str, Any] = {"read_only": True, "create": False, "save_interval_steps": 0}
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **(reading if keep is None else writing))
    told = logging.getLogger("absl")
    told.addFilter(_is_not_read_only_warning)
    try:
        return ocp.CheckpointManager(directory, options=options)
    except Exception as error:  # orbax raises nearly every type
        raise CheckpointError(f"{directory} cannot hold checkpoints: {_one_line(error)}") from error
    finally:
        told.removeFilter(_is_not_read_only_warning)


def _is_not_read_only_warning(record: logging.LogRecord) -> bool:
    """Whether it says more than that what is opened for reading is read only, of which orbax warns."""
    return "read only" not in record.getMessage()


def _describe_leaves(state: PyTree) -> dict[str, Metadata]:
    """Form (dtype and shape) and SHA-256 of every leaf by its path; no checksum where there are no values to see."""
    described = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise TypeError(f"state{name} is {type(leaf).__name__}; a checkpoint holds jax arrays only")
        form = f"{leaf.dtype} {list(leaf.shape)}"
        described[name] = {"form": form, "sha256": _checksum(form, leaf)}
    return described


def _checksum(form: str, leaf: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    if not isinstance(leaf, jax.Array) or not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return None
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    values = np.asarray(jax.random.key_data(leaf) if key else leaf)
    return hashlib.sha256(form.encode() + values.tobytes()).hexdigest()


def _json_sha256(body: Metadata) -> str:
    """SHA-256 of the canonical JSON. Raises ValueError or TypeError for what is not JSON."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _with_shardings(abstract_state: PyTree) -> PyTree:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default), abstract_state
    )


def _leaf_differences(saved: dict[str, Metadata], wanted: dict[str, Metadata]) -> list[str]:
    """Lines `state<path>: saved <form>, wanted <form>` for the leaves whose forms differ."""
    none = {"form": "nothing"}
    pairs = {name: (saved.get(name, none)["form"], wanted.get(name, none)["form"]) for name in saved | wanted}
    return [f"state{name}: saved {old}, wanted {new}" for name, (old, new) in sorted(pairs.items()) if old != new]


def _warn_of_changed_environment(restored: RestoredCheckpoint) -> None:
    """Warn if the run continues where the same bits are not to be expected; it goes on all the same."""
    old, new = restored.metadata["environment"], environment()
    changes = [f"{name} {old.get(name)!r} -> {new[name]!r}" for name in new if old.get(name) != new[name]]
    if changes:
        warnings.warn(
            f"step {restored.step} continues under other circumstances, so not bit for bit: {', '.join(changes)}",
            CheckpointWarning,
            stacklevel=3,
        )


def _all_processes_agree(verdict: bool) -> bool:
    """Whether it holds on every process; also a barrier between them."""
    if jax.process_count() == 1:
        return verdict
    return bool(multihost_utils.process_allgather(np.asarray(verdict)).all())


def _one_line(error: Exception) -> str:
    """The error's type and the start of its text, on one line (tensorstore's run to kilobytes)."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
