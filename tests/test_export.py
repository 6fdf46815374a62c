"""Checkpoints out and in: the same bytes again, equal programs, and files that lie."""

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
from recallax.train.checkpoint import Checkpoints
from recallax.train.loop import evaluate_run
from recallax.train.program import Program
from recallax.train.run_config import RunConfig, tiny_run
from recallax.train.run_folder import RunFolder, RunFolderError
from recallax.types import StepInfo, unpacked_seq_info
from tests.test_parity import FIRST_LAYERS, MODELS, first_layers, fixture

CHANGED = ("layernorm.weight", "model.norm.weight")
"""Of Qwen3-Next: they are kept as 1 + weight, so an import rounds them."""
IGNORED_FIELDS = {
    "chunk_size", "num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "rope_parameters",
    "mlp_only_layers", "fuse_cross_entropy",
}  # fmt: skip
"""Fields that change no number, or that belong to the attention layers that are cut off."""


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """These tests compile far longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def published(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    config, weights, _ = first_layers(name, 2) if name in FIRST_LAYERS else fixture(name)
    return config, weights


def same_bytes(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], but: tuple[str, ...] = ()) -> None:
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert ours[key].dtype == array.dtype and ours[key].shape == array.shape, key
        assert (ours[key].tobytes() == array.tobytes()) != key.endswith(but or "\0"), key


# The layouts of transformers


@pytest.mark.parametrize("name", (*MODELS, *FIRST_LAYERS))
def test_import_export_round_trip(name: str):
    """The config from our model alone, and the weights from our parameters, byte for byte."""
    config, weights = published(name)
    ours = import_config(config)
    # transformers itself refuses an Olmo-Hybrid whose attention layers are cut off; a BASED of ours has no dead buffer
    written = config if name in ("olmo_hybrid", "based") else export_config(layout_of(config), ours)
    assert import_config(written) == ours
    assert {key for key in config if written.get(key) != config[key]} <= IGNORED_FIELDS
    parameters = import_parameters(config, weights)
    again = export_weights(written, parameters)
    changed = CHANGED if name == "qwen3_next" else ()
    same_bytes(again, weights, changed)
    for key in weights:
        np.testing.assert_allclose(again[key], weights[key], rtol=0, atol=2**-23 * bool(changed))
    twice = import_parameters(written, again)
    for key, array in parameters.items():
        np.testing.assert_array_equal(twice[key], array)
    same_bytes(export_weights(written, twice), again)


def test_half_precision_survives_the_one_in_a_norm():
    """bfloat16 weights, as they are published, are not rounded by 1 + weight in float32."""
    config, weights = published("qwen3_next")
    weights = {key: x.astype(ml_dtypes.bfloat16).astype(np.float32) for key, x in weights.items()}
    same_bytes(export_weights(config, import_parameters(config, weights)), weights)


def test_the_page_of_export_lists_every_layout():
    page = (Path(__file__).parent.parent / "docs" / "commands" / "export.md").read_text()
    assert [name for name in LAYOUTS if f"`{name}`" not in page] == []


def lm(pattern: str, **blocks: Block) -> LMConfig:
    return LMConfig(d_model=16, pattern=pattern, blocks=blocks)


MAMBA2 = Block(mixer=Mamba2(head_dim=8, state_dim=4), channel=NoChannelMixer())
ATTENTION, WINDOW = Block(mixer=Attention()), Block(mixer=SlidingWindow())
UNREPRESENTABLE = {
    "channel would be ZeroMixer": ("mamba2", lm("a*2", a=Block(mixer=MAMBA2.mixer))),
    "soft_cap would be None": ("mamba2", replace(lm("a", a=MAMBA2), soft_cap=3.0)),
    "eps would be 0.001": ("mamba2", replace(lm("a", a=MAMBA2), norm_eps=1e-3)),
    "24 is not a multiple of d_model 16": (
        "mamba2",
        lm("a", a=replace(MAMBA2, mixer=Mamba2(head_dim=8, intermediate_size=24))),
    ),
    "layer 0 has the mixer MemoryMixer": ("llama", lm("a", a=MAMBA2)),
    "layers.1.mixer.window would be None, and is 64": ("llama", lm("a b", a=ATTENTION, b=WINDOW)),
    "no positions": ("llama", lm("a", a=Block(mixer=Attention(rope_theta=None)))),
    "none can be exported": ("falcon_h1", lm("a", a=MAMBA2)),
    "olmo_hybrid: .*none can be exported": ("olmo_hybrid", lm("a", a=Block(mixer=GatedDeltaNet()))),
    # it divides queries by the root of their width, before a norm with one eps
    "layers.0.mixer.readout.norm_eps would be 4e-05, and is 1e-05": ("hgrn2", lm("a", a=Block(mixer=HGRN2()))),
    "layers.0.mixer.readout.gate.up.bias would be .16,., and is None": ("kda", lm("a", a=Block(mixer=KDA()))),
    "no short convolution": ("delta_net", lm("a", a=Block(mixer=DeltaNet(conv_size=0)))),
    "norms have eps 0.001, and this layout supports only 1e-05": (
        "state-spaces",
        replace(lm("a", a=MAMBA2), norm_eps=1e-3),
    ),
    "layer 0 has the mixer SoftmaxAttentionMixer": ("based", lm("a", a=ATTENTION)),
    "did you mean 'llama'": ("lama", lm("a", a=ATTENTION)),
}


@pytest.mark.parametrize("message", UNREPRESENTABLE)
def test_a_layout_refuses_what_it_cannot_say(message: str):
    with pytest.raises(ConfigError, match=message):
        export_config(*UNREPRESENTABLE[message], 32)


def test_a_second_copy_of_a_tied_readout_is_no_key_too_many():
    config, weights = published("mamba")
    embedding = weights["backbone.embeddings.weight"]
    copied = weights | {"lm_head.weight": embedding.copy()}
    same_bytes(export_weights(config, import_parameters(config, copied)), weights)
    with pytest.raises(WeightsError, match=r"lm_head.weight differs from backbone.embeddings.weight"):
        import_parameters(config, weights | {"lm_head.weight": embedding + 1})


# The key names of others


def test_hgrn2_lower_bounds_are_reconstructed(tmp_path: Path):
    """HGRN2's floors are one parameter of the model there; here every layer keeps its own beside it."""
    config, weights = published("fla_hgrn2")
    rows = {key: np.concatenate([weights[key]] * 2) for key in ("model.embeddings.weight", "lm_head.weight")}
    (tmp_path / "theirs").mkdir()
    write_weights(tmp_path / "theirs", config | {"vocab_size": 64}, weights | rows)
    run = import_run(tmp_path / "theirs", load_config("mqar_micro"), tmp_path / "run")
    logits = weights["model.lower_bounds"]
    shares = np.exp(logits) / np.exp(logits).sum(axis=0)
    kept = read_run_weights(run).variables
    np.testing.assert_array_equal(kept["layers.0.mixer.cell.floor"], 0)
    np.testing.assert_allclose(kept["layers.1.mixer.cell.floor"], shares[1], rtol=1e-6)
    assert export_run(run, "safetensors", tmp_path / "out") == "hgrn2"
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


