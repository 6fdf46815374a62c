# pyright: reportMissingImports=false
# (torch, transformers and fla are installed in a separate environment with another version of Python.)
"""Load exports of recallax with transformers and fla, and record in `exports.json` how far the logits differ.

    ENV/bin/python tests/parity/load_exports.py FOLDER

`make_exports.py` writes FOLDER. The environment of `make_fixtures.py` loads the models of transformers. The environment
of `make_fla_fixtures.py` loads the folders `fla_*` with the classes of fla, whose recurrent kernels run in the
interpreter of Triton. (Two environments are needed because transformers uses the kernels of fla if fla is installed.)
The script fails if a key is unused or missing, or if the logits differ from those of recallax by more than 1e-5 of
their scale.
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
RESULTS_FILE = Path(__file__).with_name("exports.json")


def load(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    if not FLA:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    import make_fla_fixtures  # configures fla to run without a device

    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(make_fla_fixtures.fla.models, config["architectures"][0])
    mode = {} if config["model_type"] == "mamba2" else {"attn_mode": "fused_recurrent"}
    return model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **mode)


def compare_logits(folder: Path) -> dict[str, object]:
    model, info = load(folder)
    problems = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if problems:
        sys.exit(f"{folder.name}: {problems}")
    with np.load(folder / "expected.npz") as file:
        tokens, expected = torch.from_numpy(file["tokens"]).long(), file["logits"]
    with torch.no_grad():
        logits = model.eval()(tokens, use_cache=False).logits.numpy()
    scale = float(np.abs(logits).max())
    error = float(np.abs(expected - logits).max()) / scale
    if not error <= TOLERANCE:
        sys.exit(f"{folder.name}: logits differ by {error:.1e} of their scale")
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "files": len(list(folder.glob("*.safetensors"))),
        "logits": list(logits.shape),
        "largest logit": round(scale, 3),
        "largest difference": float(f"{error * scale:.2e}"),
        "relative to the largest logit": float(f"{error:.2e}"),
    }


def main() -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    folders = sorted(path.parent for path in Path(sys.argv[1]).glob("*/expected.npz"))
    results: dict[str, object] = json.loads(RESULTS_FILE.read_text())
    results |= {package: version(package) for package in PACKAGES}
    for folder in folders:
        if folder.name.startswith("fla_") == FLA:
            results[folder.name] = compare_logits(folder)
            print(folder.name, results[folder.name], flush=True)
    RESULTS_FILE.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
