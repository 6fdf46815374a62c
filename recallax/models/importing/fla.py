"""Gated DeltaNet as flash-linear-attention keeps it: every projection and every stream's convolution apart.

Source: `fla/layers/gated_deltanet.py` and `fla/models/gated_deltanet` of github.com/fla-org/flash-linear-attention,
version 0.6. Its weights cannot be run without a GPU there, so that the layout is compared with Olmo-Hybrid's, whose
layers are the same.
"""

from collections.abc import Sequence
from typing import Any

from recallax.layers import GatedDeltaNet, SwiGLU
from recallax.layers.gated_delta_net import GatedDeltaNetCell
from recallax.layers.memory import MemoryMixer
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.block import Block, BlockModule
from recallax.models.importing import decoder
from recallax.models.importing.fields import Fields
from recallax.models.importing.form import TAPS, chain, joined
from recallax.models.importing.gated_delta_net import apart
from recallax.models.importing.key_map import Entry, one
from recallax.models.importing.mamba2 import taps
from recallax.models.lm import LM, LMConfig


def gated_deltanet(fields: Fields) -> LMConfig:
    """`GatedDeltaNetForCausalLM` without attention layers."""
    fields.demand("recallax reads no attention layers in this layout", attn=None)
    fields.demand("outputs are gated and streams convolved", use_gate=True, use_short_conv=True)
    fields.demand("the perceptron's gate is silu", hidden_act="swish")
    keys, eps = fields.get("head_dim", int), fields.optional("norm_eps", float, 1e-6)
    heads = fields.get("num_heads", int)
    mixer = GatedDeltaNet(
        heads=heads,
        value_heads=fields.optional("num_v_heads", int, heads),
        key_dim=keys,
        value_dim=int(keys * fields.optional("expand_v", float, 2.0)),
        max_beta=2.0 if fields.optional("allow_neg_eigval", bool, False) else 1.0,
        conv=fields.optional("conv_size", int, 4),
        eps=eps,
    )
    return LMConfig(
        d_model=fields.get("hidden_size", int),
        vocab_size=fields.get("vocab_size", int),
        pattern=decoder.spelled(["layer"] * fields.get("num_hidden_layers", int)),
        blocks={"layer": Block(mixer=mixer, channel=SwiGLU(inner=_inner(fields)))},
        readout=decoder.readout(fields),
        norm_eps=eps,
    )


def describe(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """The config of `GatedDeltaNetForCausalLM`."""
    cell = decoder.parts(decoder.parts(layers, "mixer", MemoryMixer), "cell", GatedDeltaNetCell)[0]
    groups, heads, keys, values = cell.sizes
    inner = decoder.parts(layers, "channel", SwiGLUMixer)[0].out.kernel.shape[0]
    return decoder.sizes(model, len(layers)) | {
        "num_heads": groups,
        "num_v_heads": heads,
        "head_dim": keys,
        "expand_v": values / keys,
        "allow_neg_eigval": cell.max_beta == 2,
        "conv_size": taps(cell),
        "use_gate": True,
        "use_short_conv": True,
        "attn": None,
        "hidden_act": "swish",
        "intermediate_size": inner,
        "norm_eps": model.norm.eps,
    }


def entries(fields: Fields, model: LMConfig) -> list[Entry]:
    """The key map."""
    found = decoder.ends(model, "model.embeddings", "model.norm")
    block = model.blocks["layer"]
    assert isinstance(block.mixer, GatedDeltaNet)
    groups, heads, keys, values = block.mixer.sizes(model.d_model)
    widths = (groups * keys, groups * keys, heads * values)
    for layer in range(len(model.layers)):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        found.append(decoder.scale(f"{theirs}.attn_norm", f"{ours}.mixer_norm"))
        found.append(decoder.scale(f"{theirs}.mlp_norm", f"{ours}.channel_norm"))
        found += decoder.swiglu_entries(_inner(fields), f"{theirs}.mlp", f"{ours}.channel")
        found += _mixer(widths, f"{theirs}.attn", f"{ours}.mixer")
    return found


def _mixer(widths: tuple[int, ...], theirs: str, ours: str) -> list[Entry]:
    convolutions = tuple(f"{theirs}.{stream}_conv1d.weight" for stream in "qkv")
    cell = [
        Entry(convolutions, (f"{ours}.cell.conv.taps",), chain(joined(*widths), TAPS)),
        one(f"{theirs}.A_log", f"{ours}.cell.gate.a_log"),
        one(f"{theirs}.dt_bias", f"{ours}.cell.gate.dt_bias"),
    ]
    return apart(theirs, ours, cell)


def _inner(fields: Fields) -> int:
    """Width of the perceptron, which may be given as a ratio that is rounded up to a multiple of 256."""
    ratio = fields.optional("hidden_ratio", int, 4)
    rounded = -(-int(fields.get("hidden_size", int) * ratio * 2 / 3) // 256) * 256
    return fields.optional("intermediate_size", int, rounded)
