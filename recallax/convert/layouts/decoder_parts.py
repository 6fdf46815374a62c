"""Parts that the decoders of transformers share: embedding, norms, head and gated MLP, their fields and their keys.

Each function that reads fields of a config.json (`*_config`) has a counterpart that writes them from a module
(`*_fields`). Functions named `*_entries` return the key map entries of a part, from the module `source` of the
checkpoint to the module `target` of recallax.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from recallax.config import ConfigError
from recallax.convert.array_transforms import TRANSPOSE, add_offset, chain, concat_first_axis
from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import KeyMapEntry, linear_entry, parameter_entry
from recallax.layers import SwiGLU
from recallax.layers.matrix_memory import MatrixCell
from recallax.layers.memory import MemoryMixer
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig
from recallax.models.lm_head import LMHead, Tied, TiedModule, Untied
from recallax.models.pattern import compress_pattern


def lm_head_config(fields: ConfigFields, tied_by_default: bool = False) -> LMHead:
    """Read whether the language model head shares the embedding.

    Args:
        fields: The fields of config.json.
        tied_by_default: The layout's default.

    Returns:
        The config of the language model head.
    """
    return Tied() if fields.optional("tie_word_embeddings", bool, tied_by_default) else Untied()


def uniform_model_config(
    fields: ConfigFields,
    block: Block,
    num_layers: int,
    norm_eps: float,
    *,
    name: str = "layer",
    tied_by_default: bool = False,
) -> LMConfig:
    """Read the config of a model whose layers have one block config.

    Args:
        fields: The fields of config.json.
        block: The block.
        num_layers: The number of layers.
        norm_eps: The epsilon of the norms.
        name: The name of the block in the pattern.
        tied_by_default: The layout's default for sharing the embedding with the language model head.

    Returns:
        The model config.
    """
    return LMConfig(
        d_model=fields.required("hidden_size", int),
        vocab_size=fields.required("vocab_size", int),
        pattern=compress_pattern([name] * num_layers),
        blocks={name: block},
        lm_head=lm_head_config(fields, tied_by_default),
        norm_eps=norm_eps,
    )


def padded_vocab_size(fields: ConfigFields, default_multiple: int) -> int:
    """Read the number of rows of the embedding.

    Args:
        fields: The fields of config.json.
        default_multiple: The multiple where `pad_vocab_size_multiple` is missing.

    Returns:
        `vocab_size`, rounded up to a multiple of `pad_vocab_size_multiple`.
    """
    multiple = fields.optional("pad_vocab_size_multiple", int, default_multiple)
    return -(-fields.required("vocab_size", int) // multiple) * multiple


def embedding_fields(model: LM, num_layers: int) -> dict[str, Any]:
    """Write the fields of the embedding and the language model head, without special tokens.

    Args:
        model: The model.
        num_layers: The number of its layers.

    Returns:
        Fields of config.json.
    """
    vocab_size, d_model = model.embedding.shape
    return {
        "vocab_size": vocab_size,
        "hidden_size": d_model,
        "num_hidden_layers": num_layers,
        "tie_word_embeddings": isinstance(model.readout, TiedModule),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def collect_modules[M: nnx.Module](layers: Sequence[nnx.Module], attribute: str, expected_type: type[M]) -> list[M]:
    """Return one submodule of each layer.

    Args:
        layers: Layers, or mixers of layers.
        attribute: The submodule's name.
        expected_type: The type that all submodules must have.

    Returns:
        The submodules in order.

    Raises:
        ConfigError: If a submodule has another type.
    """
    modules = [getattr(layer, attribute) for layer in layers]
    for number, module in enumerate(modules):
        if not isinstance(module, expected_type):
            raise ConfigError(
                f"layer {number} has the {attribute} {type(module).__name__}; this layout supports only "
                f"{expected_type.__name__}"
            )
    return modules


def collect_cells[C: MatrixCell](layers: Sequence[BlockModule], cell_class: type[C]) -> list[C]:
    """Return the memory cell of each layer.

    Args:
        layers: The layers.
        cell_class: The class that all cells must have.

    Returns:
        The cells in order.

    Raises:
        ConfigError: If a layer has another mixer or another cell.
    """
    return collect_modules(collect_modules(layers, "mixer", MemoryMixer), "cell", cell_class)


def integer_ratio(intermediate_size: int, d_model: int) -> int:
    """Return an inner width as a multiple of the model's width.

    Args:
        intermediate_size: The inner width.
        d_model: The model's width.

    Returns:
        `intermediate_size / d_model`.

    Raises:
        ConfigError: If the ratio is not an integer.
    """
    if intermediate_size % d_model:
        raise ConfigError(
            f"the inner width {intermediate_size} is not a multiple of d_model {d_model}, as this layout requires"
        )
    return intermediate_size // d_model


def embedding_and_head_entries(model: LMConfig, embedding: str, norm: str, offset: float = 0.0) -> list[KeyMapEntry]:
    """Map the embedding, the final norm and the language model head.

    Args:
        model: The model config.
        embedding: The source module of the embedding.
        norm: The source module of the final norm.
        offset: The source norm multiplies by offset + weight.

    Returns:
        The entries.
    """
    entries = [parameter_entry(f"{embedding}.weight", "embedding"), norm_entry(norm, "norm", offset)]
    return entries if model.lm_head == Tied() else [*entries, linear_entry("lm_head", "readout")]


def norm_entry(source: str, target: str, offset: float = 0.0) -> KeyMapEntry:
    """Map the scale of a norm.

    Args:
        source: The source module.
        target: The recallax module.
        offset: The source norm multiplies by offset + weight.

    Returns:
        The entry.
    """
    return parameter_entry(f"{source}.weight", f"{target}.scale", *([add_offset(offset)] if offset else []))


def swiglu_config(fields: ConfigFields) -> SwiGLU:
    """Read the gated MLP without biases.

    Args:
        fields: The fields of config.json.

    Returns:
        The channel mixer config.
    """
    fields.require_values("the gate of the MLP is silu", hidden_act="silu")
    return SwiGLU(intermediate_size=fields.required("intermediate_size", int))


def swiglu_fields(channel: SwiGLUMixer) -> dict[str, Any]:
    """Write the fields of the gated MLP.

    Args:
        channel: The module.

    Returns:
        Fields of config.json.
    """
    return {"intermediate_size": channel.out.kernel.shape[0], "hidden_act": "silu"}


def swiglu_entries(intermediate_size: int, source: str, target: str) -> list[KeyMapEntry]:
    """Map the gated MLP. Recallax concatenates the gate and the input projection in one kernel.

    Args:
        intermediate_size: The inner width.
        source: The source module.
        target: The recallax module.

    Returns:
        The entries.
    """
    gate_and_up = (f"{source}.gate_proj.weight", f"{source}.up_proj.weight")
    concat = chain(concat_first_axis(intermediate_size, intermediate_size), TRANSPOSE)
    return [
        KeyMapEntry(gate_and_up, (f"{target}.up.kernel",), concat),
        linear_entry(f"{source}.down_proj", f"{target}.out"),
    ]


def block_norm_entries(source: str, target: str, offset: float = 0.0) -> list[KeyMapEntry]:
    """Map the norms before the two sublayers of a layer.

    Args:
        source: The source layer.
        target: The recallax block.
        offset: The source norms multiply by offset + weight.

    Returns:
        The entries.
    """
    return [
        norm_entry(f"{source}.input_layernorm", f"{target}.mixer_norm", offset),
        norm_entry(f"{source}.post_attention_layernorm", f"{target}.channel_norm", offset),
    ]
