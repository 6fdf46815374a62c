"""The models of flash-linear-attention whose layers recallax has: a linear mixer and a SwiGLU in every layer.

Every model has the same frame and is said by a row of `KINDS`: its mixer, and what its weights are called. Source:
`fla/layers` and `fla/models` of github.com/fla-org/flash-linear-attention, version 0.6.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from recallax.layers import (
    GLA,
    HGRN2,
    KDA,
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaProduct,
    LinearAttention,
    MixerConfig,
    RetNet,
    SwiGLU,
)
from recallax.layers.delta_net import DeltaNetCell
from recallax.layers.gated_delta_net import GatedDeltaNetCell
from recallax.layers.gated_delta_product import GatedDeltaProductCell
from recallax.layers.gla import GLACell
from recallax.layers.hgrn2 import HGRN2Cell
from recallax.layers.kda import BoundedGate, KDACell
from recallax.layers.linear_attention import LinearCell
from recallax.layers.matrix_memory import MatrixCell
from recallax.layers.memory import MemoryMixer
from recallax.layers.retnet import RetNetCell
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.block import Block, BlockModule
from recallax.models.importing import decoder
from recallax.models.importing.fields import Fields
from recallax.models.importing.form import TAPS, Form, chain, joined
from recallax.models.importing.key_map import Entry, linear, one
from recallax.models.importing.mamba2 import taps
from recallax.models.lm import LM, LMConfig

FRAME = {"attn": None, "attnres_block_size": None, "hidden_act": "swish"}
"""What every config says in one way at most."""
UNGROUPED = FRAME | {"num_kv_heads": None, "feature_map": None, "use_output_gate": True, "fuse_norm": True}
UNGROUPED |= {"elementwise_affine": True}
STREAMS = {"q_proj": "query.parts.q", "k_proj": "writer.parts.k", "v_proj": "writer.parts.v", "o_proj": "readout.out"}
GATED = STREAMS | {"g_proj": "readout.gate"}
DELTA = STREAMS | {"b_proj": "writer.parts.beta"}
HGRN2_EPS = 1e-5
"""Of HGRN2's output norm, whatever its norm_eps."""
DECAYS = {"A_log": "cell.gate.a_log", "dt_bias": "cell.gate.dt_bias"}


class Kind(NamedTuple):
    """What one of its models says."""

    mixer: Callable[[Fields], MixerConfig]
    cell: type[MatrixCell]
    """Of the mixer."""
    describe: Callable[[Any, int], dict[str, Any]]
    """The fields of the mixer, from its cell and the model's width."""
    products: Mapping[str, str]
    """Its projections, and ours below the mixer."""
    vectors: Mapping[str, str]
    """Its parameters that are no projections."""
    norm: str
    """Its output norm."""
    demands: Mapping[str, Any]
    """Fields with one value that can be represented, which is also what they mean when they are missing."""
    ratio: int = 4
    """Of the perceptron's width to the model's, before it is cut to two thirds."""


def config(kind: str, fields: Fields) -> LMConfig:
    """The model of that kind."""
    fields.demand("recallax has this layer in one way", **KINDS[kind].demands)
    return LMConfig(
        d_model=fields.get("hidden_size", int),
        vocab_size=fields.get("vocab_size", int),
        pattern=decoder.spelled(["layer"] * fields.get("num_hidden_layers", int)),
        blocks={"layer": Block(mixer=KINDS[kind].mixer(fields), channel=SwiGLU(inner=_inner(kind, fields)))},
        readout=decoder.readout(fields),
        norm_eps=_eps(fields),
    )