def test_the_width_of_flas_perceptron_may_be_a_ratio():
    for name, inner in {"fla_gated_deltanet": 2816, "fla_retnet": 1536}.items():
        config, _ = published(name)
        config = config | {"hidden_size": 1000, "intermediate_size": None}
        # int(1000 * 4 * 2 / 3) up to a multiple of 256; RetNet's ratio is 2
        assert import_config(config).blocks["layer"].channel == SwiGLU(intermediate_size=inner)


STATE_SPACES = {"n_layer": 2, "d_model": 16, "vocab_size": 27, "pad_vocab_size_multiple": 8, "rms_norm": True}
STATE_SPACES |= {"residual_in_fp32": True, "fused_add_norm": True}


def as_state_spaces(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A fixture of transformers as state-spaces keeps it: tied, and the readout beside the embedding."""
    theirs, weights = published(name)
    given = {key.replace("embeddings", "embedding"): x for key, x in weights.items()}
    given["lm_head.weight"] = given["backbone.embedding.weight"]
    ssm = {"d_state": theirs["state_size"], "expand": theirs["expand"]}
    if name == "mamba":
        ssm["dt_rank"] = theirs["time_step_rank"]
    else:
        ssm |= {"layer": "Mamba2", "headdim": 8, "ngroups": theirs["n_groups"]}
    return STATE_SPACES | {"ssm_cfg": ssm}, given


@pytest.mark.parametrize("name", ["mamba", "mamba2_groups"])
def test_state_spaces_names_are_read_and_written(name: str):
    config, weights = as_state_spaces(name)
    theirs, _ = published(name)
    assert layout_of(config) == "state-spaces" and layout_of(theirs) == theirs["model_type"]
    ours = import_config(config)
    assert ours == import_config(theirs | {"tie_word_embeddings": True})
    parameters = import_parameters(config, weights)
    written = export_config("state-spaces", ours)
    # the names of mamba_ssm's dataclass, which takes no others
    assert written.keys() == STATE_SPACES.keys() | {"ssm_cfg", "tie_embeddings"}
    assert import_config(written) == ours and layout_of(written) == "state-spaces"
    for said in (config, written):
        same_bytes(export_weights(said, parameters), weights)
    named = {key.replace("embedding.", "embeddings."): x for key, x in weights.items() if key != "lm_head.weight"}
    same_bytes(parameters, import_parameters(theirs | {"tie_word_embeddings": True}, named))


def test_a_checkpoint_of_state_spaces_becomes_a_run(tmp_path: Path):
    """Padded in its vocabulary, with and without the copy of its readout, and back byte for byte."""
    config, weights = as_state_spaces("mamba2_groups")
    embedding = np.random.default_rng(0).normal(size=(64, 16)).astype(ml_dtypes.bfloat16)
    config |= {"vocab_size": 60}
    one = {key: x for key, x in weights.items() if key != "lm_head.weight"} | {"backbone.embedding.weight": embedding}
    for name, given in {"one": one, "both": one | {"lm_head.weight": embedding}}.items():
        (tmp_path / name).mkdir()
        write_weights(tmp_path / name, config, given)
        run = import_run(tmp_path / name, load_config("mqar_micro"), tmp_path / f"run_{name}")
        assert export_run(run, "safetensors", tmp_path / f"out_{name}") == "state-spaces"
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / f"out_{name}" / file).read_bytes() == (tmp_path / name / file).read_bytes()
    assert export_run(run, "safetensors", tmp_path / "transformers", layout="mamba2") == "mamba2"
    found = load_file(tmp_path / "transformers" / "model.safetensors")
    wanted = {key.replace("embedding.", "embeddings."): x.astype(np.float32) for key, x in one.items()}
    same_bytes(found, wanted)


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
def test_the_published_based_is_written_as_its_authors_have_it(size: Callable[[], LMConfig]):
    """Layer lists, widths and windows of the released configs (`reference/based-360m.yaml` and `based-1b.yaml`)."""
    written = export_config("based", size())
    layers = len(written["alt_mixer_layers"])
    assert (written["n_layer"], layers) == {1024: (27, 5), 1792: (36, 7)}[written["n_embd"]]
    assert written["alt_mixer_layers"] == [1, 6, 11, 16, 21, 27, 33][:layers]
    assert written["alt_mixer_2_layers"] == [2, 7, 12, 17, 22, 28, 34][:layers]
    assert written["n_inner"] == 2 * written["n_embd"] and written["vocab_size"] == 50_264
    wanted = {
        "mixer": {"_target_": "based.models.mixers.convolution.BaseConv", "expand_proj": 4, "use_bias": True},
        "alt_mixer": {"_target_": "based.models.mixers.linear_attention.LinearAttention", "feature_dim": 16},
        "alt_mixer_2": {"_target_": "based.models.mixers.slide_attention.SlidingAttention", "window_size": 256},
    }
    for tag, said in wanted.items():
        assert said.items() <= written[tag].items()
    assert written["alt_mixer"]["num_heads"] == written["n_head"] == 16 and layout_of(written) == "based"
    assert import_config(written).layer_names == size().layer_names


BASED_REFUSED = {
    "n_positions is 1024": {"n_positions": 1024},
    "qkv_proj_bias is True": {"qkv_proj_bias": None},
    "mixer is missing, which means full attention": {"mixer": None},
    "_target_ is 'based.models.Hedgehog'": {"mixer": {"_target_": "based.models.Hedgehog"}},
    "rotary_emb_fraction is 0.5": {"rotary_emb_fraction": 0.5},
    "use_cuda is True": {"mixer": {"_target_": "based.models.mixers.convolution.BaseConv", "use_cuda": True}},
    "expand_proj is 3": {"mixer": {"_target_": "based.models.mixers.convolution.BaseConv", "expand_proj": 3}},
}  # fmt: skip


@pytest.mark.parametrize("message", BASED_REFUSED)
def test_unsupported_based_configs_are_rejected(message: str):
    config, _ = published("based")
    changes = BASED_REFUSED[message]
    changed = {key: value for key, value in (config | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        import_config(changed)


def test_the_second_mixer_comes_before_the_first():
    """Of a layer that both lists name."""
    config, _ = published("based")
    assert import_config(config).layer_names == ["conv", "based", "window"]
    assert import_config(config | {"alt_mixer_2_layers": [1]}).layer_names == ["conv", "window", "conv"]


def test_every_class_of_the_gated_convolution_is_read():
    """An older one lists its taps and calls them otherwise."""
    config, weights = published("based")
    silu4 = {"_target_": "based.models.mixers.base_conv.BaseConvWithSiLU4", "kernel_sizes": [3], "expand_proj": 4}
    given = {key.replace("mixer.conv.conv", "mixer.conv1.conv"): x for key, x in weights.items()}
    assert given.keys() != weights.keys()
    parameters = import_parameters(config | {"mixer": silu4}, given)
    same_bytes(parameters, import_parameters(config, weights))


# Runs


def run_of(model: LMConfig) -> RunConfig:
    return tiny_run(load_config("mqar_micro"), model=model)


def saved(config: RunConfig, folder: Path) -> Path:
    """A run at step 0 with random variables, statistics included, made without a step of training."""
    program = Program(config)
    rng = np.random.default_rng(0)

    def draw(like: dict) -> dict:
        return jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype(x.dtype), like)

    state = program.init_state_from(draw(program.abstract_state.params), draw(program.abstract_state.statistics))
    with RunFolder(folder, config) as run, Checkpoints(run.checkpoints) as checkpoints:
        checkpoints.save(0, state, {"config": to_json(config)})
    return folder


HYBRID = replace(
    lm(
        "based (mom hgrn)*2",
        based=Block(mixer=Based(feature_dim=4, num_heads=2)),
        mom=Block(mixer=MoM(memory=GatedDeltaNet(num_heads=2), num_memories=3, top_k=2)),
        hgrn=Block(mixer=HGRN2()),
    ),
    lm_head=Untied(),
)
"""Layers that no published layout has, among them repeated ones and statistics."""


def test_a_run_without_a_published_layout_goes_out_and_in(tmp_path: Path):
    """In our own layout, safetensors and orbax, there and back."""
    run = saved(run_of(HYBRID), tmp_path / "run")
    assert export_run(run, "safetensors", tmp_path / "out") == "recallax"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {"embedding", "layers.0.mixer.readout.out.kernel", "layers.4.mixer.query.parts.q.kernel"} <= weights.keys()
    assert not any("stack" in key for key in weights) and any(key.endswith("cell.floor") for key in weights)
    same_bytes(read_run_weights(run).variables, weights)

    again = import_run(tmp_path / "out", load_config("mqar_micro"), tmp_path / "again")
    assert not (again / "log.jsonl").exists() and read_run_weights(again).config == read_run_weights(run).config
    assert export_run(again, "safetensors", tmp_path / "twice") == "recallax"
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()

    assert export_run(again, "orbax", tmp_path / "orbax") == "recallax"
    third = import_run(tmp_path / "orbax", load_config("mqar_micro"), tmp_path / "third")
    same_bytes(read_run_weights(third).variables, weights)


def test_how_layers_are_stacked_changes_no_byte(tmp_path: Path):
    """A run spelled with repeats and one spelled layer by layer export the same, and either reads the other's."""
    model = lm("(a b*2)*2", a=ATTENTION, b=WINDOW)
    flat = replace(model, pattern=" ".join(model.layer_names))
    run = saved(run_of(model), tmp_path / "stacked")
    export_run(run, "safetensors", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["run"] = to_json(run_of(flat))
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    unstacked = import_run(tmp_path / "out", load_config("mqar_micro"), tmp_path / "unstacked")
    assert read_run_weights(unstacked).config.model.pattern == flat.pattern
    same_bytes(read_run_weights(unstacked).variables, read_run_weights(run).variables)
    assert evaluate_run(unstacked, "valid", 1)["loss"] == pytest.approx(evaluate_run(run, "valid", 1)["loss"], rel=1e-6)


@pytest.mark.parametrize("name", ["mamba2_groups", "llama"])
def test_a_published_model_becomes_a_run_and_comes_out_the_same(name: str, tmp_path: Path):
    """Files of bfloat16 and float32 side by side, and fields that are not ours, come back to the byte."""
    config, weights = published(name)
    config = config | {"vocab_size": 64, "of_no_concern": [1, {"a": None}]}
    weights = {key: np.concatenate([x] * 2) if x.shape[0] == 32 and x.ndim == 2 and "layers" not in key else x
               for key, x in weights.items()}  # fmt: skip
    weights = {key: x if x.ndim == 1 else x.astype(ml_dtypes.bfloat16) for key, x in weights.items()}
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    write_weights(theirs, config, weights)
    run = import_run(theirs, load_config("mqar_micro"), tmp_path / "run")
    assert export_run(run, "safetensors", tmp_path / "out") == config["model_type"]
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (theirs / file).read_bytes()
    assert 0 <= evaluate_run(run, "valid", 1)["accuracy"] <= 1

    assert export_run(run, "safetensors", tmp_path / "half", dtype="float16") == config["model_type"]
    assert {x.dtype.name for x in load_file(tmp_path / "half" / "model.safetensors").values()} == {"float16"}
    assert export_run(run, "safetensors", tmp_path / "own", layout="recallax") == "recallax"
    same_bytes(load_file(tmp_path / "own" / "model.safetensors"), read_run_weights(run).variables)


def test_a_run_of_a_published_kind_finds_its_layout(tmp_path: Path):
    """Never imported: the config is written from the model alone, and the weights give the same model there."""
    run = saved(run_of(lm("a*2", a=MAMBA2)), tmp_path / "run")
    assert export_run(run, "safetensors", tmp_path / "out") == "mamba2"
    config, weights = read_weights(tmp_path / "out")
    assert config["architectures"] == ["Mamba2ForCausalLM"] and config["vocab_size"] == 64
    with pytest.raises(ConfigError, match="cannot be exported as llama"):
        export_run(run, "safetensors", tmp_path / "no", layout="llama")
    model = import_model(config, weights, "mamba mamba")
    assert nnx.state(model, nnx.Param)["stack"]["parts"][1]["mixer"]["cell"]["d"].shape == (4,)
    same_bytes(import_parameters(config, weights), read_run_weights(run).variables)


def test_a_based_of_ours_is_written_and_read(tmp_path: Path):
    """Never imported, with what the fixture has not: untied, grouped keys, no positions, another epsilon."""
    wide = SwiGLU(intermediate_size=256)
    blocks = {
        "a": Block(mixer=GatedConv(conv_size=4, expand=1), channel=wide),
        "b": Block(mixer=Based(feature_dim=4, num_heads=4), channel=wide),
        "c": Block(mixer=SlidingWindow(window=5, num_heads=4, num_kv_heads=2, rope_theta=None), channel=wide),
    }
    model = replace(lm("(b c a)*2", **blocks), lm_head=Untied(), norm_eps=1e-4)
    run = saved(run_of(model), tmp_path / "run")
    assert export_run(run, "safetensors", tmp_path / "out") == "based"
    config, weights = read_weights(tmp_path / "out")
    assert weights["transformer.layers.1.mixer.Wqkv.weight"].shape == (32, 16) and "lm_head.weight" in weights
    same_bytes(import_parameters(config, weights), read_run_weights(run).variables)


def test_failed_export_writes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = saved(run_of(lm("a", a=MAMBA2)), tmp_path / "run")

    def broken(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(weights_folder, "write_safetensors", broken)
    with pytest.raises(WeightsError, match="out cannot be written: the disk is full"):
        export_run(run, "safetensors", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    monkeypatch.undo()
    with pytest.raises(WeightsError, match=r"out cannot be written: .*I/O error"):  # of the library itself
        write_folder_atomic(tmp_path / "out", lambda folder: write_safetensors(folder / "none" / "a.safetensors", {}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    export_run(run, "safetensors", tmp_path / "out")
    with pytest.raises(WeightsError, match="already exists"):
        export_run(run, "safetensors", tmp_path / "out")
    with pytest.raises(RunFolderError, match=r"has checkpoints of the steps \[0\]"):
        export_run(run, "safetensors", tmp_path / "own", layout="recallax")
        import_run(tmp_path / "own", load_config("mqar_micro"), run)


def test_a_config_of_sizes_without_weights_is_refused_at_once(tmp_path: Path):
    """Nothing of the claimed size is made: either would take all memory."""
    config, weights = published("llama")
    with pytest.raises(WeightsError, match="would need 32000000000000 numbers"):
        import_parameters(config | {"hidden_size": 10**12, "head_dim": 8}, weights)
    for name, field in {"based": "n_inner", "fla_mamba2": "state_size", "qwen3_next": "linear_value_head_dim"}.items():
        claims, few = published(name)
        with pytest.raises(WeightsError, match="would need"):
            import_parameters(claims | {field: 2**50}, few)
    (tmp_path / "theirs").mkdir()
    write_weights(tmp_path / "theirs", config | {"num_hidden_layers": 10**9}, weights)
    with pytest.raises(WeightsError, match="num_hidden_layers 1000000000, but there are only 21 arrays"):
        import_run(tmp_path / "theirs", load_config("mqar_micro"), tmp_path / "run")
    (tmp_path / "based").mkdir()
    config, weights = published("based")
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
def test_a_config_that_lies_is_refused_by_name(message: str):
    """And not by an error of arithmetic, as a config.json from anywhere may hold any value."""
    name, changes = INCONSISTENT_CONFIGS[message]
    config, weights = as_state_spaces("mamba2_groups") if name == "state_spaces" else published(name)
    with pytest.raises(ConfigError, match=message):
        import_parameters(config | changes, weights)


INVALID_NATIVE_FILES: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "lack 'layers.0.mixer.cell.d'": lambda w: w.pop("layers.0.mixer.cell.d"),
    "no parameter for 'layers.9.q'": lambda w: w.update({"layers.9.q": np.zeros(2, np.float32)}),
    r"norm.scale has shape \(3,\); it must be \(16,\)": lambda w: w.update({"norm.scale": np.zeros(3, np.float32)}),
}


@pytest.mark.parametrize("message", INVALID_NATIVE_FILES)
def test_our_own_layout_is_strict(message: str, tmp_path: Path):
    run = saved(run_of(lm("a", a=MAMBA2)), tmp_path / "run")
    export_run(run, "safetensors", tmp_path / "out", layout="recallax")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    INVALID_NATIVE_FILES[message](weights)
    save_file(weights, tmp_path / "out" / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        import_run(tmp_path / "out", load_config("mqar_micro"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


# Compiled programs


def trained_model(run: Path) -> Any:
    """The model of a run as it is trained."""
    _, graph, _, params, statistics = read_run_state(run)
    return nnx.merge(graph, params, statistics)


LENGTH, CONTEXT = 6, 20


@pytest.mark.usefixtures("unchecked")
def test_programs_compute_what_the_model_computes(tmp_path: Path):
    """Two calls of prefill, the second shorter in some rows, then steps in which a row waits; any number of rows."""
    decoder = lm("a*2 b", a=MAMBA2, b=Block(mixer=SlidingWindow(window=5)))
    run = saved(run_of(decoder), tmp_path / "run")
    export_programs(run, tmp_path / "out", prefill_length=LENGTH, max_len=CONTEXT)
    programs, model = load_programs(tmp_path / "out"), trained_model(run)
    prefill, step = jax.jit(model.prefill), jax.jit(model.step)
    tokens = np.random.default_rng(1).integers(64, size=(3, 2 * LENGTH)).astype(np.int32)
    first, second = tokens[:, :LENGTH], tokens[:, LENGTH:]
    lengths = np.array([4, 6, 1], np.int32)
    full, zero, places = np.full(3, LENGTH, np.int32), np.zeros(3, np.int32), np.arange(LENGTH)[None]

    dirty = {name: np.ones_like(x) for name, x in programs.init_state(3).items()}  # position 0 starts afresh
    logits, state = programs.prefill(programs.weights, first, full, zero, dirty)
    seq = jax.tree.map(jnp.asarray, unpacked_seq_info(3, LENGTH))
    expected, wanted, _ = prefill(jnp.asarray(first), seq, model.init_state(3, CONTEXT))
    close(logits, expected[:, -1])
    one, _ = programs.prefill(programs.weights, first[:1], full[:1], zero[:1], programs.init_state(1))
    close(one, logits[:1])

    logits, state = programs.prefill(programs.weights, second, lengths, full, state)
    segments = jnp.asarray((places < lengths[:, None]).astype(np.int32))
    seq = seq._replace(positions=seq.positions + LENGTH, segment_ids=segments)
    expected, wanted, _ = prefill(jnp.asarray(second), seq, wanted)
    close(logits, expected[np.arange(3), lengths - 1])

    position, active = LENGTH + lengths, np.array([True, False, True])
    for token in (3, 5):
        given = np.full(3, token, np.int32)
        logits, state = programs.step(programs.weights, given, position, active, state)
        info = StepInfo(jnp.asarray(position), jnp.asarray(active))
        expected, wanted = step(jnp.asarray(given), info, wanted)
        close(logits[active], expected[active])
        position = position + active
    names = programs.metadata["state"]  # `jax.export` returns a dictionary in alphabetical order
    for name, leaf in zip(names, jax.tree.leaves(wanted), strict=True):
        close(state[name], leaf)


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_programs_are_for_every_platform_and_hold_no_weights(tmp_path: Path):
    run = saved(run_of(lm("a", a=replace(MAMBA2, mixer=Mamba2(head_dim=8, state_dim=512)))), tmp_path / "run")
    export_programs(run, tmp_path / "out", prefill_length=LENGTH, max_len=CONTEXT)
    for name in ("prefill", "step"):
        program = jax.export.deserialize(bytearray((tmp_path / "out" / f"{name}.jax").read_bytes()))
        assert program.platforms == PLATFORMS == ("cpu", "cuda", "tpu")
        assert "stablehlo.custom_call @tpu" not in program.mlir_module() and "mosaic" not in program.mlir_module()
        assert (tmp_path / "out" / f"{name}.stablehlo").stat().st_size < 60_000
    assert (tmp_path / "out" / "weights.safetensors").stat().st_size > 90_000


def test_models_without_decoding_are_not_exported(tmp_path: Path):
    run = saved(run_of(replace(lm("a", a=MAMBA2), lm_head=Autoencoder())), tmp_path / "run")
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
def test_every_config_becomes_programs_for_any_number_of_rows(name: str, tmp_path: Path):
    config = importlib.import_module(f"recallax.configs.{name}").get_tiny()
    if isinstance(config.model.lm_head, Autoencoder):
        return
    export_programs(saved(config, tmp_path / "run"), tmp_path / "out", prefill_length=LENGTH, max_len=CONTEXT)
    programs = load_programs(tmp_path / "out")
    for rows in (1, 2):
        row = np.ones(rows, np.int32)
        logits, state = programs.prefill(programs.weights, np.zeros((rows, LENGTH), np.int32), 3 * row, 0 * row,
                                         programs.init_state(rows))  # fmt: skip
        again, _ = programs.step(programs.weights, row, 3 * row, row > 0, state)
        assert logits.shape == again.shape and np.isfinite(logits).all() and np.isfinite(again).all()


# Files that lie


def header_of(entries: Any, size: int = 8) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def entry(first: int, last: int, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


DUPLICATE_KEY = (
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
)
HOSTILE = {
    "it has 0 bytes and states": b"",
    "it has 7 bytes and states": bytes(7),
    "states a header of 9 bytes": struct.pack("<Q", 9) + b"{}",
    "states a header of 18446744073709551615": b"\xff" * 8 + b"{}",
    "header of 100000001": struct.pack("<Q", 100_000_001) + b"{}",
    "it is not JSON": header_of(b"{", 0),
    "not JSON: Expecting value": header_of(b"\x80\x04\x95.".replace(b"\x80", b"c").replace(b"\x95", b"o")),
    "utf-8": header_of(b'{"\xff": 1}'),
    "nested too deep": header_of(b"[" * 100_000),
    "is not an object": header_of(b"[]", 0),
    "'a' is repeated": header_of(DUPLICATE_KEY),
    "'dtype' is repeated": header_of(b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}'),
    "end at byte 4 of 8": header_of({"a": entry(0, 4)}),
    "'b' starts at byte 0 instead of 4, which overlaps": header_of({"a": entry(0, 4), "b": entry(0, 8, (2,))}),
    "'b' starts at byte 2 instead of 4, which overlaps": header_of({"a": entry(0, 4), "b": entry(2, 6)}),
    "'a' starts at byte 4 instead of 0, which leaves a gap": header_of({"a": entry(4, 8)}),
    "end at byte 16 of 8": header_of({"a": entry(0, 16, (4,))}),
    "not the number of bytes of F32": header_of({"a": entry(0, 8)}),
    r"the offsets \[8, 4\], which": header_of({"a": entry(8, 4)}),
    r"the offsets \[-4, 4\]; both must be lists of sizes": header_of({"a": entry(-4, 4, (2,))}),
    r"the shape \[-1, -2\]": header_of({"a": entry(0, 8, (-1, -2))}),
    r"the shape \[true, 2\]|the shape \[True, 2\]": header_of({"a": entry(0, 8, (True, 2))}),
    r"the shape \[2.0\]": header_of({"a": entry(0, 8, (2.0,))}),
    "has 17 axes": header_of({"a": entry(0, 8, (1,) * 16 + (2,))}),
    "which are not the number of bytes of F32 .4611686018427387904": header_of({"a": entry(0, 8, (2**62, 4))}),
    r"the axes \[0, 4611686018427387904\], larger than any": header_of({"a": entry(0, 0, (0, 2**62))}, 0),
    "has dtype 'I64'": header_of({"a": entry(0, 8, dtype="I64")}),
    r"has dtype \['F32'\]": header_of({"a": entry(0, 8, dtype=["F32"])}),
    "exactly the fields dtype, shape and data_offsets": header_of({"a": entry(0, 8) | {"code": "import os"}}),
    "'a' does not have exactly the fields": header_of({"a": None}),
    "__metadata__ does not map names to text": header_of({"__metadata__": {"format": 1}, "a": entry(0, 8, (2,))}),
}


@pytest.mark.parametrize("message", HOSTILE)
def test_a_header_that_lies_is_refused(message: str, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[message])
    with pytest.raises(WeightsError, match=message) as error:
        read_safetensors(path)
    assert str(path) in str(error.value)


def test_safetensors_library_files_are_read(tmp_path: Path):
    """All dtypes, scalars, empty arrays, and tensors that begin at odd places."""
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
    same_bytes(read_safetensors(tmp_path / "model.safetensors"), arrays)
    write_safetensors(tmp_path / "ours.safetensors", arrays | {"f": arrays["d"].T})
    same_bytes(load_file(tmp_path / "ours.safetensors"), arrays | {"f": arrays["d"].T})
    save_file({}, tmp_path / "empty.safetensors")
    assert read_safetensors(tmp_path / "empty.safetensors") == {}


def sharded(folder: Path, **names: Any) -> Path:
    """A model in two shards; `names` are what the index says of its keys `a` and `b`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for key in "ab":
        save_file({key: np.full(2, ord(key), np.float32)}, folder / f"{key}.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"} | names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_read(tmp_path: Path):
    _, weights = read_weights(sharded(tmp_path / "model"))
    same_bytes(weights, {key: np.full(2, ord(key), np.float32) for key in "ab"})


def test_weights_larger_than_a_file_are_written_in_shards(tmp_path: Path):
    """Their names and index as transformers writes them; no array is cut, none is lost, and a run comes back."""
    run = saved(run_of(lm("a*3", a=MAMBA2)), tmp_path / "run")
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
    same_bytes(read_weights(tmp_path / "out")[1], whole)
    again = import_run(tmp_path / "out", load_config("mqar_micro"), tmp_path / "again")
    same_bytes(read_run_weights(again).variables, read_run_weights(run).variables)


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
def test_a_shard_that_is_not_in_the_folder_is_refused(name: Any, message: str, tmp_path: Path):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=message):
        read_weights(sharded(tmp_path / "model", a=name))


@pytest.mark.parametrize("suffix", weights_folder.PICKLE_SUFFIXES)
def test_nothing_is_unpickled(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pickle.load", None)
    monkeypatch.setattr("pickle.loads", None)
    path = tmp_path / f"pytorch_model{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    (tmp_path / "config.json").write_text("{}")
    for source in (path, tmp_path):
        with pytest.raises(WeightsError, match=f"pytorch_model{suffix} may contain pickled code and is never read"):
            read_weights(source)


def test_folders_without_weights_are_named(tmp_path: Path):
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


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    saved(run_of(lm("a", a=MAMBA2)), tmp_path / "run")
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


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(WeightsError, match=r'pip install "recallax\[export\]"'):
        write_folder_atomic(tmp_path / "out", lambda folder: write_weights(folder, {}, {}))
    assert not list(tmp_path.iterdir())
