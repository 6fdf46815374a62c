"""Parity: with equal weights, recallax computes the same outputs as other implementations (`tests/parity`)."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recallax.config import ConfigError
from recallax.convert import LAYOUTS, WeightsError, import_config, import_model, layout_of
from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import KeyMapEntry, apply_key_map
from recallax.convert.layouts import falcon_h1_layout
from recallax.layers import Attention, Identity, LayerInfo, MixerConfig, RecurrentMixer, SwiGLU
from recallax.models import LM, Block, LMConfig
from recallax.models.block import BlockModule
from recallax.models.parameter_paths import fill_parameters, layer_paths, parameter_paths, parameter_shapes
from recallax.models.pattern import compress_pattern, parse_pattern
from recallax.types import Precision, SeqInfo, StepInfo, unpacked_seq_info

pytestmark = pytest.mark.usefixtures("strict")

FOLDER = Path(__file__).parent / "parity" / "fixtures"
TOLERANCE = 1e-5
"""Largest difference of float32 logits and outputs, relative to the largest value."""

FLA = (
    "fla_delta_net", "fla_gated_deltanet", "fla_gated_deltaproduct", "fla_gla", "fla_gla_conv", "fla_hgrn2", "fla_kda",
    "fla_kda_bounded", "fla_linear_attn", "fla_mamba2", "fla_retnet",
)  # fmt: skip
"""Models of flash-linear-attention."""
TRANSFORMERS = ("kimi_linear", "llama", "mamba", "mamba2", "mamba2_dt_limit", "mamba2_groups", "mistral", "nemotron_h")
MODELS = ("based", *TRANSFORMERS, *FLA)
"""Models whose logits are compared."""
FIRST_LAYERS = ("olmo_hybrid", "qwen3_next")
"""Models that are compared up to the first attention layer, which recallax cannot represent."""
MIXERS = ("falcon_h1", "falcon_h1_norm")
"""Models whose mixers are compared one by one."""
LAYOUTS_WITHOUT_FIXTURE = {"state-spaces"}
"""Layouts with the weights of another layout under other names, which `tests/test_export.py` tests."""


class Fixture(NamedTuple):
    """Contents of a file in `tests/parity/fixtures`."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]


@functools.cache
def fixture(name: str) -> Fixture:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file if key not in ("config", "about")}
        config = json.loads(str(file["config"]))
    weights = {key.removeprefix("weights/"): x for key, x in arrays.items() if key.startswith("weights/")}
    return Fixture(config, weights, {key: x for key, x in arrays.items() if not key.startswith("weights/")})


def first_layers(name: str, count: int) -> Fixture:
    """Return the first `count` layers of a fixture."""
    config, weights, arrays = fixture(name)
    config = config | {"num_hidden_layers": count, "layer_types": config["layer_types"][:count]}
    removed = tuple(f"model.layers.{layer}." for layer in range(count, 3))
    return Fixture(config, {key: x for key, x in weights.items() if not key.startswith(removed)}, arrays)


def relative_difference(actual: Any, expected: np.ndarray) -> float:
    actual = np.asarray(actual)
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def rows(batch: int, length: int) -> SeqInfo:
    return jax.tree.map(jnp.asarray, unpacked_seq_info(batch, length))


def steps(graph: nnx.GraphDef, weights: nnx.State, x: jax.Array, start: int, state: Any) -> jax.Array:
    """Return the outputs of one step per token [batch, time, ...]; the first token has position `start`."""

    def step(carry: tuple[jax.Array, Any], x: jax.Array) -> tuple[tuple[jax.Array, Any], jax.Array]:
        position, state = carry
        y, state = nnx.merge(graph, weights).step(x, StepInfo(position, jnp.ones(position.shape, bool)), state)
        return (position + 1, state), y

    first = jnp.full(x.shape[0], start, jnp.int32)
    return jnp.moveaxis(jax.lax.scan(step, (first, state), jnp.moveaxis(x, 1, 0))[1], 0, 1)


MODES = ("whole", "stepped", "continued")


