"""Export and import: round trips, exported programs, and invalid files."""

import importlib
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from recallax.cli.config_files import config_names, load_config
from recallax.cli.main import main
from recallax.config import ConfigError, to_json
from recallax.convert import (
    LAYOUTS,
    WeightsError,
    export_config,
    export_programs,
    export_run,
    export_weights,
    import_config,
    import_model,
    import_parameters,
    import_run,
    layout_of,
    load_programs,
    read_run_state,
    read_run_weights,
    read_safetensors,
    read_weights,
    weights_folder,
    write_safetensors,
    write_weights,
)
from recallax.convert.stablehlo import PLATFORMS
from recallax.convert.weights_folder import write_folder_atomic
from recallax.layers import (
    HGRN2,
    KDA,
    Attention,
    Based,
    DeltaNet,
    GatedConv,
    GatedDeltaNet,
    Mamba2,
    MoM,
    NoChannelMixer,
    SlidingWindow,
    SwiGLU,
)
from recallax.models import Autoencoder, Block, LMConfig, Untied
from recallax.models.based_lm import based_1b3, based_360m
from recallax.train.loop import evaluate_run
from recallax.train.program import Program
from recallax.train.run_config import RunConfig, tiny_run
from recallax.train.run_folder import RunFolderError
from recallax.train.training_run import initialize_run
from recallax.types import StepInfo, unpacked_seq_info
from tests.test_parity import FIRST_LAYERS, MODELS, first_layers, fixture

ROUNDED_KEYS = ("layernorm.weight", "model.norm.weight")
"""Endings of keys of Qwen3-Next whose weights an import rounds, because recallax stores 1 + weight."""
IGNORED_FIELDS = {
    "chunk_size", "num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "rope_parameters",
    "mlp_only_layers", "fuse_cross_entropy",
}  # fmt: skip
"""Fields that have no effect on the outputs, or that belong to the removed attention layers."""


