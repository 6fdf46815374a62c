"""Files from anywhere: a field of config.json is computed or rejected by name, and damaged files are rejected."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from recallax.cli.config_files import load_config
from recallax.cli.main import main
from recallax.config import ConfigError, from_json
from recallax.convert import (
    LAYOUTS,
    WeightsError,
    import_config,
    import_parameters,
    layout_of,
    read_safetensors,
    read_weights,
    write_weights,
)
from recallax.convert.config_fields import ConfigFields
from recallax.convert.layouts.falcon_h1_layout import falcon_h1_attention
from recallax.convert.orbax_folder import read_orbax, write_orbax
from recallax.convert.run_import import import_run
from recallax.convert.safetensors_file import CHECKSUM_KEY
from recallax.convert.weights_folder import write_folder_atomic
from recallax.external_file import MAX_CONFIG_BYTES, MAX_JSON_DEPTH, parse_json_object, printable
from recallax.models.pattern import MAX_LAYERS, compress_pattern, parse_pattern
from recallax.tasks.text.tokenizer import BPE
from recallax.train.run_folder import RunFolderError, read_config
from tests.test_parity import FIRST_LAYERS, MODELS, first_layers, fixture

STATE_SPACES = {"d_model": 16, "n_layer": 2, "vocab_size": 32, "rms_norm": True}
SSM_CONFIGS = {"state_spaces_1": {"d_state": 5}, "state_spaces_2": {"layer": "Mamba2", "headdim": 8}}
NAMES = (*MODELS, *FIRST_LAYERS, *SSM_CONFIGS)
"""Every layout from which whole models are imported, most of them several times."""


def published_config(name: str) -> dict[str, Any]:
    if name in SSM_CONFIGS:
        return STATE_SPACES | {"ssm_cfg": SSM_CONFIGS[name]}
    return (first_layers(name, 2) if name in FIRST_LAYERS else fixture(name)).config


@contextmanager
def time_limit(seconds: int = 20) -> Iterator[None]:
    """Turn a read that never ends into a failure."""

    def expire(*_: Any) -> None:
        raise AssertionError(f"it has not ended after {seconds} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


# Fields of config.json

CHANGES: list[tuple[str, Any]] = [
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("rope_parameters", {"type": "linear", "factor": 2.0}),
    ("rope_parameters", {"type": "yarn", "rope_theta": 1e4}),
    ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
    ("rope_parameters", {"rope_type": "default", "type": "dynamic"}),
    ("rope_parameters", {"rope_type": "default", "factor": 8.0}),
    ("rope_parameters", {"rope_type": "default", "attention_factor": 0.5}),
    ("rope_parameters", {"full_attention": {"rope_type": "yarn", "factor": 4.0}}),
    ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}),
    ("rope_parameters", {"rope_type": ["default"]}),
    ("rope_parameters", [{"rope_type": "yarn"}]),
    ("rope_parameters", "yarn"),
    ("rotary_pct", 0.25),
    ("rotary_dim", 4),
    ("rope_interleaved", True),
    ("no_rope_layers", [1, 0]),
    ("original_max_position_embeddings", 4096),
    ("alibi", True),
    ("attention_multiplier", 0.5),
    ("residual_multiplier", 0.22),
    ("embedding_multiplier", 12.0),
    ("logits_scaling", 8.0),
    ("scale_emb", 12),
    ("final_logit_softcapping", 30.0),
    ("attn_logit_softcapping", 50.0),
    ("query_pre_attn_scalar", 256),
    ("use_qk_norm", True),
    ("attention_chunk_size", 8),
    ("attention_window_size", 8),
    ("use_parallel_residual", True),
    ("per_layer_config", {"0": {"hidden_act": "gelu"}}),
    ("quantization_config", {"quant_method": "fp8"}),
    ("is_encoder_decoder", True),
    ("add_cross_attention", True),
    ("pruned_heads", {"0": [1]}),
    ("num_local_experts_per_layer", [1, 8]),
    ("attn_res_block_size", 2),
    ("num_nextn_predict_layers", 2),
    ("attnres_block_size", 2),
    ("norm_before_gate", True),
    ("rms_norm", False),
    ("linear_attn_config", {"num_heads": 7}),
    ("mamba_n_groups", 4),
    ("time_step_limit_2", [0.0, 1.0]),
    ("use_output_norm", False),
    ("hidden_act", "gelu"),
    ("mlp_bias", True),
    ("a\x1b[2Jb\nc", 1),
]
"""Fields that change what a model computes, or that no implementation has."""


@pytest.mark.parametrize("name", NAMES)
def test_a_field_is_computed_or_rejected_by_name(name: str):
    config = published_config(name)
    original, ignored = import_config(config), LAYOUTS[layout_of(config)].ignored_fields
    for field, value in CHANGES:
        assert field not in ignored
        if config.get(field) == value:
            continue
        try:
            model = import_config(config | {field: value})
        except ConfigError as error:
            assert field.split("\x1b")[0] in str(error) and "\x1b" not in str(error) and "\n" not in str(error)
        else:
            assert model != original, (field, value)


@pytest.mark.parametrize("name", ["llama", "mistral", "falcon_h1"])
def test_rotary_fields_are_computed_or_rejected_by_name(name: str):
    config = fixture(name).config
    read: Callable[[dict[str, Any]], Any] = (
        import_config if name != "falcon_h1" else lambda config: falcon_h1_attention(ConfigFields(config))
    )
    plain = {key: value for key, value in config.items() if key != "rope_parameters"}
    assert read(plain) == read(config)
    half = read(plain | {"rope_theta": 5000})
    assert half != read(config) and half == read(plain | {"rope_parameters": {"type": "default", "rope_theta": 5e3}})
    for changes, message in (
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotates 0.5 of a head"),
        ({"rope_parameters": {"rope_theta": "10000"}}, "rope_theta is '10000'; it must be of type float"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'; it must be of type float"),
        ({"rope_theta": 0}, "rope_theta is 0.0; it must be above 0"),
        ({"rope_theta": 5e5}, "rope_theta is 500000.0, and rope_parameters has rope_theta 10000.0"),
        ({"rope_parameters": {"type": "yarn"}}, "rope_parameters has type 'yarn'"),
        ({"rope_parameters": {"full_attention": {}}}, "does not know the field 'full_attention'"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(config | changes)


def test_fields_of_published_configs_are_ignored():
    """Bookkeeping, generation, kernels and initialization, as checkpoints on the hub have them."""
    common = {
        "_name_or_path": "x", "torch_dtype": "bfloat16", "transformers_version": "4.45.0", "use_cache": True,
        "bos_token_id": 1, "eos_token_id": [2, 3], "max_position_embeddings": 4096, "initializer_range": 0.02,
        "attention_dropout": 0.1, "temperature": 0.7, "id2label": {"0": "a"}, "pretraining_tp": 1, "moe": None,
    }  # fmt: skip
    mamba = {
        "d_inner": 32, "d_model": 16, "n_layer": 2, "intermediate_size": 32, "fused_add_norm": True, "rms_norm": True,
        "ssm_cfg": {}, "pad_vocab_size_multiple": 8, "residual_in_fp32": True, "time_step_max": 0.1,
        "time_step_init_scheme": "random", "rescale_prenorm_residual": False,
    }  # fmt: skip
    fla = {"attn_mode": "chunk", "fuse_norm": True, "fuse_swiglu": True, "use_l2warp": False, "hidden_act": "swish"}
    for name, fields in (("llama", common), ("mamba", common | mamba), ("fla_gated_deltanet", common | fla)):
        config = fixture(name).config
        assert import_config(config | fields) == import_config(config)


LINEAR, DENSE = "linear_attention", "dense"
INCONSISTENT: list[tuple[str, dict[str, Any], str]] = [
    ("kimi_linear", {"layer_types": []}, "layer_types has 0 layers"),
    ("kimi_linear", {"mlp_layer_types": []}, "mlp_layer_types has 0 layers"),
    ("kimi_linear", {"layer_types": [LINEAR, "linear_attentoin"]}, "'linear_attentoin' as layer 1.*did you mean"),
    ("kimi_linear", {"mlp_layer_types": [DENSE, "spars"]}, "mlp_layer_types contains 'spars' as layer 1"),
    ("kimi_linear", {"layer_types": [LINEAR, ["linear_attention"]]}, "layer_types contains .'linear_attention'."),
    ("kimi_linear", {"layer_types": [LINEAR] * 3}, "num_hidden_layers is 2, but layer_types has 3 layers"),
    ("kimi_linear", {"mlp_layer_types": [DENSE] * 3}, "num_hidden_layers is 2, but mlp_layer_types has 3 layers"),
    (
        "kimi_linear",
        {"num_hidden_layers": None, "mlp_layer_types": [DENSE] * 3},
        "mlp_layer_types has 3 layers, and layer_types 2",
    ),
    ("kimi_linear", {"dense_ffn_hidden": 56}, "dense_ffn_hidden is 56, but the other fields require 28"),
    ("qwen3_next", {"layer_types": []}, "layer_types has 0 layers"),
    ("qwen3_next", {"layer_types": [LINEAR, "attention"]}, "layer_types contains 'attention' as layer 1"),
    ("qwen3_next", {"layer_types": [LINEAR] * 3}, r"layers \[1\] are not|num_hidden_layers is 2, but"),
    ("qwen3_next", {"mlp_only_layers": [0, "1"]}, "mlp_only_layers contains '1'"),
    ("qwen3_next", {"linear_num_value_heads": 3}, "linear_num_key_heads is 2; linear_num_value_heads 3"),
    ("olmo_hybrid", {"layer_types": []}, "layer_types has 0 layers"),
    ("olmo_hybrid", {"layer_types": ["Linear_attention"] * 2}, "contains 'Linear_attention' as layer 0"),
    ("nemotron_h", {"layers_block_type": []}, "layers_block_type has 0 layers"),
    ("nemotron_h", {"layers_block_type": ["mpl"]}, "contains 'mpl' as layer 0.*did you mean 'mlp'"),
    ("nemotron_h", {"layers_block_type": [{"mlp": 1}]}, "layers_block_type contains {'mlp': 1} as layer 0"),
    ("nemotron_h", {"num_hidden_layers": 4}, "num_hidden_layers is 4, but layers_block_type has 5 layers"),
    ("nemotron_h", {"n_groups": 3}, "n_groups is 3; mamba_num_heads 4 must be a multiple"),
    ("llama", {"num_hidden_layers": MAX_LAYERS + 1}, f"it must be from 1 to {MAX_LAYERS}"),
    ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads is 5; hidden_size 24"),
    ("llama", {"rms_norm_eps": 0}, "rms_norm_eps is 0.0; it must be above 0"),
    ("mamba2", {"num_heads": 3}, "num_heads is 3 and head_dim 8; their product must be"),
    ("mamba2", {"expand": 3}, "their product must be that of expand 3"),
    ("mamba2", {"n_groups": 3}, "n_groups is 3; num_heads 4 must be a multiple"),
    ("mamba2", {"intermediate_size": 31}, "intermediate_size is 31, but the other fields require 32"),
    ("mamba", {"d_inner": 64}, "d_inner is 64, but the other fields require 32"),
    ("mamba", {"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg is"),
    ("fla_gated_deltanet", {"num_v_heads": 3}, "num_heads is 2; num_v_heads 3 must be a multiple"),
    ("fla_kda", {"safe_gate": True}, "safe_gate is True, which needs lower_bound"),
    ("based", {"alt_mixer_layers": [3]}, "alt_mixer_layers contains 3; it must be a layer, from 0 to 2"),
    ("based", {"alt_mixer_layers": ["1"]}, "alt_mixer_layers contains '1'"),
    ("based", {"alt_mixer_2_layers": [-1]}, "alt_mixer_2_layers contains -1"),
    ("based", {"n_head_kv": 3}, "n_head_kv is 3; n_head 2 must be a multiple"),
    ("state_spaces_2", {"ssm_cfg": {"layer": "Mamba2", "headdim": 7}}, "headdim is 7; expand times d_model 32"),
    ("state_spaces_2", {"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "rmsnorm": False}}, "rmsnorm is False"),
    ("state_spaces_1", {"ssm_cfg": {"bias": True}}, "bias is True"),
]


@pytest.mark.parametrize(("name", "changes", "message"), INCONSISTENT)
def test_fields_that_do_not_agree_are_named(name: str, changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        import_config(published_config(name) | changes)


@pytest.mark.parametrize(
    ("mixer", "field", "value"),
    [
        ("mixer", "implicit_long_conv", True),
        ("mixer", "kernel_sizes", 5),
        ("alt_mixer", "eps", 1e-3),
        ("alt_mixer", "zero_init", True),
        ("alt_mixer_2", "softmax_scale", 2.0),
        ("alt_mixer_2", "num_heads", 1),
        ("alt_mixer_2", "causal", False),
    ],
)
def test_arguments_of_based_mixers_are_rejected_by_name(mixer: str, field: str, value: Any):
    config = fixture("based").config
    with pytest.raises(ConfigError, match=f"based's {mixer}.*{field}"):
        import_config(config | {mixer: config[mixer] | {field: value}})


def test_state_spaces_pads_the_vocabulary_to_a_multiple_of_8():
    config = STATE_SPACES | {"vocab_size": 27, "ssm_cfg": {}}
    assert import_config(config).vocab_size == 32
    assert import_config(config | {"pad_vocab_size_multiple": 1}).vocab_size == 27


# Patterns and JSON


@pytest.mark.fault("S5")
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a*1000000000", "too many layers"),
        (f"a*{'9' * 5000}", "too many layers"),
        (f"(a*{MAX_LAYERS} a)", "too many layers"),
        ("((((a*99)*99)*99)*99)", "too many layers"),
        ("(" * 3000 + "a" + ")" * 3000, "nested too deep"),
        ("a " * 200_000, "too many layers"),
        ("a*\u00b2", "without a count"),
        ("a*\u0663", "without a count"),
        ("a*000", "without a count"),
        ("b" * 100_000, "which does not exist"),
    ],
)
def test_patterns_have_limits(pattern: str, message: str):
    with time_limit(), pytest.raises(ConfigError, match=message) as error:
        parse_pattern(pattern, ["a"])
    assert len(str(error.value)) < 300


def test_patterns_within_the_limits_are_parsed():
    assert parse_pattern(f"a*{MAX_LAYERS}", ["a"])[0].num_layers == MAX_LAYERS
    assert len(parse_pattern("a " * MAX_LAYERS, ["a"])) == MAX_LAYERS
    assert parse_pattern("a*0002", ["a"])[0].num_layers == 2
    with pytest.raises(ConfigError, match="there are no layers"):
        compress_pattern([])


def nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    return b'{"a": ' + (opening * depth + closing * depth).encode() + b"}"


HOSTILE_JSON = {
    "nested too deep": nested(3000),
    "nested too deep, more than": nested(MAX_JSON_DEPTH),
    "is nested too deep": b'{"a":' * 3000,
    f"it has more than {MAX_CONFIG_BYTES} bytes": b'{"a": "' + b"x" * MAX_CONFIG_BYTES + b'"}',
    "integer string conversion": b'{"a": ' + b"9" * 5000 + b"}",
    "it is not JSON": b'{"a": "' + b"[" * 3000,
    "the key 'a' is repeated": b'{"a": 1, "a": 2}',
    "its JSON is not an object": b"[1]",
    "utf-8": b'{"a": "\xff"}',
}


@pytest.mark.fault("S5")
@pytest.mark.parametrize("message", HOSTILE_JSON)
def test_json_has_limits(message: str, tmp_path: Path):
    (tmp_path / "config.json").write_bytes(HOSTILE_JSON[message])
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=f"config.json is malformed: .*{message}"):
        read_weights(tmp_path)
    with pytest.raises(RunFolderError, match=f"config.json is not a config: .*{message}"):
        read_config(tmp_path)


def test_brackets_in_strings_do_not_count():
    text = json.dumps({"a": '\\"[{' * 1000, "b": [[]], '"[' * 100: "\\"})
    assert parse_json_object(text.encode()) == json.loads(text)
    assert parse_json_object(nested(MAX_JSON_DEPTH - 1))


@pytest.mark.fault("S5")
def test_a_config_has_a_limit_of_depth():
    value: Any = {}
    for _ in range(3000):
        value = {"class": "LMConfig", "a": [value]}
    for schema in (1, 2):
        with pytest.raises(ConfigError, match="config is nested too deep"):
            from_json({"schema": schema, "model": value}, type(load_config("mqar_micro")))


# Values and dtypes of weights


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        ([1, np.nan], "float32", r"1 values that are not finite in float32, the first nan at \(1,\)"),
        ([np.inf, -np.inf], "float32", r"2 values that are not finite in float32, the first inf at \(0,\)"),
        ([1, np.nan], "bfloat16", r"the first nan at \(1,\)"),
        ([1e300, 1], "float64", r"the first 1e\+300 at \(0,\)"),
        ([1, 2], "int64", "dtype int64; weights must be one of F64"),
        ([True, False], "bool", "dtype bool; weights must be one of F64"),
    ],
)
def test_weights_that_float32_does_not_hold_are_named(values: list[Any], dtype: str, message: str):
    config, weights, _ = fixture("llama")
    damaged = np.ones(weights["model.norm.weight"].shape, np.dtype(dtype))
    damaged[:2] = values
    with pytest.raises(WeightsError, match=f"model.norm.weight has .*{message}"):
        import_parameters(config, weights | {"model.norm.weight": damaged})


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool"])
def test_a_sound_file_with_another_dtype_is_not_called_damaged(dtype: str, tmp_path: Path):
    save_file({"a": np.zeros(2, np.float32), "position_ids": np.ones(3, dtype)}, tmp_path / "model.safetensors")
    message = r"is valid, but its tensor 'position_ids' has dtype '\w+'; recallax imports"
    with pytest.raises(WeightsError, match=message) as error:
        read_safetensors(tmp_path / "model.safetensors")
    assert "download" not in str(error.value) and str(tmp_path) in str(error.value)


# Files that are not regular, and damaged ones


def exported(folder: Path, max_shard_bytes: int = 10**9) -> Path:
    """A small model as recallax exports it."""
    config, weights, _ = fixture("mamba2")
    write_folder_atomic(folder, lambda path: write_weights(path, config, weights, max_shard_bytes))
    return folder


@pytest.mark.fault("S14")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "orbax", "shard"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_file_that_is_not_regular_is_rejected(name: str, kind: str, tmp_path: Path):
    folder = exported(tmp_path / "model", 6_000 if name == "shard" else 10**9)
    path = folder / name
    if name == "shard":
        path = next(folder.glob("model-*"))
    if name == "orbax":
        write_orbax(folder / "parameters", {"a": np.ones(2, np.float32)})
        path = next(file for file in (folder / "parameters").rglob("*") if file.is_file())
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with time_limit(), pytest.raises(WeightsError, match="not a regular file") as error:
        import_run(folder, load_config("mqar_micro"), tmp_path / "run")
    assert path.name in str(error.value)


@pytest.mark.fault("S5")
def test_a_tokenizer_or_a_run_config_that_is_not_regular_is_rejected(tmp_path: Path):
    os.mkfifo(tmp_path / "config.json")
    with time_limit(), pytest.raises(ConfigError, match=r"task.tokenizer.file is .*not a regular file"):
        BPE(file=str(tmp_path / "config.json"), vocab_size=8).load()
    with time_limit(), pytest.raises(RunFolderError, match="not a regular file"):
        read_config(tmp_path)


@pytest.mark.fault("R7", "R23")
@pytest.mark.parametrize("max_shard_bytes", [10**9, 6_000])
def test_every_flipped_bit_of_a_tensor_is_detected(max_shard_bytes: int, tmp_path: Path):
    folder = exported(tmp_path / "model", max_shard_bytes)
    rng = np.random.default_rng(0)
    for path in folder.glob("*.safetensors"):
        original = path.read_bytes()
        start = 8 + int.from_bytes(original[:8], "little")
        for position in [start, len(original) - 1, *rng.integers(start, len(original), 10)]:
            damaged = bytearray(original)
            damaged[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(WeightsError, match=r"the tensor '[\w.]+' does not have the checksum") as error:
                read_weights(folder)
            assert path.name in str(error.value)
        path.write_bytes(original)
    np.testing.assert_equal(read_weights(folder)[1], fixture("mamba2").weights)


@pytest.mark.fault("R23", "S14")
def test_a_damaged_header_is_rejected_or_changes_nothing(tmp_path: Path):
    """Names, shapes, dtypes and offsets; the checksums cover the dtype and the shape."""
    path = exported(tmp_path / "model") / "model.safetensors"
    original, wanted = path.read_bytes(), fixture("mamba2").weights
    length = int.from_bytes(original[:8], "little")
    rng, rejected = np.random.default_rng(0), 0
    for position in rng.integers(0, 8 + length, 300):
        damaged = bytearray(original)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            weights = read_safetensors(path)
        except WeightsError:
            rejected += 1
        else:
            np.testing.assert_equal(weights, wanted)
    assert rejected > 200


def test_files_without_checksums_are_read(tmp_path: Path):
    """Those of other programs and of older versions."""
    folder = exported(tmp_path / "model")
    _, weights = read_weights(folder)
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_equal(read_weights(folder)[1], weights)
    write_orbax(tmp_path / "parameters", {"a": np.ones(2, np.float32)})
    (tmp_path / "checksums.json").unlink()
    np.testing.assert_equal(read_orbax(tmp_path / "parameters"), {"a": np.ones(2, np.float32)})


def test_equal_weights_give_equal_files(tmp_path: Path):
    contents = {(exported(tmp_path / str(n)) / "model.safetensors").read_bytes() for n in range(5)}
    assert len(contents) == 1
    header = json.loads(contents.pop()[8:].split(b"}}", 1)[0].decode(errors="ignore") + "}}")
    assert header["__metadata__"]["format"] == "pt" and CHECKSUM_KEY in header["__metadata__"]


@pytest.mark.parametrize("checksums", ["[]", "{", '{"a": "0"}', "{}"])
def test_checksums_that_do_not_fit_are_rejected(checksums: str, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(2, np.float32)}, path, metadata={CHECKSUM_KEY: checksums})
    with pytest.raises(WeightsError, match="is not a valid safetensors file"):
        read_safetensors(path)


@pytest.mark.fault("R7", "R23")
def test_damaged_orbax_arrays_are_detected(tmp_path: Path):
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(64, 64)).astype(np.float32) for name in "ab"}
    write_orbax(tmp_path / "parameters", weights)
    np.testing.assert_equal(read_orbax(tmp_path / "parameters"), weights)
    largest = max((path for path in tmp_path.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    largest.write_bytes(damaged)
    with pytest.raises(WeightsError, match="parameters is not a valid orbax checkpoint"):
        read_orbax(tmp_path / "parameters")
    checksums = json.loads((tmp_path / "checksums.json").read_text())
    assert checksums.keys() == weights.keys()
    largest.write_bytes(bytes(damaged[: len(damaged) // 2]))
    with pytest.raises(WeightsError, match="parameters is not a valid orbax checkpoint"):
        read_orbax(tmp_path / "parameters")


# Temporary folders

EXPORT_THAT_WAITS = """
import sys, time
from pathlib import Path
from recallax.atomic_files import create_folder_atomic

