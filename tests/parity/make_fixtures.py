# pyright: reportMissingImports=false
# (torch and transformers are installed in a separate environment with another version of Python.)
"""Write `fixtures/*.npz`: tiny models of Hugging Face transformers with random weights, and their outputs.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0 transformers==5.23.0 numpy==2.4.6
    OMP_NUM_THREADS=1 ENV/bin/python tests/parity/make_fixtures.py            # all, or those named
    OMP_NUM_THREADS=1 ENV/bin/python tests/parity/make_fixtures.py --check    # write nothing, compare with the files

The script runs with Python 3.11 on the CPU in float32. It downloads nothing and does not import recallax. The README
beside this script describes the arrays of a file. Models use the plain torch implementations, which installed kernel
packages would replace.

The script checks two properties before it writes a file:

- Every weight has an effect. If the elements of any one weight are rolled by one position, the logits change by more
  than `MIN_EFFECT` of their scale. So a test detects a weight that is mapped to a wrong place, order or layout.
- Cached decoding agrees with the full forward pass to `DECODING_TOLERANCE`. Models whose step sizes are clamped are
  compared without the clamp, because single steps of the torch implementation do not apply it.
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
KERNEL_PACKAGES = ("mamba_ssm", "causal_conv1d", "fla", "mambapy", "kernels")
"""Packages that would replace the plain torch implementations."""

ROWS = 2
MIN_EFFECT = 1e-2
DECODING_TOLERANCE = 1e-4
NO_LIMIT = (0.0, float("inf"))

SHORT, LONG = 13, 67
"""Lengths in tokens. State-space models have chunks of 4 tokens; delta rules have chunks of 64, fixed in the code."""

NO_ATTENTION_LAYERS = {
    "position_ids": torch.zeros(1, 1, dtype=torch.long),
    "attention_mask": {"full_attention": None, "linear_attention": None},
}
"""Arguments of a model without attention layers, whose cache has no length to compute positions and masks from."""

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

GATED_DELTA_NET = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "linear_conv_kernel_dim": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, kw_only=True)
class Fixture:
    """A model and the modules whose inputs and outputs are stored."""

    model_type: str
    fields: dict[str, Any]
    length: int = SHORT
    captured: dict[str, str]
    """Module name, which is the prefix of its weights, by array name."""
    clamped: bool = False
    """True if the clamp on step sizes of a state-space mixer changes the logits."""
    decoding_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of cached decoding besides the tokens."""


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
        clamped=True,
    ),
    "qwen3_next": Fixture(
        model_type="qwen3_next",
        fields=GATED_DELTA_NET
        | {
            "mlp_only_layers": [0, 1, 2],
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        },
        length=LONG,
        captured={"mixer": "model.layers.1.linear_attn", "attention": "model.layers.2.self_attn"},
    ),
    "olmo_hybrid": Fixture(
        model_type="olmo_hybrid",
        fields=GATED_DELTA_NET
        | {
            "rope_parameters": {"rope_type": "default", "rope_theta": None},
            "linear_allow_neg_eigval": True,
            "pad_token_id": None,
            "eos_token_id": None,
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
        decoding_options=NO_ATTENTION_LAYERS,
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
        clamped=True,
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
    """Return the model of a fixture with random weights."""
    fixture = FIXTURES[name]
    config = AutoConfig.for_model(fixture.model_type, **fixture.fields)
    for key, value in fixture.fields.items():
        if getattr(config, key) != (tuple(value) if isinstance(getattr(config, key), tuple) else value):
            sys.exit(f"{name}: transformers changed the field {key} from {value!r} to {getattr(config, key)!r}")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            randomize(key, parameter)
    return model


def randomize(name: str, parameter: nn.Parameter) -> None:
    """Draw a parameter at a scale at which every part of the model affects the logits.

    Decays, gates and attention scores are neither constant nor saturated. Scales, skip weights and biases are drawn
    around their initial values. Embeddings are small, so that the epsilon of the first norm has an effect.
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


def capture_modules(model: nn.Module, tokens: Tensor, modules: dict[str, str]) -> dict[str, Tensor]:
    """Return the inputs and outputs of `modules` (name by key) in a full forward pass, without attention weights."""
    arrays: dict[str, Tensor] = {}

    def make_hook(name: str):
        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            arrays[f"{name}/input"] = args[0] if args else kwargs["hidden_states"]
            arrays[f"{name}/output"] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [
        model.get_submodule(path).register_forward_hook(make_hook(key), with_kwargs=True)
        for key, path in modules.items()
    ]
    logits_of(model, tokens)
    for handle in handles:
        handle.remove()
    return arrays


def decode_with_cache(model: PreTrainedModel, tokens: Tensor, options: dict[str, Any]) -> Tensor:
    """Return the logits of cached decoding: a prefill of half of the tokens, then single tokens."""
    half = tokens.shape[1] // 2
    output = model(tokens[:, :half], use_cache=True, **options)
    name = "cache_params" if "cache_params" in output else "past_key_values"
    pieces = [output.logits]
    for at in range(half, tokens.shape[1]):
        output = model(tokens[:, at : at + 1], use_cache=True, **{name: output[name]}, **options)
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


@contextmanager
def unclamped_step_sizes(model: PreTrainedModel) -> Iterator[None]:
    """Context in which the model does not clamp step sizes."""
    mixers = [module for module in model.modules() if "time_step_limit" in vars(module)]
    limits = [module.time_step_limit for module in mixers]
    for module in mixers:
        module.time_step_limit = NO_LIMIT
    yield
    for module, limit in zip(mixers, limits, strict=True):
        module.time_step_limit = limit


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the larger of the two largest values."""
    return float((a - b).abs().max() / torch.maximum(a.abs().max(), b.abs().max()))


def least_sensitive_weight(model: nn.Module, tokens: Tensor, logits: Tensor) -> tuple[float, str]:
    """Return the smallest change of the logits when one weight is rolled by one position, and the weight.

    Raises:
        SystemExit: The change is smaller than `MIN_EFFECT`.
    """
    effects = []
    for name, parameter in model.named_parameters():
        original = parameter.clone()
        parameter.copy_(original.flatten().roll(1).view_as(original))
        effects.append((relative_difference(logits_of(model, tokens), logits), name))
        parameter.copy_(original)
    effect, weight = min(effects)
    if effect < MIN_EFFECT:
        sys.exit(f"rolling {weight} changes the logits by {effect:.1e} of their scale, less than {MIN_EFFECT:.0e}")
    return effect, weight


def make_arrays(name: str) -> dict[str, np.ndarray]:
    """Return the arrays of the fixture with this name.

    Raises:
        SystemExit: A check of the weights or of cached decoding fails.
    """
    fixture = FIXTURES[name]
    torch.manual_seed(sum(name.encode()))
    model = build(name)
    tokens = torch.randint(model.config.vocab_size, (ROWS, fixture.length))
    logits = logits_of(model, tokens)

    effect, weight = least_sensitive_weight(model, tokens, logits)
    with unclamped_step_sizes(model):
        error = relative_difference(
            decode_with_cache(model, tokens, fixture.decoding_options), unclamped := logits_of(model, tokens)
        )
    if error > DECODING_TOLERANCE:
        sys.exit(
            f"{name}: cached decoding is {error:.1e} away from the full forward, more than {DECODING_TOLERANCE:.0e}"
        )
    clamp_effect = relative_difference(unclamped, logits)
    if (clamp_effect > MIN_EFFECT) != fixture.clamped:
        sys.exit(
            f"{name}: without the clamp on step sizes the logits differ by {clamp_effect:.1e}; "
            f"set clamped={not fixture.clamped}"
        )

    tied = set(model.all_tied_weights_keys)
    arrays = {f"weights/{key}": value for key, value in model.state_dict().items() if key not in tied}
    arrays |= {"tokens": tokens.to(torch.int32), "logits": logits}
    arrays |= capture_modules(model, tokens, fixture.captured)
    config = {"architectures": [type(model).__name__], "model_type": fixture.model_type, **fixture.fields}
    scale = float(logits.abs().max())
    print(f"{name:16} logits to {scale:4.1f}  decode {error:.0e}  smallest effect {effect:.0e} ({weight})")
    return to_numpy(arrays, config, {**fixture.captured, **VERSIONS})


def to_numpy(arrays: dict[str, Tensor], config: dict[str, Any], about: dict[str, str]) -> dict[str, np.ndarray]:
    """Return the contents of a file: arrays, and `config` and `about` as JSON."""
    texts = {"config": np.array(json.dumps(config)), "about": np.array(json.dumps(about))}
    return {key: value.numpy() for key, value in arrays.items()} | texts


def check(name: str, arrays: dict[str, np.ndarray]) -> None:
    """Compare a file with arrays, up to rounding.

    Raises:
        SystemExit: They differ.
    """
    with np.load(FOLDER / f"{name}.npz") as file:
        if set(file) != set(arrays):
            sys.exit(f"{name}: only the file or only the model has the arrays {sorted(set(file) ^ set(arrays))}")
        for key, value in arrays.items():
            if key in ("config", "about"):
                same = json.loads(str(file[key])) == json.loads(str(value))
            elif value.dtype == np.float32:
                same = file[key].shape == value.shape and np.allclose(file[key], value, rtol=1e-5, atol=1e-5)
            else:
                same = np.array_equal(file[key], value)
            if not same:
                sys.exit(f"{name}: {key} differs from the file")


def write(description: str, names: Collection[str], make: Callable[[str], dict[str, np.ndarray]]) -> None:
    """Run a script: write or compare the fixtures that the command line names.

    Args:
        description: Docstring of the script; its first line appears in the help.
        names: All fixtures of the script.
        make: Returns the arrays of a fixture by its name.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"fixtures, of {', '.join(names)}; default: all")
    parser.add_argument("--check", action="store_true", help="compare with the files and write nothing")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f"no such fixture: {', '.join(sorted(unknown))}")
    for package, expected in VERSIONS.items():
        if (installed := version(package).partition("+")[0]) != expected:
            sys.exit(
                f"{package} is version {installed}; it must be {expected}, as for the stored fixtures: install that"
                " version, or change VERSIONS"
            )
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
    if installed := [package for package in KERNEL_PACKAGES if find_spec(package)]:
        sys.exit(f"uninstall {', '.join(installed)}: fixtures are made with the plain torch implementations")
    write(__doc__ or "", FIXTURES, make_arrays)


if __name__ == "__main__":
    main()
