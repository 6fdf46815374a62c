"""Mamba-2: layers of one sublayer. Its mixer is also Nemotron-H's and Falcon-H1's."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from recallax.config import ConfigError
from recallax.layers import Mamba2, Nothing
from recallax.layers.mamba2 import Mamba2Cell
from recallax.layers.matrix_memory import MatrixCell
from recallax.layers.memory import MemoryMixer
from recallax.models.block import Block, BlockModule
from recallax.models.importing import decoder
from recallax.models.importing.fields import Fields
from recallax.models.importing.form import TAPS, TRANSPOSED, Form, chain, lazily, parted, reordered, reshaped, scaled
from recallax.models.importing.key_map import Entry, linear, one
from recallax.models.lm import LM, LMConfig


def mamba2(fields: Fields) -> LMConfig:
    """`Mamba2ForCausalLM`."""
    fields.demand("projections have no biases", use_bias=False)
    fields.demand("the convolution has a bias", use_conv_bias=True)
    fields.demand("convolution and gate are followed by silu", hidden_act="silu")
    eps = fields.get("layer_norm_epsilon", float)
    width = fields.get("head_dim", int)
    mixer = Mamba2(
        state_dim=fields.get("state_size", int),
        head_dim=width,
        groups=fields.get("n_groups", int),
        inner=fields.get("num_heads", int) * width,
        conv=fields.get("conv_kernel", int),
        dt_limit=dt_limit(fields),
        eps=eps,
    )
    return LMConfig(
        d_model=fields.get("hidden_size", int),
        vocab_size=fields.get("vocab_size", int),
        pattern=decoder.spelled(["mamba"] * fields.get("num_hidden_layers", int)),
        blocks={"mamba": Block(mixer=mixer, channel=Nothing())},
        readout=decoder.readout(fields),
        norm_eps=eps,
    )


def describe(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """The config of `Mamba2ForCausalLM`."""
    cell = cells(layers)[0]
    groups, heads, keys, values = cell.sizes
    return decoder.sizes(model, len(layers)) | {
        "state_size": keys,
        "n_groups": groups,
        "num_heads": heads,
        "head_dim": values,
        "expand": decoder.whole_multiple(heads * values, model.embedding.shape[1]),
        "conv_kernel": taps(cell),
        "time_step_limit": list(cell.gate.limit),
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "layer_norm_epsilon": model.norm.eps,
    }


def cells(layers: Sequence[BlockModule]) -> list[Mamba2Cell]:
    """The cells of layers that are all Mamba-2. Raises ConfigError where one is not."""
    return decoder.parts(decoder.parts(layers, "mixer", MemoryMixer), "cell", Mamba2Cell)


def taps(cell: MatrixCell) -> int:
    """Of the convolution. Raises ConfigError where there is none."""
    if cell.conv is None:
        raise ConfigError("its mixer has no short convolution, and this layout has one")
    return cell.conv.taps.shape[0]


def entries(fields: Fields, model: LMConfig) -> list[Entry]:
    """The key map."""
    found = decoder.ends(model, "backbone.embeddings", "backbone.norm_f")
    mixer = model.blocks["mamba"].mixer
    assert isinstance(mixer, Mamba2)
    for layer in range(len(model.layers)):
        theirs, ours = f"backbone.layers.{layer}", f"layers.{layer}"
        found.append(decoder.scale(f"{theirs}.norm", f"{ours}.mixer_norm"))
        found += mixer_entries(mixer, model.d_model, f"{theirs}.mixer", f"{ours}.mixer")
    return found


def dt_limit(fields: Fields) -> tuple[float, float | None]:
    """The range of step sizes; no upper limit is infinity there and None here."""
    limit = fields.values.get("time_step_limit") or (0.0, math.inf)
    if not isinstance(limit, list | tuple) or len(limit) != 2 or not all(type(x) in (int, float) for x in limit):
        raise fields.refusal(f"time_step_limit is {limit!r}; it must be two numbers, the second may be Infinity")
    low, high = limit
    if not 0 <= low < high:
        raise fields.refusal(f"time_step_limit is {limit!r}; the first must be at least 0 and below the second")
    return float(low), None if high == math.inf else float(high)


def mixer_entries(
    mixer: Mamba2,
    d_model: int,
    theirs: str,
    ours: str,
    *,
    multipliers: Sequence[float] = (1.0,) * 5,
    leaving: float = 1.0,
) -> list[Entry]:
    """The mixer. Its input projection is gate, x, B, C and step sizes, its convolution runs over x, B and C.

    `multipliers` apply to those five, `leaving` to the output.
    """
    groups, heads, keys, values = mixer.sizes(d_model)
    inner, shared = heads * values, groups * keys
    widths = (inner, inner, shared, shared, heads)
    names = ("readout.gate", "writer.parts.v", "writer.parts.k", "query.parts.q", "writer.parts.dt")
    projection = chain(parted(*widths), TRANSPOSED)
    if any(m != 1 for m in multipliers):
        projection = chain(lazily(lambda: scaled(np.repeat(multipliers, widths)[:, None])), projection)

    def queries_first() -> Form:
        x, b, c = np.split(np.arange(inner + 2 * shared), [inner, inner + shared])
        return reordered(np.concatenate([c, b, x]))

    order = lazily(queries_first)
    found = [
        Entry((f"{theirs}.in_proj.weight",), tuple(f"{ours}.{name}.kernel" for name in names), projection),
        one(f"{theirs}.conv1d.weight", f"{ours}.cell.conv.taps", chain(order, TAPS)),
        one(f"{theirs}.conv1d.bias", f"{ours}.cell.conv.bias", order),
        one(f"{theirs}.A_log", f"{ours}.cell.gate.a_log"),
        one(f"{theirs}.dt_bias", f"{ours}.cell.gate.dt_bias"),
        one(f"{theirs}.D", f"{ours}.cell.d"),
        linear(f"{theirs}.out_proj", f"{ours}.readout.out", leaving),
    ]
    if mixer.order == "no norm":
        return found
    per_group = reshaped((inner,), (groups, inner // groups))
    return [*found, one(f"{theirs}.norm.weight", f"{ours}.readout.scale", per_group)]