def run_all_modes(module: LM | RecurrentMixer, x: np.ndarray, modes: tuple[str, ...]) -> dict[str, jax.Array]:
    """Return the outputs by mode: of one call, of steps, and of steps after a prefill of half of the tokens."""
    graph, weights = nnx.split(module)
    length, half = x.shape[1], x.shape[1] // 2
    seq = rows(x.shape[0], length)
    head = rows(x.shape[0], half)

    def whole(weights: nnx.State, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, weights)(x, seq)[0]

    def stepped(weights: nnx.State, x: jax.Array) -> jax.Array:
        module = nnx.merge(graph, weights)
        return steps(graph, weights, x, 0, module.init_state(x.shape[0], length))

    def continued(weights: nnx.State, x: jax.Array) -> jax.Array:
        module = nnx.merge(graph, weights)
        y, state, _ = module.prefill(x[:, :half], head, module.init_state(x.shape[0], length))
        return jnp.concatenate([y, steps(graph, weights, x[:, half:], half, state)], axis=1)

    functions: dict[str, Callable[[nnx.State, jax.Array], jax.Array]] = {
        f.__name__: f for f in (whole, stepped, continued)
    }
    return {mode: jax.jit(functions[mode])(weights, jnp.asarray(x)) for mode in modes}


def assert_module_matches(
    module: LM | RecurrentMixer, x: np.ndarray, expected: np.ndarray, modes: tuple[str, ...] = MODES
) -> None:
    errors = {mode: relative_difference(y, expected) for mode, y in run_all_modes(module, x, modes).items()}
    assert max(errors.values()) <= TOLERANCE, errors


def load_mixer(
    config: MixerConfig, d_model: int, entries: list[KeyMapEntry], target_prefix: str, weights: dict, source_prefix: str
) -> nnx.Module:
    """Build a mixer from the entries of a key map below `target_prefix`.

    The entries must use all weights below `source_prefix`.
    """
    module_entries = [entry for entry in entries if entry.target[0].startswith(target_prefix)]
    module_entries = [
        e._replace(target=tuple(name.removeprefix(target_prefix) for name in e.target)) for e in module_entries
    ]
    module = nnx.eval_shape(lambda: config.build(d_model, LayerInfo(1, 2), precision=Precision(), rngs=nnx.Rngs(0)))
    paths = parameter_paths(module)
    selected = {key: x for key, x in weights.items() if key.startswith(source_prefix)}
    return fill_parameters(module, paths, apply_key_map(module_entries, selected, parameter_shapes(module, paths)))


def test_every_fixture_is_tested():
    assert {path.stem for path in FOLDER.glob("*.npz")} == {*MODELS, *FIRST_LAYERS, *MIXERS}
    assert {layout_of(fixture(name).config) for name in (*MODELS, *FIRST_LAYERS, *MIXERS)} == set(
        LAYOUTS
    ) - LAYOUTS_WITHOUT_FIXTURE


STEPS_TESTED_ELSEWHERE = [name for name in FLA if name != "fla_hgrn2"]
"""Models whose steps are left to `make test-full`, because models of transformers or laws test the same steps.

HGRN2 is not among them: its steps use lower bounds from the imported weights."""


@pytest.mark.parametrize(
    ("name", "modes"),
    [
        *((name, MODES[:1] if name in STEPS_TESTED_ELSEWHERE else MODES) for name in MODELS),
        *(pytest.param(name, MODES[1:], marks=pytest.mark.full) for name in STEPS_TESTED_ELSEWHERE),
    ],
)
def test_logits(name: str, modes: tuple[str, ...]):
    config, weights, arrays = fixture(name)
    assert_module_matches(import_model(config, weights), arrays["tokens"], arrays["logits"], modes)


