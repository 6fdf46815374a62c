# pyright: reportMissingImports=false
# (torch and transformers live in an environment of their own, with another Python.)
"""Load what recallax exported into transformers, and compare logits: `exports.json` beside this script.

    ENV/bin/python tests/parity/load_exports.py FOLDER

FOLDER is what `make_exports.py` made; the environment is that of `make_fixtures.py`. Every key must be used, none may
be missing, and the logits must be recallax's to 1e-5 of their scale.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

TOLERANCE = 1e-5


def compared(folder: Path) -> dict[str, object]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
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
        "logits": list(theirs.shape),
        "largest logit": round(scale, 3),
        "largest difference": float(f"{error * scale:.2e}"),
        "relative to the largest logit": float(f"{error:.2e}"),
    }


def main() -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    folders = sorted(path.parent for path in Path(sys.argv[1]).glob("*/expected.npz"))
    found: dict[str, object] = {package: version(package) for package in ("torch", "transformers", "safetensors")}
    for folder in folders:
        found[folder.name] = compared(folder)
        print(folder.name, found[folder.name])
    Path(__file__).with_name("exports.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