@pytest.fixture(autouse=True)
def disable_optimizations() -> Iterator[None]:
    """Disable most optimizations of XLA, because these tests compile far longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def load_fixture(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    config, weights, _ = first_layers(name, 2) if name in FIRST_LAYERS else fixture(name)
    return config, weights


def assert_same_bytes(
    actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], rounded: tuple[str, ...] = ()
) -> None:
    """Assert that arrays are equal byte for byte, except keys that end with one of `rounded`, which must differ."""
    assert actual.keys() == expected.keys()
    for key, array in expected.items():
        assert actual[key].dtype == array.dtype and actual[key].shape == array.shape, key
        assert (actual[key].tobytes() == array.tobytes()) != key.endswith(rounded or "\0"), key


# Layouts of transformers


@pytest.mark.parametrize("name", (*MODELS, *FIRST_LAYERS))
def test_import_export_round_trip(name: str):
    """The config is exported from the model alone; the exported weights are equal byte for byte."""
    config, weights = load_fixture(name)
    model = import_config(config)
    # transformers rejects Olmo-Hybrid without attention layers, and recallax does not write the unused buffer of BASED.
    exported = config if name in ("olmo_hybrid", "based") else export_config(layout_of(config), model)
    assert import_config(exported) == model
    assert {key for key in config if exported.get(key) != config[key]} <= IGNORED_FIELDS
    parameters = import_parameters(config, weights)
    exported_weights = export_weights(exported, parameters)
    rounded = ROUNDED_KEYS if name == "qwen3_next" else ()
    assert_same_bytes(exported_weights, weights, rounded)
    for key in weights:
        np.testing.assert_allclose(exported_weights[key], weights[key], rtol=0, atol=2**-23 * bool(rounded))
    reimported = import_parameters(exported, exported_weights)
    for key, array in parameters.items():
        np.testing.assert_array_equal(reimported[key], array)
    assert_same_bytes(export_weights(exported, reimported), exported_weights)


def test_bfloat16_norm_scales_are_not_rounded():
    """Adding 1 in float32 does not round the bfloat16 weights of published checkpoints."""
    config, weights = load_fixture("qwen3_next")
    weights = {key: x.astype(ml_dtypes.bfloat16).astype(np.float32) for key, x in weights.items()}
    assert_same_bytes(export_weights(config, import_parameters(config, weights)), weights)


def test_export_page_lists_every_layout():
    page = (Path(__file__).parent.parent / "docs" / "commands" / "export.md").read_text()
    assert [name for name in LAYOUTS if f"`{name}`" not in page] == []


def lm_config(pattern: str, **blocks: Block) -> LMConfig:
    return LMConfig(d_model=16, pattern=pattern, blocks=blocks)


MAMBA2 = Block(mixer=Mamba2(head_dim=8, state_dim=4), channel=NoChannelMixer())
ATTENTION, WINDOW = Block(mixer=Attention()), Block(mixer=SlidingWindow())
UNREPRESENTABLE = {
    "channel would be ZeroMixer": ("mamba2", lm_config("a*2", a=Block(mixer=MAMBA2.mixer))),
    "soft_cap would be None": ("mamba2", replace(lm_config("a", a=MAMBA2), soft_cap=3.0)),
    "eps would be 0.001": ("mamba2", replace(lm_config("a", a=MAMBA2), norm_eps=1e-3)),
    "24 is not a multiple of d_model 16": (
        "mamba2",
        lm_config("a", a=replace(MAMBA2, mixer=Mamba2(head_dim=8, intermediate_size=24))),
    ),
    "layer 0 has the mixer MemoryMixer": ("llama", lm_config("a", a=MAMBA2)),
    "layers.1.mixer.window would be None, and is 64": ("llama", lm_config("a b", a=ATTENTION, b=WINDOW)),
    "no positions": ("llama", lm_config("a", a=Block(mixer=Attention(rope_theta=None)))),
    "none can be exported": ("falcon_h1", lm_config("a", a=MAMBA2)),
    "olmo_hybrid: .*none can be exported": ("olmo_hybrid", lm_config("a", a=Block(mixer=GatedDeltaNet()))),
    # HGRN2 of fla divides queries by the root of their width before a norm with the same eps
    "layers.0.mixer.readout.norm_eps would be 4e-05, and is 1e-05": ("hgrn2", lm_config("a", a=Block(mixer=HGRN2()))),
    "layers.0.mixer.readout.gate.up.bias would be .16,., and is None": ("kda", lm_config("a", a=Block(mixer=KDA()))),
    "no short convolution": ("delta_net", lm_config("a", a=Block(mixer=DeltaNet(conv_size=0)))),
    "norms have eps 0.001, and this layout supports only 1e-05": (
        "state-spaces",
        replace(lm_config("a", a=MAMBA2), norm_eps=1e-3),
    ),
    "layer 0 has the mixer SoftmaxAttentionMixer": ("based", lm_config("a", a=ATTENTION)),
    "did you mean 'llama'": ("lama", lm_config("a", a=ATTENTION)),
}


@pytest.mark.parametrize("message", UNREPRESENTABLE)
def test_unrepresentable_models_are_rejected(message: str):
    with pytest.raises(ConfigError, match=message):
        export_config(*UNREPRESENTABLE[message], 32)


def test_copy_of_a_tied_output_projection_is_accepted():
    config, weights = load_fixture("mamba")
    embedding = weights["backbone.embeddings.weight"]
    copied = weights | {"lm_head.weight": embedding.copy()}
    assert_same_bytes(export_weights(config, import_parameters(config, copied)), weights)
    with pytest.raises(WeightsError, match=r"lm_head.weight differs from backbone.embeddings.weight"):
        import_parameters(config, weights | {"lm_head.weight": embedding + 1})


# Layouts with other names of keys


def test_hgrn2_lower_bounds_are_reconstructed(tmp_path: Path):
    """fla stores one parameter for the lower bounds of all layers; recallax also stores the bound of each layer."""
    config, weights = load_fixture("fla_hgrn2")
    rows = {key: np.concatenate([weights[key]] * 2) for key in ("model.embeddings.weight", "lm_head.weight")}
    (tmp_path / "source").mkdir()
    write_weights(tmp_path / "source", config | {"vocab_size": 64}, weights | rows)
    run = import_run(tmp_path / "source", load_config("mqar_micro"), tmp_path / "run")
    logits = weights["model.lower_bounds"]
    shares = np.exp(logits) / np.exp(logits).sum(axis=0)
    variables = read_run_weights(run).variables
    np.testing.assert_array_equal(variables["layers.0.mixer.cell.floor"], 0)
    np.testing.assert_allclose(variables["layers.1.mixer.cell.floor"], shares[1], rtol=1e-6)
    assert export_run(run, "safetensors", tmp_path / "out") == "hgrn2"
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "source" / file).read_bytes()


def test_fla_intermediate_size_defaults_to_a_ratio():
    for name, intermediate_size in {"fla_gated_deltanet": 2816, "fla_retnet": 1536}.items():
        config, _ = load_fixture(name)
        config = config | {"hidden_size": 1000, "intermediate_size": None}
        # int(1000 * 4 * 2 / 3), rounded up to a multiple of 256; the ratio of RetNet is 2
        assert import_config(config).blocks["layer"].channel == SwiGLU(intermediate_size=intermediate_size)


STATE_SPACES = {"n_layer": 2, "d_model": 16, "vocab_size": 27, "pad_vocab_size_multiple": 8, "rms_norm": True}
STATE_SPACES |= {"residual_in_fp32": True, "fused_add_norm": True}


def state_spaces_fixture(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A fixture of transformers as state-spaces keeps it: tied, and the readout beside the embedding."""
    config, weights = load_fixture(name)
    renamed = {key.replace("embeddings", "embedding"): x for key, x in weights.items()}
    renamed["lm_head.weight"] = renamed["backbone.embedding.weight"]
    ssm = {"d_state": config["state_size"], "expand": config["expand"]}
    if name == "mamba":
        ssm["dt_rank"] = config["time_step_rank"]
    else:
        ssm |= {"layer": "Mamba2", "headdim": 8, "ngroups": config["n_groups"]}
    return STATE_SPACES | {"ssm_cfg": ssm}, renamed


@pytest.mark.parametrize("name", ["mamba", "mamba2_groups"])
def test_state_spaces_names_round_trip(name: str):
    config, weights = state_spaces_fixture(name)
    transformers_config, _ = load_fixture(name)
    assert layout_of(config) == "state-spaces" and layout_of(transformers_config) == transformers_config["model_type"]
    model = import_config(config)
    assert model == import_config(transformers_config | {"tie_word_embeddings": True})
    parameters = import_parameters(config, weights)
    exported = export_config("state-spaces", model)
    # The dataclass of mamba_ssm accepts exactly these fields.
    assert exported.keys() == STATE_SPACES.keys() | {"ssm_cfg", "tie_embeddings"}
    assert import_config(exported) == model and layout_of(exported) == "state-spaces"
    for source in (config, exported):
        assert_same_bytes(export_weights(source, parameters), weights)
    renamed = {key.replace("embedding.", "embeddings."): x for key, x in weights.items() if key != "lm_head.weight"}
    assert_same_bytes(parameters, import_parameters(transformers_config | {"tie_word_embeddings": True}, renamed))