@pytest.mark.parametrize("name", FIRST_LAYERS)
def test_first_layers(name: str):
    """The input of the second layer's mixer and the output of that mixer agree."""
    config, weights, arrays = first_layers(name, 2)
    model = import_model(config, weights, pattern="layer layer")
    first, second = model.stack.parts
    assert isinstance(first, BlockModule) and isinstance(second, BlockModule)
    assert isinstance(second.mixer, RecurrentMixer)
    seq = rows(*arrays["tokens"].shape)
    mixer_input = jax.jit(lambda tokens: second.mixer_norm(first(model.embedding[tokens], seq)[0]))
    assert relative_difference(mixer_input(arrays["tokens"]), arrays["mixer/input"]) <= TOLERANCE
    assert_module_matches(second.mixer, arrays["mixer/input"], arrays["mixer/output"])


@pytest.mark.parametrize("name", MIXERS)
def test_parallel_mixers(name: str):
    """Each mixer is compared alone. Multipliers of its input and output belong to the mixer in recallax."""
    config, weights, arrays = fixture(name)
    fields = ConfigFields(config)
    entries, width = falcon_h1_layout.falcon_h1_mixer_entries(fields), config["hidden_size"]
    output_multipliers = {part: np.float32(config[f"{part}_out_multiplier"]) for part in ("ssm", "attention")}

    mamba2 = load_mixer(
        falcon_h1_layout.falcon_h1_mamba2(fields), width, entries, "layers.1.mamba.", weights, "model.layers.1.mamba."
    )
    assert isinstance(mamba2, RecurrentMixer)
    assert_module_matches(mamba2, arrays["mixer/input"], arrays["mixer/output"] * output_multipliers["ssm"])

    attention = falcon_h1_layout.falcon_h1_attention(fields)
    attention = load_mixer(attention, width, entries, "layers.1.attention.", weights, "model.layers.1.self_attn.")
    assert isinstance(attention, RecurrentMixer)
    input_multiplier = np.float32(config["attention_in_multiplier"])
    assert_module_matches(
        attention,
        arrays["attention/input"] / input_multiplier,
        arrays["attention/output"] * output_multipliers["attention"],
    )


@pytest.mark.parametrize(
    ("name", "pattern"), [("llama", "layer layer"), ("nemotron_h", "mamba (mlp)*1 (attention mamba) mlp")]
)
def test_logits_do_not_depend_on_repeats_in_the_pattern(name: str, pattern: str):
    config, weights, arrays = fixture(name)
    model = import_model(config, weights, pattern)
    graph, params = nnx.split(model)
    tokens = jnp.asarray(arrays["tokens"])
    logits = jax.jit(lambda params: nnx.merge(graph, params)(tokens, rows(*tokens.shape))[0])(params)
    assert relative_difference(logits, arrays["logits"]) <= TOLERANCE


def test_parameter_paths_in_nested_repeats():
    """Layers draw the same parameters with and without repeats, so the parameters of one model fill the other."""
    blocks = {
        "a": Block(mixer=Identity(), channel=SwiGLU(intermediate_size=3)),
        "b": Block(mixer=SwiGLU(intermediate_size=2)),
    }
    config = LMConfig(d_model=4, vocab_size=5, pattern="b (a b*2 (b a)*2)*2", blocks=blocks)
    flat = LMConfig(d_model=4, vocab_size=5, pattern=" ".join(config.layer_names), blocks=blocks)
    (nested, nested_paths), (plain, plain_paths) = (
        (model, parameter_paths(model, layer_paths(parse_pattern(c.pattern, list(blocks)))))
        for c, model in ((c, c.build(nnx.Rngs(0))) for c in (config, flat))
    )
    assert nested_paths.keys() == plain_paths.keys()
    assert parameter_shapes(nested, nested_paths) == parameter_shapes(plain, plain_paths)
    leaves = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(plain, nnx.Param))}
    again = fill_parameters(
        nested, nested_paths, {name: leaves[path.path][path.stack_index] for name, path in plain_paths.items()}
    )
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (again, nested)))


@pytest.mark.parametrize(
    ("layers", "pattern"),
    [
        ("a", "a"),
        ("a a a", "a*3"),
        ("a a b a a b", "(a*2 b)*2"),
        ("a b a", "a b a"),
        ("a a b b b a", "a*2 b*3 a"),
    ],
)
def test_compress_pattern_uses_repeats(layers: str, pattern: str):
    assert compress_pattern(layers.split()) == pattern


