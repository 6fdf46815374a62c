"""Rewrite the config fingerprints of checked-in rows from schema 1 to the current schema.

The command is `python -m experiments.migrate_results`. A fingerprint is replaced only if a config that the experiment's
sweep yields today has the recorded fingerprint under schema 1, so each replacement proves that the config is the same.
No other byte of a row changes. Rows whose fingerprint is already current are kept, and rows that match no config are
listed.
"""

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from experiments.key_retrieval.variants import RATES, VARIANTS, stage_configs
from experiments.results import read_rows
from recallax.config import fingerprint, to_json
from recallax.train.run_config import RunConfig

FOLDER = Path(__file__).parent
LATER_FIELDS = {"jump": 0}
"""Fields that schema 1 gained after rows had been recorded, and the value that configs had before."""


def main() -> int:
    """Rewrite all files of rows; returns the number of rows that match no config."""
    unknown = 0
    for question in questions():
        current = {
            old: fingerprint(config) for config in recorded_configs(question) for old in _old_fingerprints(config)
        }
        for file in sorted((FOLDER / question).glob("*.jsonl")):
            read_rows(FOLDER / question, file.name)  # ends the program before a damaged file is rewritten
            lines = file.read_text().splitlines(keepends=True)
            migrated = [_migrate(line, current) for line in lines]
            file.write_text("".join(migrated))
            changed = sum(old != new for old, new in zip(lines, migrated, strict=True))
            known = {"none", *current.values()}
            missing = [row for row in read_rows(FOLDER / question, file.name) if row.get("config", "none") not in known]
            unknown += len(missing)
            print(
                f"{file.relative_to(FOLDER)}: {len(lines)} rows, {changed} rewritten, {len(missing)} without a config"
            )
            for row in missing:
                print(f"    { ({key: value for key, value in row.items() if not isinstance(value, dict)}) }")
    return unknown


def questions() -> list[str]:
    """List the experiments: the folders that have a README."""
    return sorted(path.parent.name for path in FOLDER.glob("*/README.md"))


def recorded_configs(question: str) -> list[RunConfig]:
    """List the configs whose rows an experiment has checked in.

    Args:
        question: Name of the experiment's folder.

    Returns:
        The configs that its sweep yields for the checked-in rows, with those of earlier stages that it no longer runs.
        None for an experiment that trains no model.
    """
    if question == "key_retrieval":  # the rows record the second of two runs
        return [stage_configs(variant, rate)[1] for variant in VARIANTS for rate in RATES]
    if not (FOLDER / question / "sweep.py").exists():
        return []
    sweep = importlib.import_module(f"experiments.{question}.sweep")
    rows = read_rows(FOLDER / question)
    return [trial.config for stage in (*sweep.STAGES, *getattr(sweep, "EARLIER_STAGES", ())) for trial in stage(rows)]


def _old_fingerprints(config: RunConfig) -> set[str]:
    """Fingerprints under schema 1, now and before it gained `LATER_FIELDS`."""
    earlier = json.dumps(_without_later_fields(to_json(config, schema=1)), sort_keys=True, separators=(",", ":"))
    return {fingerprint(config, schema=1), hashlib.sha256(earlier.encode()).hexdigest()[:10]}


def _without_later_fields(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_later_fields(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {k: _without_later_fields(v) for k, v in value.items() if k not in LATER_FIELDS or v != LATER_FIELDS[k]}


def _migrate(line: str, current: dict[str, str]) -> str:
    recorded = json.loads(line).get("config") if line.strip() else None
    return (
        line.replace(f'"config": "{recorded}"', f'"config": "{current[recorded]}"', 1) if recorded in current else line
    )


if __name__ == "__main__":
    sys.exit(main())