def test_state_spaces_checkpoint_round_trip(tmp_path: Path):
    """Files are equal byte for byte with a padded vocabulary, with and without a copy of the output projection."""
    config, weights = state_spaces_fixture("mamba2_groups")
    embedding = np.random.default_rng(0).normal(size=(64, 16)).astype(ml_dtypes.bfloat16)
    config |= {"vocab_size": 60}
    one = {key: x for key, x in weights.items() if key != "lm_head.weight"} | {"backbone.embedding.weight": embedding}
    for name, arrays in {"one": one, "both": one | {"lm_head.weight": embedding}}.items():
        (tmp_path / name).mkdir()
        write_weights(tmp_path / name, config, arrays)
        run = import_run(tmp_path / name, load_config("mqar_micro"), tmp_path / f"run_{name}")
        assert export_run(run, "safetensors", tmp_path / f"out_{name}") == "state-spaces"
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / f"out_{name}" / file).read_bytes() == (tmp_path / name / file).read_bytes()
    assert export_run(run, "safetensors", tmp_path / "transformers", layout="mamba2") == "mamba2"
    exported = load_file(tmp_path / "transformers" / "model.safetensors")
    expected = {key.replace("embedding.", "embeddings."): x.astype(np.float32) for key, x in one.items()}
    assert_same_bytes(exported, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba3"}}, "layer is 'Mamba3'; only Mamba1, Mamba2"),
        ({"ssm_cfg": {"dt_limit": [0, 1]}}, "does not know the field 'dt_limit'"),
        ({"ssm_cfg": {}, "moe": 8}, "does not know the field 'moe'"),
        ({"ssm_cfg": {}, "attn_layer_idx": [3]}, "all its layers must be Mamba"),
        ({"ssm_cfg": {}, "rms_norm": False}, "no mean and no bias"),
    ],
)
def test_unsupported_state_spaces_configs_are_rejected(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        import_config(STATE_SPACES | changes)


@pytest.mark.parametrize("size", [based_360m, based_1b3])
def test_published_based_exports_as_the_released_configs(size: Callable[[], LMConfig]):
    """The expected layers, widths and windows are those of `reference/based-360m.yaml` and `based-1b.yaml` of BASED."""
    written = export_config("based", size())
    layers = len(written["alt_mixer_layers"])
    assert (written["n_layer"], layers) == {1024: (27, 5), 1792: (36, 7)}[written["n_embd"]]
    assert written["alt_mixer_layers"] == [1, 6, 11, 16, 21, 27, 33][:layers]
    assert written["alt_mixer_2_layers"] == [2, 7, 12, 17, 22, 28, 34][:layers]
    assert written["n_inner"] == 2 * written["n_embd"] and written["vocab_size"] == 50_264
    expected = {
        "mixer": {"_target_": "based.models.mixers.convolution.BaseConv", "expand_proj": 4, "use_bias": True},
        "alt_mixer": {"_target_": "based.models.mixers.linear_attention.LinearAttention", "feature_dim": 16},
        "alt_mixer_2": {"_target_": "based.models.mixers.slide_attention.SlidingAttention", "window_size": 256},
    }
    for field, values in expected.items():
        assert values.items() <= written[field].items()
    assert written["alt_mixer"]["num_heads"] == written["n_head"] == 16 and layout_of(written) == "based"
    assert import_config(written).layer_names == size().layer_names


UNSUPPORTED_BASED_FIELDS = {
    "n_positions is 1024": {"n_positions": 1024},
    "qkv_proj_bias is True": {"qkv_proj_bias": None},
    "mixer is missing, which means full attention": {"mixer": None},
    "_target_ is 'based.models.Hedgehog'": {"mixer": {"_target_": "based.models.Hedgehog"}},
    "rotary_emb_fraction is 0.5": {"rotary_emb_fraction": 0.5},
    "use_cuda is True": {"mixer": {"_target_": "based.models.mixers.convolution.BaseConv", "use_cuda": True}},
    "expand_proj is 3": {"mixer": {"_target_": "based.models.mixers.convolution.BaseConv", "expand_proj": 3}},
}  # fmt: skip


@pytest.mark.parametrize("message", UNSUPPORTED_BASED_FIELDS)
def test_unsupported_based_configs_are_rejected(message: str):
    config, _ = load_fixture("based")
    changes = UNSUPPORTED_BASED_FIELDS[message]
    changed = {key: value for key, value in (config | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        import_config(changed)


def test_alt_mixer_2_has_precedence_over_alt_mixer():
    """This holds for a layer that both lists contain."""
    config, _ = load_fixture("based")
    assert import_config(config).layer_names == ["conv", "based", "window"]
    assert import_config(config | {"alt_mixer_2_layers": [1]}).layer_names == ["conv", "window", "conv"]


def test_older_based_convolution_class_is_imported():
    """An older class of BASED has a list of kernel sizes and other names of weights."""
    config, weights = load_fixture("based")
    silu4 = {"_target_": "based.models.mixers.base_conv.BaseConvWithSiLU4", "kernel_sizes": [3], "expand_proj": 4}
    renamed = {key.replace("mixer.conv.conv", "mixer.conv1.conv"): x for key, x in weights.items()}
    assert renamed.keys() != weights.keys()
    parameters = import_parameters(config | {"mixer": silu4}, renamed)
    assert_same_bytes(parameters, import_parameters(config, weights))


# Runs


def tiny_run_config(model: LMConfig) -> RunConfig:
    return tiny_run(load_config("mqar_micro"), model=model)


def write_run(config: RunConfig, folder: Path) -> Path:
    """Write a run at step 0 with random parameters and statistics."""
    program = Program(config)
    rng = np.random.default_rng(0)

    def draw(like: dict) -> dict:
        return jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype(x.dtype), like)

    initialize_run(folder, program, draw(program.abstract_state.params), draw(program.abstract_state.statistics))
    return folder


HYBRID = replace(
    lm_config(
        "based (mom hgrn)*2",
        based=Block(mixer=Based(feature_dim=4, num_heads=2)),
        mom=Block(mixer=MoM(memory=GatedDeltaNet(num_heads=2), num_memories=3, top_k=2)),
        hgrn=Block(mixer=HGRN2()),
    ),
    lm_head=Untied(),
)
"""Model that no published layout supports, with repeated layers and statistics."""


def test_recallax_layout_round_trip(tmp_path: Path):
    """A run without a published layout is exported to safetensors and orbax, and imported again."""
    run = write_run(tiny_run_config(HYBRID), tmp_path / "run")
    assert export_run(run, "safetensors", tmp_path / "out") == "recallax"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {"embedding", "layers.0.mixer.readout.out.kernel", "layers.4.mixer.query.parts.q.kernel"} <= weights.keys()
    assert not any("stack" in key for key in weights) and any(key.endswith("cell.floor") for key in weights)
    assert_same_bytes(read_run_weights(run).variables, weights)

    again = import_run(tmp_path / "out", load_config("mqar_micro"), tmp_path / "again")
    assert not (again / "log.jsonl").exists() and read_run_weights(again).config == read_run_weights(run).config
    assert export_run(again, "safetensors", tmp_path / "twice") == "recallax"
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()

    assert export_run(again, "orbax", tmp_path / "orbax") == "recallax"
    third = import_run(tmp_path / "orbax", load_config("mqar_micro"), tmp_path / "third")
    assert_same_bytes(read_run_weights(third).variables, weights)


def test_exports_do_not_depend_on_repeats_in_the_pattern(tmp_path: Path):
    """A run whose pattern has repeats and one with a list of layers export the same files and import each other's."""
    model = lm_config("(a b*2)*2", a=ATTENTION, b=WINDOW)
    flat = replace(model, pattern=" ".join(model.layer_names))
    run = write_run(tiny_run_config(model), tmp_path / "stacked")
    export_run(run, "safetensors", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["run"] = to_json(tiny_run_config(flat))
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    unstacked = import_run(tmp_path / "out", load_config("mqar_micro"), tmp_path / "unstacked")
    assert read_run_weights(unstacked).config.model.pattern == flat.pattern
    assert_same_bytes(read_run_weights(unstacked).variables, read_run_weights(run).variables)
    assert evaluate_run(unstacked, "valid", 1)["loss"] == pytest.approx(evaluate_run(run, "valid", 1)["loss"], rel=1e-6)


@pytest.mark.fault("R23")
@pytest.mark.parametrize("name", ["mamba2_groups", "llama"])
def test_published_model_round_trip_is_exact(name: str, tmp_path: Path):
    """Files with bfloat16 and float32 arrays, and fields that recallax does not use, are equal byte for byte."""
    config, weights = load_fixture(name)
    config = config | {"vocab_size": 64, "task_specific_params": [1, {"a": None}]}
    weights = {key: np.concatenate([x] * 2) if x.shape[0] == 32 and x.ndim == 2 and "layers" not in key else x
               for key, x in weights.items()}  # fmt: skip
    weights = {key: x if x.ndim == 1 else x.astype(ml_dtypes.bfloat16) for key, x in weights.items()}
    source = tmp_path / "source"
    source.mkdir()
    write_weights(source, config, weights)
    run = import_run(source, load_config("mqar_micro"), tmp_path / "run")
    assert export_run(run, "safetensors", tmp_path / "out") == config["model_type"]
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()
    assert 0 <= evaluate_run(run, "valid", 1)["accuracy"] <= 1

    assert export_run(run, "safetensors", tmp_path / "half", dtype="float16") == config["model_type"]
    assert {x.dtype.name for x in load_file(tmp_path / "half" / "model.safetensors").values()} == {"float16"}
    assert export_run(run, "safetensors", tmp_path / "own", layout="recallax") == "recallax"
    assert_same_bytes(load_file(tmp_path / "own" / "model.safetensors"), read_run_weights(run).variables)


def test_layout_is_selected_from_the_model(tmp_path: Path):
    """The run was never imported; its config is exported from the model alone, and its weights can be imported."""
    run = write_run(tiny_run_config(lm_config("a*2", a=MAMBA2)), tmp_path / "run")
    assert export_run(run, "safetensors", tmp_path / "out") == "mamba2"
    config, weights = read_weights(tmp_path / "out")
    assert config["architectures"] == ["Mamba2ForCausalLM"] and config["vocab_size"] == 64
    with pytest.raises(ConfigError, match="cannot be exported as llama"):
        export_run(run, "safetensors", tmp_path / "no", layout="llama")
    model = import_model(config, weights, "mamba mamba")
    assert nnx.state(model, nnx.Param)["stack"]["parts"][1]["mixer"]["cell"]["d"].shape == (4,)
    assert_same_bytes(import_parameters(config, weights), read_run_weights(run).variables)


def test_new_based_model_round_trip(tmp_path: Path):
    """The model differs from the fixture: untied, grouped keys, no positions, another norm_eps."""
    mlp = SwiGLU(intermediate_size=256)
    blocks = {
        "a": Block(mixer=GatedConv(conv_size=4, expand=1), channel=mlp),
        "b": Block(mixer=Based(feature_dim=4, num_heads=4), channel=mlp),
        "c": Block(mixer=SlidingWindow(window=5, num_heads=4, num_kv_heads=2, rope_theta=None), channel=mlp),
    }
    model = replace(lm_config("(b c a)*2", **blocks), lm_head=Untied(), norm_eps=1e-4)
    run = write_run(tiny_run_config(model), tmp_path / "run")
    assert export_run(run, "safetensors", tmp_path / "out") == "based"
    config, weights = read_weights(tmp_path / "out")
    assert weights["transformer.layers.1.mixer.Wqkv.weight"].shape == (32, 16) and "lm_head.weight" in weights
    assert_same_bytes(import_parameters(config, weights), read_run_weights(run).variables)


@pytest.mark.fault("R23")
def test_failed_export_writes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = write_run(tiny_run_config(lm_config("a", a=MAMBA2)), tmp_path / "run")

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(weights_folder, "write_safetensors", fail)
    with pytest.raises(WeightsError, match="out cannot be written: the disk is full"):
        export_run(run, "safetensors", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    monkeypatch.undo()
    with pytest.raises(
        WeightsError, match=r"out cannot be written: .*I/O error"
    ):  # an error of the safetensors library
        write_folder_atomic(tmp_path / "out", lambda folder: write_safetensors(folder / "none" / "a.safetensors", {}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    export_run(run, "safetensors", tmp_path / "out")
    with pytest.raises(WeightsError, match="already exists"):
        export_run(run, "safetensors", tmp_path / "out")
    with pytest.raises(RunFolderError, match=r"has checkpoints of the steps \[0\]"):
        export_run(run, "safetensors", tmp_path / "own", layout="recallax")
        import_run(tmp_path / "own", load_config("mqar_micro"), run)


@pytest.mark.fault("S14")
def test_sizes_beyond_the_weights_are_rejected_without_allocation(tmp_path: Path):
    """No array of the stated size is allocated, which would exhaust the memory."""
    config, weights = load_fixture("llama")
    with pytest.raises(WeightsError, match="would need 32000000000000 numbers"):
        import_parameters(config | {"hidden_size": 10**12, "head_dim": 8}, weights)
    for name, field in {"based": "n_inner", "fla_mamba2": "state_size", "qwen3_next": "linear_value_head_dim"}.items():
        sizes, weights_of_size = load_fixture(name)
        with pytest.raises(WeightsError, match="would need"):
            import_parameters(sizes | {field: 2**50}, weights_of_size)
    (tmp_path / "source").mkdir()
    write_weights(tmp_path / "source", config | {"num_hidden_layers": 10**9}, weights)
    with pytest.raises(WeightsError, match="num_hidden_layers 1000000000, but there are only 21 arrays"):
        import_run(tmp_path / "source", load_config("mqar_micro"), tmp_path / "run")
    (tmp_path / "based").mkdir()
    config, weights = load_fixture("based")
    write_weights(tmp_path / "based", config | {"n_layer": 10**9}, weights)
    with pytest.raises(WeightsError, match="n_layer 1000000000, but there are only 27 arrays"):
        import_run(tmp_path / "based", load_config("mqar_micro"), tmp_path / "run")


INCONSISTENT_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "num_hidden_layers is 0; it must be from 1 to": ("fla_gla", {"num_hidden_layers": 0}),
    "num_hidden_layers is -1; it must be from 1 to": ("fla_gla", {"num_hidden_layers": -1}),
    "num_heads is 0; it must be": ("fla_gla", {"num_heads": 0}),
    "hidden_size is 10*...; it must be from 1 to": ("fla_gla", {"hidden_size": 10**400}),
    "norm_eps is 10*...; it must be of type float": ("fla_gla", {"norm_eps": 10**400}),
    "expand_k is nan; it must be finite": ("fla_gla", {"expand_k": float("nan")}),
    "expand_v makes all heads -": ("fla_gla", {"expand_v": -1}),
    "expand_v -1 makes values -": ("fla_kda", {"expand_v": -1}),
    "expand_v is inf; it must be finite": ("fla_kda", {"expand_v": float("inf")}),
    "expand_ratio is 0; it must be": ("fla_hgrn2", {"expand_ratio": 0}),
    "head_dim is '8'; it must be of type int": ("fla_mamba2", {"head_dim": "8"}),
    "head_dim is 0; it must be": ("fla_mamba2", {"head_dim": 0}),
    r"time_step_limit is \[0, 1, 2\]; it must be two numbers": ("fla_mamba2", {"dt_limit": [0, 1, 2]}),
    r"time_step_limit is \[nan, 1\]; the first must be": ("fla_mamba2", {"dt_limit": [float("nan"), 1]}),
    "n_head is 0; it must be": ("based", {"n_head": 0}),
    "n_head is 1000000; n_embd": ("based", {"n_head": 10**6}),
    "pad_vocab_size_multiple is 0; it must be": ("based", {"pad_vocab_size_multiple": 0}),
    "vocab_size is -8; it must be": ("based", {"vocab_size": -8}),
    "ssm_cfg is 3; it must be of type dict": ("state_spaces", {"ssm_cfg": 3}),
    "headdim is 0; it must be": ("state_spaces", {"ssm_cfg": {"layer": "Mamba2", "headdim": 0}}),
}


@pytest.mark.parametrize("message", INCONSISTENT_CONFIGS)
def test_inconsistent_configs_are_rejected(message: str):
    """The error names the field, whatever values a config.json contains."""
    name, changes = INCONSISTENT_CONFIGS[message]
    config, weights = state_spaces_fixture("mamba2_groups") if name == "state_spaces" else load_fixture(name)
    with pytest.raises(ConfigError, match=message):
        import_parameters(config | changes, weights)


INVALID_NATIVE_FILES: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "lack 'layers.0.mixer.cell.d'": lambda w: w.pop("layers.0.mixer.cell.d"),
    "no parameter for 'layers.9.q'": lambda w: w.update({"layers.9.q": np.zeros(2, np.float32)}),
    r"norm.scale has shape \(3,\); it must be \(16,\)": lambda w: w.update({"norm.scale": np.zeros(3, np.float32)}),
}


@pytest.mark.fault("S14")
@pytest.mark.parametrize("message", INVALID_NATIVE_FILES)
def test_invalid_weights_in_the_recallax_layout_are_rejected(message: str, tmp_path: Path):
    run = write_run(tiny_run_config(lm_config("a", a=MAMBA2)), tmp_path / "run")
    export_run(run, "safetensors", tmp_path / "out", layout="recallax")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    INVALID_NATIVE_FILES[message](weights)
    save_file(weights, tmp_path / "out" / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        import_run(tmp_path / "out", load_config("mqar_micro"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


# Compiled programs


def trained_model(run: Path) -> Any:
    """Return the model of a run with its parameters and statistics."""
    _, graph, _, params, statistics = read_run_state(run)
    return nnx.merge(graph, params, statistics)


LENGTH, CONTEXT = 6, 20


@pytest.mark.usefixtures("unchecked")
def test_exported_programs_equal_the_model(tmp_path: Path):
    """Two prefills, the second one shorter in some rows, then steps with an inactive row, for any number of rows."""
    decoder = lm_config("a*2 b", a=MAMBA2, b=Block(mixer=SlidingWindow(window=5)))
    run = write_run(tiny_run_config(decoder), tmp_path / "run")
    export_programs(run, tmp_path / "out", prefill_length=LENGTH, max_len=CONTEXT)
    programs, model = load_programs(tmp_path / "out"), trained_model(run)
    prefill, step = jax.jit(model.prefill), jax.jit(model.step)
    tokens = np.random.default_rng(1).integers(64, size=(3, 2 * LENGTH)).astype(np.int32)
    first, second = tokens[:, :LENGTH], tokens[:, LENGTH:]
    lengths = np.array([4, 6, 1], np.int32)
    full, zero, positions = np.full(3, LENGTH, np.int32), np.zeros(3, np.int32), np.arange(LENGTH)[None]

    used_state = {name: np.ones_like(x) for name, x in programs.init_state(3).items()}  # position 0 resets the state
    logits, state = programs.prefill(programs.weights, first, full, zero, used_state)
    seq = jax.tree.map(jnp.asarray, unpacked_seq_info(3, LENGTH))
    expected, expected_state, _ = prefill(jnp.asarray(first), seq, model.init_state(3, CONTEXT))
    assert_close(logits, expected[:, -1])
    one, _ = programs.prefill(programs.weights, first[:1], full[:1], zero[:1], programs.init_state(1))
    assert_close(one, logits[:1])

    logits, state = programs.prefill(programs.weights, second, lengths, full, state)
    segments = jnp.asarray((positions < lengths[:, None]).astype(np.int32))
    seq = seq._replace(positions=seq.positions + LENGTH, segment_ids=segments)
    expected, expected_state, _ = prefill(jnp.asarray(second), seq, expected_state)
    assert_close(logits, expected[np.arange(3), lengths - 1])

    position, active = LENGTH + lengths, np.array([True, False, True])
    for token in (3, 5):
        next_tokens = np.full(3, token, np.int32)
        logits, state = programs.step(programs.weights, next_tokens, position, active, state)
        info = StepInfo(jnp.asarray(position), jnp.asarray(active))
        expected, expected_state = step(jnp.asarray(next_tokens), info, expected_state)
        assert_close(logits[active], expected[active])
        position = position + active
    names = programs.metadata["state"]  # `jax.export` returns a dictionary in alphabetical order
    for name, leaf in zip(names, jax.tree.leaves(expected_state), strict=True):
        assert_close(state[name], leaf)


def assert_close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_exported_programs_support_every_platform_and_contain_no_weights(tmp_path: Path):
    run = write_run(
        tiny_run_config(lm_config("a", a=replace(MAMBA2, mixer=Mamba2(head_dim=8, state_dim=512)))), tmp_path / "run"
    )
    export_programs(run, tmp_path / "out", prefill_length=LENGTH, max_len=CONTEXT)
    for name in ("prefill", "step"):
        program = jax.export.deserialize(bytearray((tmp_path / "out" / f"{name}.jax").read_bytes()))
        assert program.platforms == PLATFORMS == ("cpu", "cuda", "tpu")
        assert "stablehlo.custom_call @tpu" not in program.mlir_module() and "mosaic" not in program.mlir_module()
        assert (tmp_path / "out" / f"{name}.stablehlo").stat().st_size < 60_000
    assert (tmp_path / "out" / "weights.safetensors").stat().st_size > 90_000


def test_models_without_decoding_are_not_exported(tmp_path: Path):
    run = write_run(tiny_run_config(replace(lm_config("a", a=MAMBA2), lm_head=Autoencoder())), tmp_path / "run")
    for length, context, message in (
        (0, 5, "prefill_length is 0"),
        (6, 5, "prefill_length is 6; it must be from 1 to max_len, which is 5"),
        (5, 5, "no step"),
    ):
        with pytest.raises(ConfigError, match=message):
            export_programs(run, tmp_path / "out", prefill_length=length, max_len=context)
    assert not (tmp_path / "out").exists()


@pytest.mark.full
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", config_names())
def test_every_config_exports_programs_for_any_batch_size(name: str, tmp_path: Path):
    config = importlib.import_module(f"recallax.configs.{name}").get_tiny()
    if isinstance(config.model.lm_head, Autoencoder):
        return
    export_programs(write_run(config, tmp_path / "run"), tmp_path / "out", prefill_length=LENGTH, max_len=CONTEXT)
    programs = load_programs(tmp_path / "out")
    for rows in (1, 2):
        row = np.ones(rows, np.int32)
        logits, state = programs.prefill(programs.weights, np.zeros((rows, LENGTH), np.int32), 3 * row, 0 * row,
                                         programs.init_state(rows))  # fmt: skip
        again, _ = programs.step(programs.weights, row, 3 * row, row > 0, state)
        assert logits.shape == again.shape and np.isfinite(logits).all() and np.isfinite(again).all()


# Invalid files


def safetensors_file(entries: Any, size: int = 8) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def entry(first: int, last: int, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


DUPLICATE_KEY = (
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
)
INVALID_SAFETENSORS = {
    "it has 0 bytes and states": b"",
    "it has 7 bytes and states": bytes(7),
    "states a header of 9 bytes": struct.pack("<Q", 9) + b"{}",
    "states a header of 18446744073709551615": b"\xff" * 8 + b"{}",
    "header of 100000001": struct.pack("<Q", 100_000_001) + b"{}",
    "it is not JSON": safetensors_file(b"{", 0),
    "not JSON: Expecting value": safetensors_file(b"\x80\x04\x95.".replace(b"\x80", b"c").replace(b"\x95", b"o")),
    "utf-8": safetensors_file(b'{"\xff": 1}'),
    "nested too deep": safetensors_file(b"[" * 100_000),
    "is not an object": safetensors_file(b"[]", 0),
    "'a' is repeated": safetensors_file(DUPLICATE_KEY),
    "'dtype' is repeated": safetensors_file(b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}'),
    "end at byte 4 of 8": safetensors_file({"a": entry(0, 4)}),
    "'b' starts at byte 0 instead of 4, which overlaps": safetensors_file({"a": entry(0, 4), "b": entry(0, 8, (2,))}),
    "'b' starts at byte 2 instead of 4, which overlaps": safetensors_file({"a": entry(0, 4), "b": entry(2, 6)}),
    "'a' starts at byte 4 instead of 0, which leaves a gap": safetensors_file({"a": entry(4, 8)}),
    "end at byte 16 of 8": safetensors_file({"a": entry(0, 16, (4,))}),
    "not the number of bytes of F32": safetensors_file({"a": entry(0, 8)}),
    r"the offsets \[8, 4\], which": safetensors_file({"a": entry(8, 4)}),
    r"the offsets \[-4, 4\]; both must be lists of sizes": safetensors_file({"a": entry(-4, 4, (2,))}),
    r"the shape \[-1, -2\]": safetensors_file({"a": entry(0, 8, (-1, -2))}),
    r"the shape \[true, 2\]|the shape \[True, 2\]": safetensors_file({"a": entry(0, 8, (True, 2))}),
    r"the shape \[2.0\]": safetensors_file({"a": entry(0, 8, (2.0,))}),
    "has 17 axes": safetensors_file({"a": entry(0, 8, (1,) * 16 + (2,))}),
    "which are not the number of bytes of F32 .4611686018427387904": safetensors_file({"a": entry(0, 8, (2**62, 4))}),
    r"the axes \[0, 4611686018427387904\], larger than any": safetensors_file({"a": entry(0, 0, (0, 2**62))}, 0),
    "has dtype 'I64'": safetensors_file({"a": entry(0, 8, dtype="I64")}),
    r"has dtype \['F32'\]": safetensors_file({"a": entry(0, 8, dtype=["F32"])}),
    "exactly the fields dtype, shape and data_offsets": safetensors_file({"a": entry(0, 8) | {"code": "import os"}}),
    "'a' does not have exactly the fields": safetensors_file({"a": None}),
    "__metadata__ does not map names to text": safetensors_file(
        {"__metadata__": {"format": 1}, "a": entry(0, 8, (2,))}
    ),
}


@pytest.mark.fault("R23", "S14")
@pytest.mark.parametrize("message", INVALID_SAFETENSORS)
def test_invalid_safetensors_headers_are_rejected(message: str, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(INVALID_SAFETENSORS[message])
    with pytest.raises(WeightsError, match=message) as error:
        read_safetensors(path)
    assert str(path) in str(error.value)


def test_safetensors_library_files_are_read(tmp_path: Path):
    """Files with all dtypes, scalars, empty arrays, and tensors at unaligned offsets."""
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 5)).astype(np.float16),
        "b": np.float32(rng.normal(size=())),
        "c": np.zeros((0, 4), np.float32),
        "d": rng.normal(size=(2, 1, 3)),
        "e": rng.normal(size=7).astype(ml_dtypes.bfloat16),
    }
    arrays = {key: np.asarray(x) for key, x in arrays.items()}
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_bytes(read_safetensors(tmp_path / "model.safetensors"), arrays)
    write_safetensors(tmp_path / "ours.safetensors", arrays | {"f": arrays["d"].T})
    assert_same_bytes(load_file(tmp_path / "ours.safetensors"), arrays | {"f": arrays["d"].T})
    save_file({}, tmp_path / "empty.safetensors")
    assert read_safetensors(tmp_path / "empty.safetensors") == {}


def write_shards(folder: Path, **names: Any) -> Path:
    """Write a model in two shards; `names` replaces the shard that the index records for the key `a` or `b`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for key in "ab":
        save_file({key: np.full(2, ord(key), np.float32)}, folder / f"{key}.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"} | names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_read(tmp_path: Path):
    _, weights = read_weights(write_shards(tmp_path / "model"))
    assert_same_bytes(weights, {key: np.full(2, ord(key), np.float32) for key in "ab"})


def test_large_weights_are_written_in_shards(tmp_path: Path):
    """Names and index are those of transformers; no array is split or missing, and the export can be imported."""
    run = write_run(tiny_run_config(lm_config("a*3", a=MAMBA2)), tmp_path / "run")
    export_run(run, "safetensors", tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    largest = 6_000
    assert export_run(run, "safetensors", tmp_path / "out", shard_gb=largest / 1e9) == "mamba2"
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) > 3 and names == [
        f"model-{n:05}-of-{len(names):05}.safetensors" for n in range(1, len(names) + 1)
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(x.nbytes for x in whole.values())}
    shards = {name: load_file(tmp_path / "out" / name) for name in names}
    assert index["weight_map"] == {key: name for name, shard in shards.items() for key in shard}
    sizes = [sum(x.nbytes for x in shard.values()) for shard in shards.values()]
    assert all(size <= largest or len(shard) == 1 for size, shard in zip(sizes, shards.values(), strict=True))
    assert sum(sizes) == index["metadata"]["total_size"] and all(sizes)
    assert_same_bytes(read_weights(tmp_path / "out")[1], whole)
    again = import_run(tmp_path / "out", load_config("mqar_micro"), tmp_path / "again")
    assert_same_bytes(read_run_weights(again).variables, read_run_weights(run).variables)


@pytest.mark.fault("S3", "S14")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../a.safetensors", r"names the shard '../a.safetensors'"),
        ("/etc/a.safetensors", "in the folder"),
        ("sub/a.safetensors", "in the folder"),
        ("..\\a.safetensors", "in the folder"),
        (".a.safetensors", "in the folder"),
        ("a.safetensors\n", "in the folder"),
        ("a\0.safetensors", "in the folder"),
        ("", "in the folder"),
        ("pytorch_model.bin", "pytorch_model.bin may contain pickled code"),
        (3, "no weight_map"),
        ("c.safetensors", "c.safetensors cannot be read: No such file"),
        ("b.safetensors", r"do not agree on \['a'\]"),
    ],
)
def test_invalid_shards_are_rejected(name: Any, message: str, tmp_path: Path):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=message):
        read_weights(write_shards(tmp_path / "model", a=name))


@pytest.mark.fault("S1")
@pytest.mark.parametrize("suffix", weights_folder.PICKLE_SUFFIXES)
def test_pickle_files_are_never_loaded(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pickle.load", None)
    monkeypatch.setattr("pickle.loads", None)
    path = tmp_path / f"pytorch_model{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    (tmp_path / "config.json").write_text("{}")
    for source in (path, tmp_path):
        with pytest.raises(WeightsError, match=f"pytorch_model{suffix} may contain pickled code and is never read"):
            read_weights(source)


def test_folders_without_weights_are_rejected(tmp_path: Path):
    with pytest.raises(WeightsError, match="is not a folder"):
        read_weights(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"config.json cannot be read: No such file"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text("{]")
    with pytest.raises(WeightsError, match=r"config.json is malformed: it is not JSON"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"has no \*.safetensors"):
        read_weights(tmp_path)
    for key in "ab":
        save_file({key: np.zeros(1, np.float32)}, tmp_path / f"{key}.safetensors")
    with pytest.raises(WeightsError, match="has 2 safetensors files and no"):
        read_weights(tmp_path)


# The command line


def test_export_and_import_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    write_run(tiny_run_config(lm_config("a", a=MAMBA2)), tmp_path / "run")
    assert main(["export", "run", "--to", "safetensors"]) == 0
    assert main(["import", "run/export-safetensors", "--run", "again", "--config", "mqar_micro"]) == 0
    assert main(["export", "again", "--to", "orbax", "--out", "orbax"]) == 0
    assert main(["import", "orbax"]) == 0
    out = capsys.readouterr().out
    assert "layout: mamba2" in out and "run: runs/imported_recallax-" in out
    os.remove("orbax/parameters/_METADATA")
    for arguments, message in {
        "export run --to orbax --layout llama": "--layout llama is not supported by orbax",
        "export run --to safetensors --layout lama --out x": "did you mean 'llama'",
        "export run --to safetensors --shard-gb 0 --out x": "--shard-gb is 0 with safetensors; it needs",
        "export run --to safetensors --shard-gb nan --out x": "--shard-gb is nan with safetensors",
        "export run --to safetensors --shard-gb inf --out x": "--shard-gb is inf with safetensors",
        "export run --to orbax --shard-gb 1 --out x": "--shard-gb is 1 with orbax",
        "export run --to stablehlo --dtype bfloat16 --out x": "--dtype and --shard-gb are options of weights",
        "export run --to safetensors": "already exists",
        "export nowhere --to safetensors": "nowhere is not a run folder",
        "export run --to onnx": "onnx",
        "import nowhere": "nowhere is not a folder",
        "import orbax --run broken": "is not a valid orbax checkpoint",
        "import run/export-safetensors --config mqar_mikro": "did you mean 'mqar_micro'",
        "import run/export-safetensors --config mqar_based": "vocab_size",
    }.items():
        try:
            status = main(arguments.split())
        except SystemExit as stop:
            status = stop.code
        err = capsys.readouterr()
        assert status == 2 and message in err.err + err.out, (arguments, err)
    assert not {"x", "broken"} & set(os.listdir())


def test_missing_extra_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(WeightsError, match=r'pip install "recallax\[export\]"'):
        write_folder_atomic(tmp_path / "out", lambda folder: write_weights(folder, {}, {}))
    assert not list(tmp_path.iterdir())
