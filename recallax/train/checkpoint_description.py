# pyright: strict
"""The steps of a folder of checkpoints, and the description of one: its metadata, and the forms of its leaves.

This module reads files only, without JAX and orbax.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from recallax.config import Config, diff_json, fingerprint, to_json

type Metadata = dict[str, Any]

DESCRIPTION_ITEM = "meta"
"""Folder of the description in a checkpoint."""
DESCRIPTION_FILE = "metadata"
"""The file that orbax writes a JSON item to."""
SCHEMAS = (2, 1)
"""Schemas of configs whose fingerprints checkpoints may have."""


def list_steps(directory: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder in ascending order, without symbolic links."""
    if not directory.is_dir():
        return []
    entries = [e for e in os.scandir(directory) if e.is_dir(follow_symlinks=False)]
    return sorted(int(e.name) for e in entries if e.name.isascii() and e.name.isdecimal())


def make_description(body: Metadata) -> Metadata:
    """Return the JSON to store for a description, with its checksum.

    Args:
        body: `meta` (metadata) and `leaves` (description of every leaf).

    Returns:
        JSON from which `read_description` reads the body.

    Raises:
        ValueError: A number is not finite.
        TypeError: A value is not JSON.
    """
    body = json.loads(json.dumps(body, allow_nan=False))  # as it will be read
    return {"body": body, "sha256": _json_sha256(body)}


def read_description(checkpoint: Path) -> Metadata:
    """Read the description of a checkpoint.

    Args:
        checkpoint: Folder of the checkpoint.

    Returns:
        `meta` and `leaves`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not JSON, or does not match its checksum.
        KeyError: It is not a description.
        TypeError: It is not a description.
    """
    record = json.loads((checkpoint / DESCRIPTION_ITEM / DESCRIPTION_FILE).read_bytes())
    body = record["body"]
    if _json_sha256(body) != record["sha256"]:
        raise ValueError("its description does not match its checksum")
    return body


def newest_metadata(directory: Path) -> Metadata:
    """Return the metadata of the newest checkpoint whose description can be read; empty if there is none."""
    for step in reversed(list_steps(directory)):
        try:
            return read_description(directory / str(step))["meta"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged, or deleted since the folder was listed
    return {}


def recorded_differences(metadata: Metadata, config: Config) -> list[str]:
    """Compare the config that wrote a checkpoint with the config of the run.

    Args:
        metadata: Metadata of the checkpoint. Without a config and a fingerprint it fits every run.
        config: Config of the run.

    Returns:
        A line `path: value in the checkpoint -> value in the run` for every field that differs.
    """
    recorded = metadata.get("fingerprint")
    if any(recorded == fingerprint(config, schema=schema) for schema in SCHEMAS):
        return []
    if "config" in metadata:
        return diff_json(metadata["config"], to_json(config))
    return [] if recorded is None else [f"fingerprint: {recorded} -> {fingerprint(config)}"]


def _json_sha256(body: Metadata) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()