@pytest.mark.parametrize("name", (*MODELS, *FIRST_LAYERS, *MIXERS))
def test_key_map_transforms_are_invertible(name: str):
    config, weights, _ = first_layers(name, 2) if name in FIRST_LAYERS else fixture(name)
    layout, fields = LAYOUTS[layout_of(config)], ConfigFields(config)
    entries = (
        falcon_h1_layout.falcon_h1_mixer_entries(fields)
        if name in MIXERS
        else layout.key_map(fields, layout.from_config_json(fields))
    )
    for entry in entries:
        arrays = tuple(weights[key] for key in entry.source)
        for restored, array in zip(entry.transform.inverse(entry.transform.forward(arrays)), arrays, strict=True):
            np.testing.assert_allclose(restored, array, rtol=1e-6, atol=1e-7)


def altered_weights(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return the weights of `llama` with some replaced or, if None, left out; `__` stands for the dots of a key."""
    weights = fixture("llama").weights | {key.replace("__", "."): x for key, x in changes.items() if x is not None}
    return {key: x for key, x in weights.items() if changes.get(key.replace(".", "__"), 0) is not None}


NORM = "model__layers__1__input_layernorm__weight"


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        (altered_weights(**{NORM: None}), ["lack 'model.layers.1.input_layernorm.weight'", "all shards"]),
        (altered_weights(extra=np.zeros(3)), ["no parameter for 'extra'", "config.json"]),
        (
            altered_weights(model__norm__weight=None, norm__weight=np.zeros(24)),
            ["lack 'model.norm.weight'", "'norm.weight'"],
        ),
        (
            altered_weights(**{NORM: np.zeros(23)}),
            [NORM.replace("__", "."), "(23,)", "(24,)", "layers.1.mixer_norm.scale"],
        ),
        (
            altered_weights(model__layers__0__mlp__up_proj__weight=np.zeros((39, 24))),
            ["model.layers.0.mlp.up_proj.weight", "(39, 24)", "(40, 24)", "layers.0.channel.up.kernel (24, 80)"],
        ),
        ({}, ["lack 'lm_head.weight'", "and 16 more"]),
    ],
)
def test_mismatched_weights_are_listed(weights: dict[str, np.ndarray], parts: list[str]):
    with pytest.raises(WeightsError) as error:
        import_model(fixture("llama").config, weights)
    for part in parts:
        assert part in str(error.value)


def test_key_map_must_fill_every_parameter_once():
    shapes = {"a": (2,), "b": (2,)}
    for entries, message in (
        ([KeyMapEntry(("x",), ("a",))], "does not fill 'b'"),
        ([KeyMapEntry(("x",), ("a",)), KeyMapEntry(("y",), ("a",))], "more than once 'a'"),
        ([KeyMapEntry(("x",), ("a",)), KeyMapEntry(("x",), ("b",))], "more than once 'x'"),
        (
            [KeyMapEntry(("x",), ("a",)), KeyMapEntry(("y",), ("b",)), KeyMapEntry(("z",), ("c",))],
            "the model lacks: 'c'",
        ),
    ):
        with pytest.raises(WeightsError, match=message):
            apply_key_map(entries, {"x": np.zeros(2), "y": np.zeros(2)}, shapes)


UNSUPPORTED_CONFIGS = {
    "no such model": ("llama", {"model_type": "lama"}, "model_type is 'lama'.*did you mean 'llama'"),
    "biases": ("llama", {"attention_bias": True}, "llama: attention_bias is True"),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'.*only 'silu'"),
    "scaled positions": ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "rope_type 'llama3'"),
    "scaled positions before 5": ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling is"),
    "partial positions": ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotates 0.5 of a head"),
    "missing": ("llama", {"hidden_size": None}, "llama: config.json lacks 'hidden_size', of type int"),
    "type": ("llama", {"hidden_size": "24"}, "hidden_size is '24'; it must be of type int"),
    "heads": (
        "llama",
        {"num_key_value_heads": 3},
        "num_key_value_heads is 3; num_attention_heads 4 must be a multiple of it",
    ),
    "experts": ("kimi_linear", {"mlp_layer_types": ["dense", "sparse"]}, "mixture of experts"),
    "latent attention": ("kimi_linear", {"layer_types": ["full_attention"]}, "latent attention"),
    "gated attention": ("qwen3_next", {}, "'full_attention', which recallax does not support: it is gated"),
    "sparse layers": ("qwen3_next", {"mlp_only_layers": [1]}, r"layers \[0, 2\] are not in mlp_only_layers"),
    "normed attention": ("olmo_hybrid", {}, "'full_attention'.*normalizes queries and keys"),
    "unknown layer": ("nemotron_h", {"layers_block_type": ["moe"]}, "layers_block_type contains 'moe'"),
    "side by side": ("falcon_h1", {}, "Mamba-2 and attention in parallel"),
    "grouped gla": (
        "fla_gla",
        {"num_kv_heads": 1},
        "gla: num_kv_heads is 1, and recallax supports one value for this layer",
    ),
    "clamped gla": ("fla_gla", {"clamp_min": -3.0}, "clamp_min is -3.0"),
    "heads of gla": ("fla_gla", {"expand_k": 0.6}, "expand_k makes all heads 9.6 wide"),
    "gated delta": ("fla_delta_net", {"use_gate": True}, "use_gate is True"),
    "summed keys": ("fla_delta_net", {"qk_norm": "sum"}, "qk_norm is 'sum'"),
    "no convolution": ("fla_gated_deltanet", {"use_short_conv": False}, "use_short_conv is False"),
    "sigmoid gate": (
        "fla_gated_deltanet",
        {"output_gate_activation": "sigmoid"},
        "output_gate_activation is 'sigmoid'",
    ),
    "hybrid": ("fla_retnet", {"attn": {"layers": [1]}}, "attn is {'layers': .1.}"),
    "residual attention": ("fla_kda", {"attnres_block_size": 2}, "attnres_block_size is 2"),
    "value heads": ("fla_kda", {"num_v_heads": 4}, "num_v_heads is 4, and num_heads 2"),
    "no forgetting": ("fla_gated_deltaproduct", {"use_forget_gate": None}, "use_forget_gate is False"),
    "feature map": ("fla_linear_attn", {"feature_map": "elu"}, "feature_map is 'elu'"),
    "normalised": ("fla_linear_attn", {"norm_feature_map": True}, "norm_feature_map is True"),
    "no floors": ("fla_hgrn2", {"use_lower_bound": False}, "use_lower_bound is False"),
    "wide keys": ("fla_hgrn2", {"num_heads": 4}, "expand_ratio is 8 and num_heads 4"),
    "two mamba2": ("fla_mamba2", {"layer_norm_epsilon": 1e-5}, "norm_eps, which is fla's, and layer_norm_epsilon"),
    "wide skip": ("fla_mamba2", {"D_has_hdim": True}, "D_has_hdim is True"),
    "convolution without bias": ("mamba2", {"use_conv_bias": False}, "use_conv_bias is False"),
}


@pytest.mark.parametrize("case", UNSUPPORTED_CONFIGS)
def test_unrepresentable_configs_are_rejected(case: str):
    name, changes, message = UNSUPPORTED_CONFIGS[case]
    config = fixture(name).config | changes
    with pytest.raises(ConfigError, match=message):
        import_model(config, fixture(name).weights)


def test_field_without_a_safe_default_is_required():
    config = {key: value for key, value in fixture("mistral").config.items() if key != "sliding_window"}
    with pytest.raises(ConfigError, match=r"mistral: config\.json lacks 'sliding_window'"):
        import_config(config)
    assert import_config(config | {"sliding_window": None}).blocks["layer"].mixer == Attention(
        num_heads=4, num_kv_heads=2, head_dim=8
    )


def test_pattern_with_other_layers_is_rejected():
    config, weights, _ = fixture("llama")
    with pytest.raises(ConfigError, match=r"'layer\*3' does not have the layers of 'layer\*2'"):
        import_model(config, weights, "layer*3")