def write_files(folder):
    (folder / "half").write_text("x")
    print(folder, flush=True)
    time.sleep(600)

create_folder_atomic(Path(sys.argv[1]), write_files)
"""


@pytest.mark.fault("R23")
def test_the_next_export_removes_folders_of_killed_ones_only(tmp_path: Path):
    writers = [
        subprocess.Popen([sys.executable, "-c", EXPORT_THAT_WAITS, tmp_path / name], stdout=subprocess.PIPE, text=True)
        for name in ("killed", "alive")
    ]
    try:
        killed, alive = (Path(writer.stdout.readline().strip()) for writer in writers if writer.stdout)
        writers[0].kill()
        writers[0].wait()
        others = [tmp_path / ".notes.tmp", tmp_path / "killed.0123456789abcdef.tmp"]
        for other in others:
            other.mkdir()
        file = tmp_path / ".killed.0123456789abcdef.tmp"
        file.write_text("not a folder")
        link = tmp_path / ".link.0123456789abcdef.tmp"
        link.symlink_to(others[0])
        assert killed.is_dir() and alive.is_dir()
        exported(tmp_path / "out")
        assert not killed.exists() and (alive / "half").exists()
        assert all(path.exists() for path in (*others, file, link, tmp_path / "out"))
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            if writer.stdout:
                writer.stdout.close()


# The command line


@pytest.mark.fault("S10")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"type": "yarn"}}, "rope_parameters has type 'yarn'"),
        ({"\x1b]0;title\x07\nfield": 1}, r"'\x1b]0;title\x07\nfield'"),
        ({"model_type": "\x1b[2J" + "a" * 10_000}, r"model_type is '\x1b[2Jaaa"),
        ({"model_type": {"a": []}}, "cannot be imported"),
        ({"num_hidden_layers": 10**9}, "there are only"),
        ({"model_type": "recallax", "run": {"schema": 2, "class": "\x1b[2J"}}, r"has class '\x1b[2J'"),
    ],
)
def test_import_prints_one_line_without_control_characters(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config, weights, _ = fixture("llama")
    config = change if change.get("model_type") == "recallax" else config | change
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model" / "model.safetensors")
    assert main(["import", str(tmp_path / "model"), "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and printable(error[:-1]) == error[:-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("S10")
def test_names_of_tensors_are_printed_without_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config, weights, _ = fixture("llama")
    for number, key in enumerate(("\x1b[31mred", "two\nlines", "\u202eright to left", "\x9b2J")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        for array in (np.zeros(1, np.float32), np.zeros(1, np.int32)):
            save_file(weights | {key: array}, folder / "model.safetensors")
            assert main(["import", str(folder), "--run", str(tmp_path / "run")]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and printable(error[:-1]) == error[:-1], error


def test_printable_escapes_what_a_terminal_interprets():
    assert printable("a\x1b[2J\n\t\x00\u202e\udc80\u00e9") == r"a\x1b[2J\n\t\x00\u202e\udc80" + "\u00e9"
