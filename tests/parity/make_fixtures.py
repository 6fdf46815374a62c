# pyright: reportMissingImports=false
# (torch and transformers live in an environment of their own, with another Python.)
"""Write `fixtures/*.npz`: tiny models of Hugging Face transformers with random weights, and what they compute.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0 transformers==5.23.0 numpy==2.4.6
    OMP_NUM_THREADS=1 ENV/bin/python tests/parity/make_fixtures.py            # all; or the names of some
    OMP_NUM_THREADS=1 ENV/bin/python tests/parity/make_fixtures.py --check    # write nothing, compare with the files

Python 3.11, the CPU, float32, no network: nothing is downloaded, and recallax is not imported. What a file holds is in
the README beside this script. Models take the plain torch paths, which kernel packages, when installed, would replace.

Before it writes a file the script makes sure of two things:

- Every weight matters. Each is rolled by one place in turn, and the logits have to move by more than `MOVED` of their
  scale: a weight mapped to the wrong place, order or layout cannot hide.
- The model's cached decoding agrees with its full forward to `DECODE`. Where a step size meets its clamp it cannot, as
  one-token steps of the torch path leave the clamp out; there both sides run without it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FOLDER = Path(__file__).with_name("fixtures")
VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}
KERNELS = ("mamba_ssm", "causal_conv1d", "fla", "mambapy", "kernels")
"""Packages that would take the place of the plain torch paths."""

ROWS = 2
MOVED = 1e-2
DECODE = 1e-4
NO_LIMIT = (0.0, float("inf"))

SHORT, LONG = 13, 67
"""Tokens. The state-space models get a chunk of 4; the delta rules have one of 64 that no config reaches."""

ONLY_LINEAR = {
    "position_ids": torch.zeros(1, 1, dtype=torch.long),
    "attention_mask": {"full_attention": None, "linear_attention": None},
}
"""A model that works out positions and masks asks a cache for its length, which one without attention has not."""

MAMBA2 = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "expand": 2,
    "num_heads": 4,
    "head_dim": 8,
    "state_size": 6,
    "conv_kernel": 4,
    "chunk_size": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}
FALCON_H1 = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 4,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "projectors_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "embedding_multiplier": 3.0,
    "lm_head_multiplier": 0.7,
    "mlp_multipliers": [0.8, 1.3],
    "key_multiplier": 0.6,
    "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.9,
    "ssm_multipliers": [0.9, 1.1, 0.7, 1.4, 0.8],
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.75,
    "tie_word_embeddings": False,
}
LLAMA = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, kw_only=True)
class Fixture:
    """A model by its `model_type` and config fields, and the modules whose input and output are kept."""

    model_type: str
    fields: dict[str, Any]
    length: int = SHORT
    captured: dict[str, str]
    """What the arrays are called, to the module's name, which is also the prefix of its weights."""
    binding: bool = False
    """Whether the step size of a state-space mixer meets its clamp."""
    decoding: dict[str, Any] = field(default_factory=dict)
    """What cached decoding has to be told besides the tokens."""


