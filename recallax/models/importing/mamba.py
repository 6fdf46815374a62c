"""Mamba: layers of one sublayer, the embedding tied by default."""

from collections.abc import Sequence
from typing import Any

from recallax.layers import Mamba, Nothing
from recallax.layers.mamba import MambaMixer
from recallax.models.block import Block, BlockModule
from recallax.models.importing import decoder
from recallax.models.importing.fields import Fields
from recallax.models.importing.form import TAPS
from recallax.models.importing.key_map import Entry, linear, one
from recallax.models.lm import LM, LMConfig


def mamba(fields: Fields) -> LMConfig:
    """`MambaForCausalLM`."""
    fields.demand("projections have no biases", use_bias=False)
    fields.demand("the convolution has a bias", use_conv_bias=True)
    fields.demand("convolution and gate are followed by silu", hidden_act="silu")
    rank = fields.values.get("time_step_rank")
    mixer = Mamba(
        state_dim=fields.get("state_size", int),
        expand=fields.get("expand", int),
        conv=fields.get("conv_kernel", int),
        dt_rank=None if rank in (None, "auto") else fields.get("time_step_rank", int),
    )
    return LMConfig(
        d_model=fields.get("hidden_size", int),
        vocab_size=fields.get("vocab_size", int),
        pattern=decoder.spelled(["mamba"] * fields.get("num_hidden_layers", int)),
        blocks={"mamba": Block(mixer=mixer, channel=Nothing())},
        readout=decoder.readout(fields, tied=True),
        norm_eps=fields.get("layer_norm_epsilon", float),
    )


def describe(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """The config of `MambaForCausalLM`."""
    mixer = decoder.parts(layers, "mixer", MambaMixer)[0]
    width, inner = model.embedding.shape[1], mixer.d.shape[0]
    return decoder.sizes(model, len(layers)) | {
        "state_size": mixer.states,
        "expand": decoder.whole_multiple(inner, width),
        "conv_kernel": mixer.conv.taps.shape[0],
        "time_step_rank": mixer.rank,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "layer_norm_epsilon": model.norm.eps,
    }


def entries(fields: Fields, model: LMConfig) -> list[Entry]:
    """The key map."""
    found = decoder.ends(model, "backbone.embeddings", "backbone.norm_f")
    for layer in range(len(model.layers)):
        theirs, ours = f"backbone.layers.{layer}", f"layers.{layer}"
        found.append(decoder.scale(f"{theirs}.norm", f"{ours}.mixer_norm"))
        found += _mixer(f"{theirs}.mixer", f"{ours}.mixer")
    return found


def _mixer(theirs: str, ours: str) -> list[Entry]:
    return [
        linear(f"{theirs}.in_proj", f"{ours}.input"),
        one(f"{theirs}.conv1d.weight", f"{ours}.conv.taps", TAPS),
        one(f"{theirs}.conv1d.bias", f"{ours}.conv.bias"),
        linear(f"{theirs}.x_proj", f"{ours}.select"),
        linear(f"{theirs}.dt_proj", f"{ours}.dt"),
        one(f"{theirs}.dt_proj.bias", f"{ours}.dt_bias"),
        one(f"{theirs}.A_log", f"{ours}.a_log"),
        one(f"{theirs}.D", f"{ours}.d"),
        linear(f"{theirs}.out_proj", f"{ours}.out"),
    ]
