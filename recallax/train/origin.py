# pyright: strict
"""The record of a run that continues a checkpoint of another run, `origin.json` in its folder."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recallax.external_file import MAX_CONFIG_BYTES, parse_json_object, read_regular_file
from recallax.train.run_folder import RunFolderError

ORIGIN_FILE = "origin.json"


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run began from."""

    run: str
    """Folder of the other run, as the command named it."""
    fingerprint: str
    """Fingerprint of its config."""
    step: int
    """Step of the checkpoint."""
    changes: list[str]
    """A line `path: old -> new` for every field of the config that was changed."""

    def to_text(self) -> str:
        """Return the content of the file."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def event_row(self) -> dict[str, Any]:
        """Return the values of the "continued" event, the first one in the log of the run."""
        changes = "; ".join(self.changes) or "none"
        return {"event": "continued", "run": self.run, "run_fingerprint": self.fingerprint, "changes": changes}


def read_origin(folder: Path) -> Origin | None:
    """Read the record of a run.

    Args:
        folder: Folder of the run.

    Returns:
        The record; None for a run that does not continue another one.

    Raises:
        RunFolderError: The file is damaged.
    """
    path = folder / ORIGIN_FILE
    if not path.exists():
        return None
    try:
        data = parse_json_object(read_regular_file(path, MAX_CONFIG_BYTES))
        changes = [str(line) for line in data["changes"]]
        return Origin(str(data["run"]), str(data["fingerprint"]), int(data["step"]), changes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path} is damaged ({error!r}); restore it, or choose a new folder") from error
