# pyright: reportMissingImports=false
# (torch, transformers and fla live in an environment of their own, with another Python.)
"""Write `fixtures/fla_*.npz`: tiny models of flash-linear-attention with random weights, and what they compute.

    ENV/bin/pip install flash-linear-attention==0.6.0 triton==3.9.0           # into that of make_fixtures.py, or a copy
    OMP_NUM_THREADS=1 ENV/bin/python tests/parity/make_fla_fixtures.py        # all; or the names of some
    OMP_NUM_THREADS=1 ENV/bin/python tests/parity/make_fla_fixtures.py --check

The models, layers and kernels are fla's own: Triton's interpreter runs them on the CPU, in float32. Up to 64 tokens
its layers take the recurrent kernels, beyond them the chunked ones, of which that of the delta rule refuses float32;
one fixture is longer, the interpreter being slow. Cached decoding must agree with the full forward, and every weight
matters, as in `make_fixtures.py`.
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
    DECODE,
    LONG,
    ROWS,
    SHORT,
    VERSIONS,
    decoded,
    distance,
    draw,
    least_moved,
    logits_of,
    packed,
    write,
)
from triton import language as tl
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import TensorHandle

# There is no device to measure on: the first configuration is as good as any.
Autotuner._bench = lambda self, *args, config, **meta: (1.0, 1.0, 1.0)

import fla.models  # noqa: E402


def counted(*bounds: Any) -> Iterator[tl.tensor]:
    """`range` as kernels know it: its numbers are tensors, which the interpreter leaves to Python."""
    for number in builtins.range(*bounds):
        yield tl.tensor(TensorHandle(np.array([number], np.int32), tl.int32), tl.int32)


for module in [module for name, module in sys.modules.items() if name.startswith("fla.ops.")]:
    vars(module)["range"] = counted

FLA = {"fla": version("fla-core"), "triton": version("triton")}
FRAME = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "norm_eps": 1e-4,  # no default, of neither
    "fuse_cross_entropy": False,
    "tie_word_embeddings": False,
}
DELTA = FRAME | {"num_heads": 2, "head_dim": 6, "expand_v": 1.5, "conv_size": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "fla_gla": ("GLA", FRAME | {"num_heads": 2, "expand_k": 0.5, "expand_v": 1.25}),
    "fla_gla_conv": ("GLA", FRAME | {"num_heads": 2, "use_short_conv": True, "conv_size": 3}),
    "fla_delta_net": ("DeltaNet", FRAME | {"num_heads": 2, "expand_k": 0.75, "allow_neg_eigval": True}),
    "fla_retnet": ("RetNet", FRAME | {"num_heads": 2, "expand_k": 0.75, "expand_v": 1.5}),
    "fla_linear_attn": ("LinearAttention", FRAME | {"num_heads": 2, "expand_k": 0.75, "feature_map": "identity"}),
    "fla_hgrn2": ("HGRN2", FRAME | {"expand_ratio": 8}),
    "fla_kda": ("KDA", DELTA),
    "fla_kda_bounded": ("KDA", DELTA | {"safe_gate": True, "lower_bound": -6.0, "allow_neg_eigval": True}),
    "fla_gated_deltanet": ("GatedDeltaNet", DELTA | {"num_v_heads": 4}),
    "fla_gated_deltaproduct": (
        "GatedDeltaProduct",
        DELTA | {"use_forget_gate": True, "num_householder": 2, "allow_neg_eigval": True},
    ),
    "fla_mamba2": (
        "Mamba2",
        {name: value for name, value in FRAME.items() if name != "intermediate_size"}
        | {"head_dim": 8, "state_size": 6, "chunk_size": 16},
    ),
}
"""By name: what its classes begin with, and its fields."""
CHUNKED = ("fla_gla",)
"""Of more than 64 tokens."""


def arrays_of(name: str) -> dict[str, np.ndarray]:
    kind, fields = MODELS[name]
    torch.manual_seed(sum(name.encode()))
    model = getattr(fla.models, f"{kind}ForCausalLM")(getattr(fla.models, f"{kind}Config")(**fields)).eval()
    for key, parameter in model.named_parameters():
        draw(key, parameter)
        parameter.copy_(parameter.bfloat16())  # compresses to half the size
    tokens = torch.randint(model.config.vocab_size, (ROWS, LONG if name in CHUNKED else SHORT))
    logits = logits_of(model, tokens)
    move, weight = least_moved(model, tokens, logits)
    if (error := distance(decoded(model, tokens, {}), logits)) > DECODE:
        raise SystemExit(f"{name}: cached decoding is {error:.1e} away from the full forward, more than {DECODE:.0e}")
    scale = float(logits.abs().max())
    print(f"{name:22} logits to {scale:4.1f}  decode {error:.0e}  least move {move:.0e} ({weight})", flush=True)
    arrays = {f"weights/{key}": value for key, value in model.state_dict().items()}
    arrays |= {"tokens": tokens.to(torch.int32), "logits": logits}
    config = {"architectures": [type(model).__name__], "model_type": model.config.model_type, **fields}
    return packed(arrays, config, {**VERSIONS, **FLA})


if __name__ == "__main__":
    write(__doc__ or "", MODELS, arrays_of)
