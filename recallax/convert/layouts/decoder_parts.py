"""What the decoders of transformers have in common: how embedding, attention and perceptron are named and described.

What reads fields of a config.json has a counterpart that writes them from the module that the fields describe.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from recallax.config import ConfigError
from recallax.convert.array_transforms import TRANSPOSE, add_offset, chain, concat_first_axis
from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import KeyMapEntry, linear_entry, parameter_entry
from recallax.layers import Attention, SlidingWindow, SwiGLU
from recallax.layers.softmax_attention import SoftmaxAttentionMixer
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.lm import LM, LMConfig
from recallax.models.lm_head import LMHead, Tied, TiedModule, Untied


def lm_head_config(fields: ConfigFields, tied_by_default: bool = False) -> LMHead:
    """How logits are read; `tied_by_default` is the layout's default."""
    return Tied() if fields.optional("tie_word_embeddings", bool, tied_by_default) else Untied()


def padded_vocab_size(fields: ConfigFields) -> int:
    """Rows of the embedding: the vocabulary, rounded up where a multiple is given."""
    multiple = fields.optional("pad_vocab_size_multiple", int, 1)
    return -(-fields.required("vocab_size", int) // multiple) * multiple


def embedding_fields(model: LM, num_layers: int) -> dict[str, Any]:
    """The fields of embedding and readout, and that no token has a special meaning."""
    vocab, width = model.embedding.shape
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "tie_word_embeddings": isinstance(model.readout, TiedModule),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def collect_modules[M: nnx.Module](layers: Sequence[nnx.Module], attribute: str, expected_type: type[M]) -> list[M]:
    """A part of every layer, or of every mixer of them. Raises ConfigError where one is of another kind."""
    found = [getattr(layer, attribute) for layer in layers]
    for number, module in enumerate(found):
        if not isinstance(module, expected_type):
            name, wanted = type(module).__name__, expected_type.__name__
            raise ConfigError(f"layer {number} has the {attribute} {name}, and this layout has only {wanted}")
    return found


def integer_ratio(inner: int, width: int) -> int:
    """How many times `width` goes into `intermediate_size`. Raises ConfigError where it does not."""
    if inner % width:
        raise ConfigError(f"the inner width {inner} is no multiple of d_model {width}, and this layout has only those")
    return inner // width


def embedding_and_head_entries(model: LMConfig, embedding: str, norm: str, offset: float = 0.0) -> list[KeyMapEntry]:
    """Embedding, last norm (which multiplies by offset + weight) and readout."""
    entries = [parameter_entry(f"{embedding}.weight", "embedding"), norm_entry(norm, "norm", offset)]
    return entries if model.lm_head == Tied() else [*entries, linear_entry("lm_head", "readout")]


def norm_entry(source: str, target: str, offset: float = 0.0) -> KeyMapEntry:
    """A norm that multiplies by offset + weight."""
    return parameter_entry(f"{source}.weight", f"{target}.scale", *([add_offset(offset)] if offset else []))


def attention_config(fields: ConfigFields, window: int | None = None, rotary: bool = True) -> Attention | SlidingWindow:
    """Grouped softmax attention without biases."""
    heads = fields.required("num_attention_heads", int)
    sizes = {
        "heads": heads,
        "kv_heads": fields.optional("num_key_value_heads", int, heads),
        "head_dim": fields.optional("head_dim", int, fields.required("hidden_size", int) // heads),
        "rotary_base": parse_rope_theta(fields) if rotary else None,
    }
    return Attention(**sizes) if window is None else SlidingWindow(window=window, **sizes)


def attention_fields(mixer: SoftmaxAttentionMixer) -> dict[str, Any]:
    """The fields of attention, but for positions and window."""
    return {
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "attention_bias": False,
    }


def attention_entries(
    source: str,
    target: str,
    *,
    input_multiplier: float = 1.0,
    key_multiplier: float = 1.0,
    output_multiplier: float = 1.0,
) -> list[KeyMapEntry]:
    """Projections of softmax attention; the multipliers apply to its input, its keys and its output."""
    return [
        linear_entry(f"{source}.q_proj", f"{target}.q", input_multiplier),
        linear_entry(f"{source}.k_proj", f"{target}.k", input_multiplier * key_multiplier),
        linear_entry(f"{source}.v_proj", f"{target}.v", input_multiplier),
        linear_entry(f"{source}.o_proj", f"{target}.out", output_multiplier),
    ]


def swiglu_config(fields: ConfigFields) -> SwiGLU:
    """The gated perceptron without biases."""
    fields.require_values("the perceptron's gate is silu", hidden_act="silu")
    return SwiGLU(intermediate_size=fields.required("intermediate_size", int))


def swiglu_fields(channel: SwiGLUMixer) -> dict[str, Any]:
    """The fields of the perceptron."""
    return {"intermediate_size": channel.out.kernel.shape[0], "hidden_act": "silu"}


def swiglu_entries(intermediate_size: int, source: str, target: str) -> list[KeyMapEntry]:
    """The gated perceptron of that inner width; ours has gate and input side by side."""
    gate_and_up = (f"{source}.gate_proj.weight", f"{source}.up_proj.weight")
    return [
        KeyMapEntry(
            gate_and_up,
            (f"{target}.up.kernel",),
            chain(concat_first_axis(intermediate_size, intermediate_size), TRANSPOSE),
        ),
        linear_entry(f"{source}.down_proj", f"{target}.out"),
    ]


def parse_rope_theta(fields: ConfigFields) -> float:
    """The base of rotary embeddings over whole heads, as transformers 5 writes it or, before, without scaling."""
    fields.require_values("rotary positions are not rescaled", rope_scaling=None)
    written = fields.optional("rope_parameters", dict, {})
    if (kind := written.get("rope_type", "default")) != "default":
        raise fields.unsupported(f"rope_parameters has rope_type {kind!r}, and rotary positions are not rescaled")
    if (part := written.get("partial_rotary_factor", 1.0)) != 1:
        raise fields.unsupported(f"rope_parameters rotates {part} of a head; recallax rotates all of it")
    return ConfigFields({"rope_theta": fields.values.get("rope_theta"), **written}).optional(
        "rope_theta", float, 10_000.0
    )


def rope_fields(rope_theta: float | None) -> dict[str, Any]:
    """The fields of rotary positions. Raises ConfigError where there are none."""
    if rope_theta is None:
        raise ConfigError("its attention has no positions, and this layout rotates queries and keys")
    return {"rope_parameters": {"rope_type": "default", "rope_theta": rope_theta}}


def compress_pattern(block_names: Sequence[str]) -> str:
    """The shortest of some patterns for these blocks: whole periods repeated, and runs of one block as `name*n`."""
    period = next(
        n
        for n in range(1, len(block_names) + 1)
        if list(block_names[:n]) * (len(block_names) // n) == list(block_names)
    )
    runs: list[list[str]] = []
    for name in block_names[:period]:
        if runs and runs[-1][0] == name:
            runs[-1].append(name)
        else:
            runs.append([name])
    body = " ".join(run[0] if len(run) == 1 else f"{run[0]}*{len(run)}" for run in runs)
    times = len(block_names) // period
    if times == 1:
        return body
    return f"{body}*{times}" if period == 1 else f"({body})*{times}"
