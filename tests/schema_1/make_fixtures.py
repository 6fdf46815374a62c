"""Write the fixtures of `tests/test_schema_1.py` into a folder: `python make_fixtures.py FOLDER`.

Run it in a checkout of version 0.1.0 (git revision 28b8545), the last one that writes configs of schema 1, with that
checkout first on PYTHONPATH. It uses the names of that version, so it does not run on later ones. Fixtures are:

    configs.json                   every config of the package, in both forms, with its fingerprint
    <config>/                      run folders, with the newest checkpoint and expected.json: metrics on the test split,
                                   and the start of a SHA-256 per parameter
    export_mom/, export_titans/    `recallax export mqar_mom`, `mqar_titans`
    export_orbax/                  `recallax export mqar_mom --to orbax`
"""

import hashlib
import importlib
import json
import pkgutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

import recallax.configs
from recallax.config import fingerprint, to_json
from recallax.train.loop import evaluate_run, restore_run, train

RUNS = ("mqar_mom", "mqar_titans", "mqar_hydra_staged")


def write_configs(path: Path) -> None:
    """Write every config of the package with its fingerprint."""
    rows = {}
    for module in pkgutil.iter_modules(recallax.configs.__path__):
        for form in ("get_config", "get_tiny"):
            config = getattr(importlib.import_module(f"recallax.configs.{module.name}"), form)()
            rows[f"{module.name}.{form}"] = {"fingerprint": fingerprint(config), "config": to_json(config)}
    path.write_text(json.dumps(rows, separators=(",", ":")).replace('},"', '},\n"') + "\n")


def write_run(folder: Path, name: str) -> None:
    """Train the tiny form of a config, and record what the newest checkpoint contains."""
    config = importlib.import_module(f"recallax.configs.{name}").get_tiny()
    train(replace(config, train=replace(config.train, keep=1, save_every=4)), folder, name=name)
    leaves = jax.tree_util.tree_flatten_with_path(restore_run(folder)[1].state.params)[0]
    digests = {"/".join(str(getattr(key, "key", key)) for key in path): digest(leaf) for path, leaf in leaves}
    expected = {"test": evaluate_run(folder, "test"), "params": digests}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1))


def digest(leaf: jax.Array) -> str:
    """Return the first 16 hex digits of the SHA-256 of the bytes of an array."""
    return hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()[:16]


def main(out: Path) -> None:
    """Write all fixtures."""
    out.mkdir(parents=True, exist_ok=True)
    write_configs(out / "configs.json")
    for name in RUNS:
        write_run(out / name, name)
    export = [sys.executable, "-m", "recallax", "export"]
    for run, to, target in (
        ("mqar_mom", "safetensors", "export_mom"),
        ("mqar_titans", "safetensors", "export_titans"),
        ("mqar_mom", "orbax", "export_orbax"),
    ):
        subprocess.run([*export, str(out / run), "--to", to, "--out", str(out / target)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