FIXTURES = {
    "mamba": Fixture(
        model_type="mamba",
        fields={
            "vocab_size": 32,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "expand": 2,
            "state_size": 5,
            "time_step_rank": 3,
            "conv_kernel": 4,
            "use_bias": False,
            "use_conv_bias": True,
            "hidden_act": "silu",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        captured={"mixer": "backbone.layers.1.mixer"},
    ),
    "mamba2": Fixture(
        model_type="mamba2", fields=MAMBA2 | {"n_groups": 1}, captured={"mixer": "backbone.layers.1.mixer"}
    ),
    "mamba2_groups": Fixture(
        model_type="mamba2", fields=MAMBA2 | {"n_groups": 2}, captured={"mixer": "backbone.layers.1.mixer"}
    ),
    "mamba2_dt_limit": Fixture(
        model_type="mamba2",
        fields=MAMBA2 | {"n_groups": 1, "time_step_limit": [0.2, 0.8]},
        captured={"mixer": "backbone.layers.1.mixer"},
        binding=True,
    ),
    "qwen3_next": Fixture(
        model_type="qwen3_next",
        fields={
            "vocab_size": 32,
            "hidden_size": 24,
            "intermediate_size": 28,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "mlp_only_layers": [0, 1, 2],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 5,
            "linear_conv_kernel_dim": 4,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
        length=LONG,
        captured={"mixer": "model.layers.1.linear_attn", "attention": "model.layers.2.self_attn"},
    ),
    "olmo_hybrid": Fixture(
        model_type="olmo_hybrid",
        fields={
            "vocab_size": 32,
            "hidden_size": 24,
            "intermediate_size": 28,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": None},
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 5,
            "linear_conv_kernel_dim": 4,
            "linear_allow_neg_eigval": True,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "pad_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": False,
        },
        length=LONG,
        captured={"mixer": "model.layers.1.linear_attn", "attention": "model.layers.2.self_attn"},
    ),
    "kimi_linear": Fixture(
        model_type="kimi_linear",
        fields={
            "vocab_size": 32,
            "hidden_size": 24,
            "intermediate_size": 28,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "linear_attention"],
            "mlp_layer_types": ["dense", "dense"],
            "linear_num_heads": 3,
            "linear_head_dim": 6,
            "linear_conv_kernel_dim": 4,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": False,
        },
        length=LONG,
        captured={"mixer": "model.layers.1.self_attn"},
        decoding=ONLY_LINEAR,
    ),
    "nemotron_h": Fixture(
        model_type="nemotron_h",
        fields={
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 24,
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "mamba_num_heads": 4,
            "mamba_head_dim": 6,
            "n_groups": 2,
            "ssm_state_size": 5,
            "conv_kernel": 4,
            "chunk_size": 4,
            "time_step_min": 0.2,
            "use_bias": False,
            "use_conv_bias": True,
            "mlp_bias": False,
            "mlp_hidden_act": "relu2",
            "mamba_hidden_act": "silu",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": False,
        },
        captured={"mixer": "model.layers.3.mixer", "attention": "model.layers.2.mixer"},
        binding=True,
    ),
    "falcon_h1": Fixture(
        model_type="falcon_h1",
        fields=FALCON_H1 | {"mamba_rms_norm": False},
        captured={"mixer": "model.layers.1.mamba", "attention": "model.layers.1.self_attn"},
    ),
    "falcon_h1_norm": Fixture(
        model_type="falcon_h1",
        fields=FALCON_H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": True},
        captured={"mixer": "model.layers.1.mamba", "attention": "model.layers.1.self_attn"},
    ),
    "llama": Fixture(
        model_type="llama",
        fields=LLAMA | {"attention_bias": False, "mlp_bias": False},
        captured={"attention": "model.layers.1.self_attn"},
    ),
    "mistral": Fixture(
        model_type="mistral",
        fields=LLAMA | {"head_dim": 8, "sliding_window": 5},
        captured={"attention": "model.layers.1.self_attn"},
    ),
}


def build(name: str) -> PreTrainedModel:
    """The model, its weights drawn anew."""
    fixture = FIXTURES[name]
    config = AutoConfig.for_model(fixture.model_type, **fixture.fields)
    for key, value in fixture.fields.items():
        if getattr(config, key) != (tuple(value) if isinstance(getattr(config, key), tuple) else value):
            sys.exit(f"{name}: transformers changed the field {key} from {value!r} to {getattr(config, key)!r}")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            draw(key, parameter)
    return model


def draw(name: str, parameter: nn.Parameter) -> None:
    """Weights of a size that lets everything be seen: rates of decay, gates and scores well away from flat or closed.

    Scales, skips and biases are drawn around the value they start at. Embeddings are small, so that the first
    normalisation sees its epsilon.
    """
    if name.endswith("A_log"):
        parameter.uniform_(-1.5, 0.7)
    elif name.endswith(("dt_bias", "dt_proj.bias")):
        parameter.uniform_(-2.5, 0.5)
    elif parameter.ndim == 1:
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    elif "embed" in name:
        parameter.normal_(std=0.05)
    else:
        parameter.normal_(std=parameter[0].numel() ** -0.5)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits


def captured(model: nn.Module, tokens: Tensor, modules: dict[str, str]) -> dict[str, Tensor]:
    """Inputs and outputs of some modules in a full forward; an attention's weights, beside its output, are left out."""
    found: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_: nn.Module, args: tuple, named: dict[str, Any], output: Any) -> None:
            found[f"{name}/input"] = args[0] if args else named["hidden_states"]
            found[f"{name}/output"] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [
        model.get_submodule(at).register_forward_hook(keep(key), with_kwargs=True) for key, at in modules.items()
    ]
    logits_of(model, tokens)
    for handle in handles:
        handle.remove()
    return found


def decoded(model: PreTrainedModel, tokens: Tensor, options: dict[str, Any]) -> Tensor:
    """The logits again: half of the tokens at once, the others one by one."""
    half = tokens.shape[1] // 2
    output = model(tokens[:, :half], use_cache=True, **options)
    name = "cache_params" if "cache_params" in output else "past_key_values"
    pieces = [output.logits]
    for at in range(half, tokens.shape[1]):
        output = model(tokens[:, at : at + 1], use_cache=True, **{name: output[name]}, **options)
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


