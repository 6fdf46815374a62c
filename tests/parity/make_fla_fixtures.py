# pyright: reportMissingImports=false
# (torch, transformers and fla are installed in a separate environment with another version of Python.)
"""Write `fixtures/fla_*.npz`: tiny models of flash-linear-attention with random weights, and their outputs.

    ENV/bin/pip install flash-linear-attention==0.6.0 triton==3.9.0           # ENV of make_fixtures.py, or a copy
    OMP_NUM_THREADS=1 ENV/bin/python tests/parity/make_fla_fixtures.py        # all, or those named
    OMP_NUM_THREADS=1 ENV/bin/python tests/parity/make_fla_fixtures.py --check

The models, layers and kernels are those of fla. The interpreter of Triton runs the kernels on the CPU in float32.
Layers of fla use recurrent kernels up to 64 tokens and chunked kernels for longer rows. Only one fixture is longer,
because the interpreter is slow and the chunked kernel of the delta rule rejects float32. The script checks cached
decoding and the effect of every weight as `make_fixtures.py` does.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import builtins
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from make_fixtures import (
    DECODING_TOLERANCE,
    LONG,
    ROWS,
    SHORT,
    VERSIONS,
    decode_with_cache,
    least_sensitive_weight,
    logits_of,
    randomize,
    relative_difference,
    to_numpy,
    write,
)
from triton import language as tl
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import TensorHandle

# Without a device there is nothing to measure, so the first configuration is used.
Autotuner._bench = lambda self, *args, config, **meta: (1.0, 1.0, 1.0)

import fla.models  # noqa: E402


def tensor_range(*bounds: Any) -> Iterator[tl.tensor]:
    """Replace `range` in kernels: they expect tensors, and the interpreter of Triton yields integers."""
    for number in builtins.range(*bounds):
        yield tl.tensor(TensorHandle(np.array([number], np.int32), tl.int32), tl.int32)


for module in [module for name, module in sys.modules.items() if name.startswith("fla.ops.")]:
    vars(module)["range"] = tensor_range

FLA = {"fla": version("fla-core"), "triton": version("triton")}
COMMON = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "norm_eps": 1e-4,  # differs from the defaults of fla and recallax
    "fuse_cross_entropy": False,
    "tie_word_embeddings": False,
}
DELTA = COMMON | {"num_heads": 2, "head_dim": 6, "expand_v": 1.5, "conv_size": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "fla_gla": ("GLA", COMMON | {"num_heads": 2, "expand_k": 0.5, "expand_v": 1.25}),
    "fla_gla_conv": ("GLA", COMMON | {"num_heads": 2, "use_short_conv": True, "conv_size": 3}),
    "fla_delta_net": ("DeltaNet", COMMON | {"num_heads": 2, "expand_k": 0.75, "allow_neg_eigval": True}),
    "fla_retnet": ("RetNet", COMMON | {"num_heads": 2, "expand_k": 0.75, "expand_v": 1.5}),
    "fla_linear_attn": ("LinearAttention", COMMON | {"num_heads": 2, "expand_k": 0.75, "feature_map": "identity"}),
    "fla_hgrn2": ("HGRN2", COMMON | {"expand_ratio": 8}),
    "fla_kda": ("KDA", DELTA),
    "fla_kda_bounded": ("KDA", DELTA | {"safe_gate": True, "lower_bound": -6.0, "allow_neg_eigval": True}),
    "fla_gated_deltanet": ("GatedDeltaNet", DELTA | {"num_v_heads": 4}),
    "fla_gated_deltaproduct": (
        "GatedDeltaProduct",
        DELTA | {"use_forget_gate": True, "num_householder": 2, "allow_neg_eigval": True},
    ),
    "fla_mamba2": (
        "Mamba2",
        {name: value for name, value in COMMON.items() if name != "intermediate_size"}
        | {"head_dim": 8, "state_size": 6, "chunk_size": 16},
    ),
}
"""Prefix of the class names, and config fields, by fixture name."""
CHUNKED = ("fla_gla",)
"""Fixtures with more than 64 tokens, which run the chunked kernels."""


def make_arrays(name: str) -> dict[str, np.ndarray]:
    prefix, fields = MODELS[name]
    torch.manual_seed(sum(name.encode()))
    model = getattr(fla.models, f"{prefix}ForCausalLM")(getattr(fla.models, f"{prefix}Config")(**fields)).eval()
    for key, parameter in model.named_parameters():
        randomize(key, parameter)
        parameter.copy_(parameter.bfloat16())  # compresses to half the size
    tokens = torch.randint(model.config.vocab_size, (ROWS, LONG if name in CHUNKED else SHORT))
    logits = logits_of(model, tokens)
    effect, weight = least_sensitive_weight(model, tokens, logits)
    if (error := relative_difference(decode_with_cache(model, tokens, {}), logits)) > DECODING_TOLERANCE:
        raise SystemExit(
            f"{name}: cached decoding is {error:.1e} away from the full forward, more than {DECODING_TOLERANCE:.0e}"
        )
    scale = float(logits.abs().max())
    print(f"{name:22} logits to {scale:4.1f}  decode {error:.0e}  smallest effect {effect:.0e} ({weight})", flush=True)
    arrays = {f"weights/{key}": value for key, value in model.state_dict().items()}
    arrays |= {"tokens": tokens.to(torch.int32), "logits": logits}
    config = {"architectures": [type(model).__name__], "model_type": model.config.model_type, **fields}
    return to_numpy(arrays, config, {**VERSIONS, **FLA})


if __name__ == "__main__":
    write(__doc__ or "", MODELS, make_arrays)
