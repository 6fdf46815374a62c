"""What the decoders of transformers have in common: how embedding, attention and perceptron are named and described.

What reads fields of a config.json has a counterpart that writes them from the module that the fields describe.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from recallax.config import ConfigError
from recallax.layers import Attention, SlidingWindow, SwiGLU
from recallax.layers.softmax import SoftmaxMixer
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.importing.fields import Fields
from recallax.models.importing.form import TRANSPOSED, chain, joined, shifted
from recallax.models.importing.key_map import Entry, linear, one
from recallax.models.lm import LM, LMConfig
from recallax.models.readout import Readout, Tied, TiedModule, Untied


def readout(fields: Fields, tied: bool = False) -> Readout:
    """How logits are read; `tied` is the layout's default."""
    return Tied() if fields.optional("tie_word_embeddings", bool, tied) else Untied()


def padded_vocab(fields: Fields) -> int:
    """Rows of the embedding: the vocabulary, rounded up where a multiple is given."""
    multiple = fields.optional("pad_vocab_size_multiple", int, 1)
    return -(-fields.get("vocab_size", int) // multiple) * multiple


def sizes(model: LM, layers: int) -> dict[str, Any]:
    """The fields of embedding and readout, and that no token has a special meaning."""
    vocab, width = model.embedding.shape
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "tie_word_embeddings": isinstance(model.readout, TiedModule),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def parts[M: nnx.Module](layers: Sequence[nnx.Module], part: str, kind: type[M]) -> list[M]:
    """A part of every layer, or of every mixer of them. Raises ConfigError where one is of another kind."""
    found = [getattr(layer, part) for layer in layers]
    for number, module in enumerate(found):
        if not isinstance(module, kind):
            name, wanted = type(module).__name__, kind.__name__
            raise ConfigError(f"layer {number} has the {part} {name}, and this layout has only {wanted}")
    return found


def whole_multiple(inner: int, width: int) -> int:
    """How many times `width` goes into `inner`. Raises ConfigError where it does not."""
    if inner % width:
        raise ConfigError(f"the inner width {inner} is no multiple of d_model {width}, and this layout has only those")
    return inner // width


def ends(model: LMConfig, embedding: str, norm: str, offset: float = 0.0) -> list[Entry]:
    """Embedding, last norm (which multiplies by offset + weight) and readout."""
    entries = [one(f"{embedding}.weight", "embedding"), scale(norm, "norm", offset)]
    return entries if model.readout == Tied() else [*entries, linear("lm_head", "readout")]


def scale(theirs: str, ours: str, offset: float = 0.0) -> Entry:
    """A norm that multiplies by offset + weight."""
    return one(f"{theirs}.weight", f"{ours}.scale", *([shifted(offset)] if offset else []))


def softmax(fields: Fields, window: int | None = None, rotary: bool = True) -> Attention | SlidingWindow:
    """Grouped softmax attention without biases."""
    heads = fields.get("num_attention_heads", int)
    sizes = {
        "heads": heads,
        "kv_heads": fields.optional("num_key_value_heads", int, heads),
        "head_dim": fields.optional("head_dim", int, fields.get("hidden_size", int) // heads),
        "rotary_base": rotary_base(fields) if rotary else None,
    }
    return Attention(**sizes) if window is None else SlidingWindow(window=window, **sizes)


def softmax_fields(mixer: SoftmaxMixer) -> dict[str, Any]:
    """The fields of attention, but for positions and window."""
    return {
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.width,
        "attention_bias": False,
    }


def softmax_entries(
    theirs: str, ours: str, *, entering: float = 1.0, keys: float = 1.0, leaving: float = 1.0
) -> list[Entry]:
    """Projections of softmax attention; the multipliers apply to its input, its keys and its output."""
    return [
        linear(f"{theirs}.q_proj", f"{ours}.q", entering),
        linear(f"{theirs}.k_proj", f"{ours}.k", entering * keys),
        linear(f"{theirs}.v_proj", f"{ours}.v", entering),
        linear(f"{theirs}.o_proj", f"{ours}.out", leaving),
    ]


def swiglu(fields: Fields) -> SwiGLU:
    """The gated perceptron without biases."""
    fields.demand("the perceptron's gate is silu", hidden_act="silu")
    return SwiGLU(inner=fields.get("intermediate_size", int))


def swiglu_fields(channel: SwiGLUMixer) -> dict[str, Any]:
    """The fields of the perceptron."""
    return {"intermediate_size": channel.out.kernel.shape[0], "hidden_act": "silu"}


def swiglu_entries(inner: int, theirs: str, ours: str) -> list[Entry]:
    """The gated perceptron of that inner width; ours has gate and input side by side."""
    gate_and_up = (f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight")
    return [
        Entry(gate_and_up, (f"{ours}.up.kernel",), chain(joined(inner, inner), TRANSPOSED)),
        linear(f"{theirs}.down_proj", f"{ours}.out"),
    ]


def rotary_base(fields: Fields) -> float:
    """The base of rotary embeddings over whole heads, as transformers 5 writes it or, before, without scaling."""
    fields.demand("rotary positions are not rescaled", rope_scaling=None)
    written = fields.optional("rope_parameters", dict, {})
    if (kind := written.get("rope_type", "default")) != "default":
        raise fields.refusal(f"rope_parameters has rope_type {kind!r}, and rotary positions are not rescaled")
    if (part := written.get("partial_rotary_factor", 1.0)) != 1:
        raise fields.refusal(f"rope_parameters rotates {part} of a head; recallax rotates all of it")
    return Fields({"rope_theta": fields.values.get("rope_theta"), **written}).optional("rope_theta", float, 10_000.0)


def rotary_fields(base: float | None) -> dict[str, Any]:
    """The fields of rotary positions. Raises ConfigError where there are none."""
    if base is None:
        raise ConfigError("its attention has no positions, and this layout rotates queries and keys")
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base}}


def spelled(layers: Sequence[str]) -> str:
    """The shortest of some patterns for these blocks: whole periods repeated, and runs of one block as `name*n`."""
    period = next(n for n in range(1, len(layers) + 1) if list(layers[:n]) * (len(layers) // n) == list(layers))
    runs: list[list[str]] = []
    for name in layers[:period]:
        if runs and runs[-1][0] == name:
            runs[-1].append(name)
        else:
            runs.append([name])
    body = " ".join(run[0] if len(run) == 1 else f"{run[0]}*{len(run)}" for run in runs)
    times = len(layers) // period
    if times == 1:
        return body
    return f"{body}*{times}" if period == 1 else f"({body})*{times}"