@contextmanager
def without_limit(model: PreTrainedModel) -> Iterator[None]:
    """The model with step sizes unclamped."""
    mixers = [module for module in model.modules() if "time_step_limit" in vars(module)]
    limits = [module.time_step_limit for module in mixers]
    for module in mixers:
        module.time_step_limit = NO_LIMIT
    yield
    for module, limit in zip(mixers, limits, strict=True):
        module.time_step_limit = limit


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of the larger scale."""
    return float((a - b).abs().max() / torch.maximum(a.abs().max(), b.abs().max()))


def least_moved(model: nn.Module, tokens: Tensor, logits: Tensor) -> tuple[float, str]:
    """The weight that moves the logits least when it is rolled by one place, and by how much; exits below `MOVED`."""
    moves = []
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.copy_(kept.flatten().roll(1).view_as(kept))
        moves.append((distance(logits_of(model, tokens), logits), name))
        parameter.copy_(kept)
    move, weight = min(moves)
    if move < MOVED:
        sys.exit(f"rolling {weight} moves the logits by {move:.1e} of their scale, less than {MOVED:.0e}")
    return move, weight


def arrays_of(name: str) -> dict[str, np.ndarray]:
    """All that the file of this name holds; exits where a check fails."""
    fixture = FIXTURES[name]
    torch.manual_seed(sum(name.encode()))
    model = build(name)
    tokens = torch.randint(model.config.vocab_size, (ROWS, fixture.length))
    logits = logits_of(model, tokens)

    move, weight = least_moved(model, tokens, logits)
    with without_limit(model):
        error = distance(decoded(model, tokens, fixture.decoding), free := logits_of(model, tokens))
    if error > DECODE:
        sys.exit(f"{name}: cached decoding is {error:.1e} away from the full forward, more than {DECODE:.0e}")
    bound = distance(free, logits)
    if (bound > MOVED) != fixture.binding:
        sys.exit(
            f"{name}: without the clamp on step sizes the logits differ by {bound:.1e}: binding={fixture.binding}?"
        )

    tied = set(model.all_tied_weights_keys)
    arrays = {f"weights/{key}": value for key, value in model.state_dict().items() if key not in tied}
    arrays |= {"tokens": tokens.to(torch.int32), "logits": logits}
    arrays |= captured(model, tokens, fixture.captured)
    config = {"architectures": [type(model).__name__], "model_type": fixture.model_type, **fixture.fields}
    scale = float(logits.abs().max())
    print(f"{name:16} logits to {scale:4.1f}  decode {error:.0e}  least move {move:.0e} ({weight})")
    return packed(arrays, config, {**fixture.captured, **VERSIONS})


def packed(arrays: dict[str, Tensor], config: dict[str, Any], about: dict[str, str]) -> dict[str, np.ndarray]:
    """What a file holds."""
    texts = {"config": np.array(json.dumps(config)), "about": np.array(json.dumps(about))}
    return {key: value.numpy() for key, value in arrays.items()} | texts


def check(name: str, arrays: dict[str, np.ndarray]) -> None:
    """Exit where the file does not hold the same, rounding apart."""
    with np.load(FOLDER / f"{name}.npz") as file:
        if set(file) != set(arrays):
            sys.exit(f"{name}: the file does not hold the same names: {sorted(set(file) ^ set(arrays))}")
        for key, value in arrays.items():
            same = file[key].shape == value.shape and (
                np.allclose(file[key], value, rtol=1e-5, atol=1e-5) if value.dtype == np.float32 else file[key] == value
            )
            if not np.all(same):
                sys.exit(f"{name}: {key} is another in the file")


def write(description: str, names: Collection[str], make: Callable[[str], dict[str, np.ndarray]]) -> None:
    """Write the files of these names, or compare them, as the command line asks."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(names)}; all when left out")
    parser.add_argument("--check", action="store_true", help="write nothing, compare with the files")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    for package, wanted in VERSIONS.items():
        if (found := version(package).partition("+")[0]) != wanted:
            sys.exit(f"{package} is {found} here, the fixtures are of {wanted}: install that, or change VERSIONS")
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    with torch.no_grad():
        for name in args.names or names:
            arrays = make(name)
            if args.check:
                check(name, arrays)
            else:
                np.savez_compressed(FOLDER / f"{name}.npz", allow_pickle=False, **arrays)


def main() -> None:
    if installed := [package for package in KERNELS if find_spec(package)]:
        sys.exit(f"uninstall {', '.join(installed)}: the fixtures are of the plain torch paths")
    write(__doc__ or "", FIXTURES, arrays_of)


if __name__ == "__main__":
    main()