def describe(kind: str, model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """The config of a model of that kind."""
    mixer = decoder.parts(decoder.parts(layers, "mixer", MemoryMixer), "cell", KINDS[kind].cell)[0]
    inner = decoder.parts(layers, "channel", SwiGLUMixer)[0].out.kernel.shape[0]
    return (
        decoder.sizes(model, len(layers))
        | dict(KINDS[kind].demands)
        | KINDS[kind].describe(mixer, model.embedding.shape[1])
        | {"intermediate_size": inner, "norm_eps": model.norm.eps}
    )


def entries(kind: str, fields: Fields, model: LMConfig) -> list[Entry]:
    """The key map."""
    found = decoder.ends(model, "model.embeddings", "model.norm")
    for layer in range(len(model.layers)):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        found.append(decoder.scale(f"{theirs}.attn_norm", f"{ours}.mixer_norm"))
        found.append(decoder.scale(f"{theirs}.mlp_norm", f"{ours}.channel_norm"))
        found += decoder.swiglu_entries(_inner(kind, fields), f"{theirs}.mlp", f"{ours}.channel")
        found += _mixer_entries(KINDS[kind], model, f"{theirs}.attn", f"{ours}.mixer")
    return [*found, _floors(len(model.layers))] if kind == "hgrn2" else found


def _mixer_entries(kind: Kind, model: LMConfig, theirs: str, ours: str) -> list[Entry]:
    found = [linear(f"{theirs}.{key}", f"{ours}.{name}") for key, name in kind.products.items()]
    found += [one(f"{theirs}.{key}", f"{ours}.{name}") for key, name in kind.vectors.items()]
    found.append(decoder.scale(f"{theirs}.{kind.norm}", f"{ours}.readout"))
    mixer = model.blocks["layer"].mixer
    if widths := _convolved(mixer, model.d_model):
        convolutions = tuple(f"{theirs}.{stream}_conv1d.weight" for stream in "qkv")
        found.append(Entry(convolutions, (f"{ours}.cell.conv.taps",), chain(joined(*widths), TAPS)))
    return found


def _convolved(mixer: MixerConfig, d_model: int) -> tuple[int, int, int] | None:
    """Widths of queries, keys and values where a convolution runs over them."""
    if not isinstance(mixer, GLA | DeltaNet | KDA | GatedDeltaNet | GatedDeltaProduct) or not mixer.conv:
        return None
    groups, heads, keys, values = mixer.sizes(d_model)
    steps = mixer.steps if isinstance(mixer, GatedDeltaProduct) else 1
    return groups * keys, steps * groups * keys, steps * heads * values


def _floors(layers: int) -> Entry:
    """HGRN2's learned floors, and what every layer keeps of them between training and decoding."""

    def to_ours(arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        (logits,) = arrays
        shares = np.exp(logits - logits.max(axis=0))
        shares /= shares.sum(axis=0)
        return logits, *(np.cumsum(shares, axis=0) - shares[:1])

    kept = tuple(f"layers.{layer}.mixer.cell.floor" for layer in range(layers))
    return Entry(("model.lower_bounds",), ("floors.logits", *kept), Form(to_ours, lambda arrays: arrays[:1]))


def _inner(kind: str, fields: Fields) -> int:
    """Width of the perceptron, which may be given as a ratio that is rounded up to a multiple of 256."""
    ratio = fields.optional("hidden_ratio", int, KINDS[kind].ratio)
    rounded = -(-int(fields.get("hidden_size", int) * ratio * 2 / 3) // 256) * 256
    return fields.optional("intermediate_size", int, rounded)


def _eps(fields: Fields) -> float:
    return fields.optional("norm_eps", float, 1e-6)


def _max_beta(fields: Fields) -> float:
    return 2.0 if fields.optional("allow_neg_eigval", bool, False) else 1.0


def _part(fields: Fields, name: str, default: float) -> int:
    """Width of a head's keys or values, of which all heads' are a multiple of the model's width."""
    whole, heads = fields.get("hidden_size", int) * fields.optional(name, float, default), fields.get("num_heads", int)
    if round(whole) < heads or not math.isclose(whole, round(whole)) or round(whole) % heads:
        raise fields.refusal(f"{name} makes all heads {whole:g} wide; that must be a multiple of num_heads {heads}")
    return round(whole) // heads


def _ratio(width: int, of: int) -> float:
    """The smallest factor with which they find this width again, whether they cut or round the product."""
    return width / of if int(of * (width / of)) == width else math.nextafter(width / of, math.inf)


def _heads(cell: MatrixCell, width: int) -> dict[str, Any]:
    """Sizes as factors of the model's width."""
    _, heads, keys, values = cell.sizes
    return {"num_heads": heads, "expand_k": _ratio(heads * keys, width), "expand_v": _ratio(heads * values, width)}


def _delta_sizes(fields: Fields, expand: float) -> dict[str, int]:
    """Sizes of the kinds that say the width of a key; `expand` is the default of the values' to it."""
    keys = fields.get("head_dim", int)
    values = int(keys * (ratio := fields.optional("expand_v", float, expand)))
    if values < 1:
        raise fields.refusal(
            f"expand_v {ratio:g} makes values {values} wide, from head_dim {keys}; at least 1 is needed"
        )
    return {"key_dim": keys, "value_dim": values}


def _gla(fields: Fields) -> GLA:
    return GLA(
        heads=fields.get("num_heads", int),
        key_dim=_part(fields, "expand_k", 0.5),
        value_dim=_part(fields, "expand_v", 1.0),
        conv=fields.optional("conv_size", int, 4) if fields.optional("use_short_conv", bool, False) else 0,
        eps=_eps(fields),
    )


def _gla_fields(cell: GLACell, width: int) -> dict[str, Any]:
    return _heads(cell, width) | ({"use_short_conv": False} if cell.conv is None else _conv(cell))


def _delta_net(fields: Fields) -> DeltaNet:
    return DeltaNet(
        heads=fields.get("num_heads", int),
        key_dim=_part(fields, "expand_k", 1.0),
        value_dim=_part(fields, "expand_v", 1.0),
        max_beta=_max_beta(fields),
        conv=fields.optional("conv_size", int, 4),
        eps=_eps(fields),
    )


def _retnet(fields: Fields) -> RetNet:
    keys, values = _part(fields, "expand_k", 1.0), _part(fields, "expand_v", 2.0)
    return RetNet(heads=fields.get("num_heads", int), key_dim=keys, value_dim=values, eps=_eps(fields))


def _linear_attn(fields: Fields) -> LinearAttention:
    if (name := fields.get("feature_map", str)) != "identity":
        raise fields.refusal(f"feature_map is {name!r}; recallax has an output norm with 'identity' only")
    keys = _part(fields, "expand_k", 1.0)
    heads = fields.get("num_heads", int)
    return LinearAttention(heads=heads, feature_dim=keys, feature_map="identity", eps=_eps(fields))


def _hgrn2(fields: Fields) -> HGRN2:
    """It divides queries by the root of their width before a norm whose eps is fixed; ours does not divide."""
    width, heads = fields.get("hidden_size", int), fields.values.get("num_heads")
    keys = fields.optional("expand_ratio", int, 128 if heads is None else width // heads)
    if width % keys or heads not in (None, width // keys):
        raise fields.refusal(f"expand_ratio is {keys} and num_heads {heads}; together they must make {width}")
    return HGRN2(heads=width // keys, eps=HGRN2_EPS * keys)


def _kda(fields: Fields) -> KDA:
    heads, floor = fields.get("num_heads", int), fields.values.get("lower_bound")
    if (wide := fields.optional("num_v_heads", int, heads)) != heads:
        raise fields.refusal(
            f"num_v_heads is {wide}, and num_heads {heads}; here every head of a KDA has keys and values"
        )
    return KDA(
        heads=heads,
        gate="softplus" if floor is None else "bounded",
        floor=-5.0 if floor is None else fields.get("lower_bound", float),
        max_beta=_max_beta(fields),
        conv=fields.optional("conv_size", int, 4),
        eps=_eps(fields),
        gate_bias=True,
        **_delta_sizes(fields, 1.0),
    )


def _kda_fields(cell: KDACell, width: int) -> dict[str, Any]:
    floor = cell.gate.floor if isinstance(cell.gate, BoundedGate) else None
    return _delta_fields(cell, width) | {"safe_gate": floor is not None, "lower_bound": floor}


def _gated_deltanet(fields: Fields) -> GatedDeltaNet:
    if (gate := fields.optional("output_gate_activation", str, "swish")) not in ("swish", "silu"):
        raise fields.refusal(f"output_gate_activation is {gate!r}; recallax gates with 'swish' here")
    heads = fields.get("num_heads", int)
    return GatedDeltaNet(
        heads=heads,
        value_heads=fields.optional("num_v_heads", int, heads),
        max_beta=_max_beta(fields),
        conv=fields.optional("conv_size", int, 4),
        eps=_eps(fields),
        **_delta_sizes(fields, 2.0),
    )


def _gated_deltanet_fields(cell: GatedDeltaNetCell, width: int) -> dict[str, Any]:
    return _delta_fields(cell, width) | {"num_v_heads": cell.sizes.heads}


def _gated_deltaproduct(fields: Fields) -> GatedDeltaProduct:
    if not fields.optional("use_forget_gate", bool, False):
        raise fields.refusal("use_forget_gate is False, and recallax's Gated DeltaProduct always forgets")
    return GatedDeltaProduct(
        steps=fields.optional("num_householder", int, 1),
        heads=fields.get("num_heads", int),
        max_beta=_max_beta(fields),
        conv=fields.optional("conv_size", int, 4),
        eps=_eps(fields),
        **_delta_sizes(fields, 2.0),
    )


def _gated_deltaproduct_fields(cell: GatedDeltaProductCell, width: int) -> dict[str, Any]:
    return _delta_fields(cell, width) | {"use_forget_gate": True, "num_householder": cell.micro}


def _conv(cell: MatrixCell) -> dict[str, Any]:
    return {"use_short_conv": True, "conv_size": taps(cell)}


def _delta_net_fields(cell: DeltaNetCell, width: int) -> dict[str, Any]:
    return _heads(cell, width) | _conv(cell) | {"allow_neg_eigval": cell.max_beta == 2}


def _delta_fields(cell: KDACell | GatedDeltaNetCell | GatedDeltaProductCell, width: int) -> dict[str, Any]:
    groups, _, keys, values = cell.sizes
    sizes = {"num_heads": groups, "head_dim": keys, "expand_v": _ratio(values, keys)}
    return sizes | _conv(cell) | {"allow_neg_eigval": cell.max_beta == 2}


KINDS: dict[str, Kind] = {
    "gla": Kind(
        _gla,
        GLACell,
        _gla_fields,
        GATED | {"gk_proj.0": "writer.parts.decay.down", "gk_proj.1": "writer.parts.decay.up"},
        {"gk_proj.1.bias": "writer.parts.decay.up.bias"},
        "g_norm_swish_gate",
        UNGROUPED | {"clamp_min": None},
    ),
    "delta_net": Kind(
        _delta_net,
        DeltaNetCell,
        _delta_net_fields,
        DELTA,
        {},
        "o_norm",
        FRAME | {"use_gate": False, "use_beta": True, "use_short_conv": True, "qk_norm": "l2", "qk_activation": "silu"},
    ),
    "retnet": Kind(_retnet, RetNetCell, _heads, GATED, {}, "g_norm_swish_gate", UNGROUPED, ratio=2),
    "linear_attn": Kind(
        _linear_attn,
        LinearCell,
        lambda cell, width: _heads(cell, width) | {"feature_map": "identity"},
        STREAMS,
        {},
        "norm",
        FRAME
        | {"num_kv_heads": None, "expand_v": 1.0, "norm_q": False, "norm_k": False, "norm_feature_map": False}
        | {"elementwise_affine": True},
    ),
    "hgrn2": Kind(
        _hgrn2,
        HGRN2Cell,
        lambda cell, width: {"num_heads": cell.sizes.heads, "expand_ratio": cell.sizes.keys},
        {
            "q_proj": "query.parts.q",
            "f_proj": "writer.parts.decay",
            "i_proj": "writer.parts.v",
            "o_proj": "readout.out",
        },
        {},
        "g_norm",
        FRAME | {"use_short_conv": False, "use_lower_bound": True, "elementwise_affine": True},
    ),
    "kda": Kind(
        _kda,
        KDACell,
        _kda_fields,
        DELTA
        | {"f_proj.0": "writer.parts.decay.down", "f_proj.1": "writer.parts.decay.up"}
        | {"g_proj.0": "readout.gate.down", "g_proj.1": "readout.gate.up"},
        DECAYS | {"g_proj.1.bias": "readout.gate.up.bias"},
        "o_norm",
        FRAME | {"use_short_conv": True},
    ),
    "gated_deltanet": Kind(
        _gated_deltanet,
        GatedDeltaNetCell,
        _gated_deltanet_fields,
        DELTA | GATED | {"a_proj": "writer.parts.decay"},
        DECAYS,
        "o_norm",
        FRAME | {"use_gate": True, "use_short_conv": True},
    ),
    "gated_deltaproduct": Kind(
        _gated_deltaproduct,
        GatedDeltaProductCell,
        _gated_deltaproduct_fields,
        DELTA | GATED | {"a_proj": "writer.parts.decay"},
        DECAYS,
        "o_norm",
        FRAME | {"use_output_gate": True, "use_short_conv": True},
    ),
}
"""By `model_type`."""
