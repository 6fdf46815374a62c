# pyright: reportMissingImports=false
# (torch, transformers and fla live in an environment of their own, with another Python.)
"""Load what recallax exported into transformers and fla, and compare logits: `exports.json` beside this script.

    ENV/bin/python tests/parity/load_exports.py FOLDER

FOLDER is what `make_exports.py` made. In the environment of `make_fixtures.py` it loads what transformers has; in that
of `make_fla_fixtures.py` the folders called `fla_*`, into fla's classes, whose recurrent kernels Triton's interpreter
runs. (Where fla is installed, transformers would take its kernels too.) Every key must be used, none may be missing,
and the logits must be recallax's to 1e-5 of their scale.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import json
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

TOLERANCE = 1e-5
FLA = find_spec("fla") is not None
PACKAGES = ("torch", "transformers", "safetensors", *(("fla-core", "triton") if FLA else ()))
FOUND = Path(__file__).with_name("exports.json")


def loaded(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    if not FLA:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    import make_fla_fixtures  # it makes fla run without a device

    config = json.loads((folder / "config.json").read_text())
    kind = getattr(make_fla_fixtures.fla.models, config["architectures"][0])
    mode = {} if config["model_type"] == "mamba2" else {"attn_mode": "fused_recurrent"}
    return kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **mode)


def compared(folder: Path) -> dict[str, object]:
    model, info = loaded(folder)
    faults = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if faults:
        sys.exit(f"{folder.name}: {faults}")
    with np.load(folder / "expected.npz") as file:
        tokens, ours = torch.from_numpy(file["tokens"]).long(), file["logits"]
    with torch.no_grad():
        theirs = model.eval()(tokens, use_cache=False).logits.numpy()
    scale = float(np.abs(theirs).max())
    error = float(np.abs(ours - theirs).max()) / scale
    if not error <= TOLERANCE:
        sys.exit(f"{folder.name}: logits differ by {error:.1e} of their scale")
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "files": len(list(folder.glob("*.safetensors"))),
        "logits": list(theirs.shape),
        "largest logit": round(scale, 3),
        "largest difference": float(f"{error * scale:.2e}"),
        "relative to the largest logit": float(f"{error:.2e}"),
    }


def main() -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    folders = sorted(path.parent for path in Path(sys.argv[1]).glob("*/expected.npz"))
    found: dict[str, object] = json.loads(FOUND.read_text())
    found |= {package: version(package) for package in PACKAGES}
    for folder in folders:
        if folder.name.startswith("fla_") == FLA:
            found[folder.name] = compared(folder)
            print(folder.name, found[folder.name], flush=True)
    FOUND.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
