"""A run's model as two compiled programs, prefill and step, that need no code of recallax: StableHLO by `jax.export`.

    prefill.jax, step.jax               what `jax.export.deserialize` reads
    prefill.stablehlo, step.stablehlo   the modules alone, as portable bytecode, for other compilers
    weights.safetensors                 the first argument of both, by name
    programs.json                       shapes and dtypes of all arguments and results

Both run on CPU, CUDA and TPU, since ops take their XLA forms, and for any number of rows. Weights are arguments and not
constants: two programs share them, they may be replaced or sharded, and no file meets the 2 GB at which serialised
modules end.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export
from jaxtyping import Array, Float, Int

from recallax.config import ConfigError, to_json
from recallax.convert.run_conversion import read_run_state
from recallax.convert.safetensors_folder import (
    WeightDict,
    read_json,
    read_safetensors,
    write_folder_atomic,
    write_safetensors,
)
from recallax.models.lm import LM
from recallax.models.lm_head import Autoencoder
from recallax.pallas_kernels import dispatch
from recallax.train.run_folder import write_atomic
from recallax.types import SeqInfo, StepInfo

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM_NAMES = ("prefill", "step")

type NamedArrays = dict[str, Array]


class ExportedPrograms(NamedTuple):
    """What `export_programs` wrote, ready to be called."""

    weights: WeightDict
    prefill: Callable[..., Any]
    """(weights, tokens [B, T], lengths [B], start [B], state): logits after each row's last token, and the state.

    Row b holds lengths[b] >= 1 tokens and padding on the right; they stand at positions from start[b], and 0 starts
    afresh."""
    step: Callable[..., Any]
    """(weights, token [B], position [B], active [B], state): inactive rows keep their state."""
    metadata: dict[str, Any]
    """programs.json."""

    def init_state(self, batch_size: int) -> dict[str, np.ndarray]:
        """The state of rows that have seen nothing."""
        shapes = self.metadata["state"]
        return {
            name: np.zeros([batch_size if n == "b" else n for n in entry["shape"]], entry["dtype"])
            for name, entry in shapes.items()
        }


def export_programs(run_folder: Path, out: Path, *, prefill_length: int, max_len: int) -> None:
    """Write the programs of a run's newest checkpoint to the new folder `out`. Needs the extra `export`.

    length: tokens that one call of prefill takes at most. context: tokens that the state has room for.

    Raises ConfigError where the model cannot decode, and what `read_run_state` and `write_folder_atomic` raise.
    """
    if not 1 <= prefill_length <= max_len:
        raise ConfigError(
            f"prefill_length is {prefill_length} and context {max_len}; both must be at least 1, and length the smaller"
        )
    config, graph, _, params, others = read_run_state(run_folder)
    if isinstance(config.model.lm_head, Autoencoder):
        raise ConfigError("the readout Autoencode reads the end of a whole row, so this model has no step to export")
    flat = flatten_dict(params) | flatten_dict(others)
    weights = {".".join(map(str, path)): np.asarray(leaf) for path, leaf in flat.items()}
    paths = {".".join(map(str, path)): path for path in flat}

    def model(named: Mapping[str, Array]) -> LM:
        leaves = {paths[name]: leaf for name, leaf in named.items()}
        return nnx.merge(graph, *(unflatten_dict({p: leaves[p] for p in flatten_dict(of)}) for of in (params, others)))

    programs, shapes = _export_prefill_and_step(model, weights, prefill_length, max_len)
    described = {
        "model": to_json(config.model),
        "vocab_size": config.model.vocab_size or config.task.vocab_size,
        "length": prefill_length,
        "context": max_len,
        "platforms": list(PLATFORMS),
        "rows": "b is any number of rows",
        "prefill": "(weights, tokens [b, length] int32, lengths [b] int32, start [b] int32, state) -> (logits, state)",
        "step": "(weights, token [b] int32, position [b] int32, active [b] bool, state) -> (logits, state)",
        "state": shapes,
    }

    def fill(folder: Path) -> None:
        write_safetensors(folder / "weights.safetensors", weights)
        for name, program in programs.items():
            (folder / f"{name}.jax").write_bytes(program.serialize())
            (folder / f"{name}.stablehlo").write_bytes(program.mlir_module_serialized)
        write_atomic(folder / "programs.json", json.dumps(described, indent=1) + "\n")

    write_folder_atomic(out, fill)


def load_programs(folder: Path) -> ExportedPrograms:
    """Raises WeightsError where a file is missing or unsound. Running the programs runs what the folder holds."""
    described = read_json(folder / "programs.json")
    prefill, step = (export.deserialize(bytearray((folder / f"{name}.jax").read_bytes())) for name in PROGRAM_NAMES)
    return ExportedPrograms(read_safetensors(folder / "weights.safetensors"), prefill.call, step.call, described)


def _export_prefill_and_step(
    model: Callable[[Mapping[str, Array]], LM], weights: WeightDict, prefill_length: int, max_len: int
) -> tuple[dict[str, export.Exported], dict[str, Any]]:
    """The programs by name, and shape and dtype of every array of the state."""
    given = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    (rows,) = export.symbolic_shape("b")

    def empty(named: NamedArrays, token: Int[Array, " B"]) -> Any:
        return model(named).init_state(token.shape[0], max_len)

    def prefill(
        named: NamedArrays,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        start: Int[Array, " B"],
        state: NamedArrays,
    ) -> tuple[Float[Array, "B V"], NamedArrays]:
        places = jnp.arange(prefill_length)[None]
        segments = (places < lengths[:, None]).astype(jnp.int32)
        seq = SeqInfo(start[:, None] + places, segments, jnp.zeros(tokens.shape, bool))
        at = jnp.maximum(lengths[:, None] - 1, 0)
        logits, after, _ = model(named).prefill(tokens, seq, tree.unflatten(state[name] for name in names), at)
        return logits[:, 0], dict(zip(names, jax.tree.leaves(after), strict=True))

    def step(
        named: NamedArrays, token: Int[Array, " B"], position: Int[Array, " B"], active: Array, state: NamedArrays
    ) -> tuple[Float[Array, "B V"], NamedArrays]:
        before = tree.unflatten(state[name] for name in names)
        logits, after = model(named).step(token, StepInfo(position, active), before)
        return logits, dict(zip(names, jax.tree.leaves(after), strict=True))

    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    tokens, active = jax.ShapeDtypeStruct((rows, prefill_length), jnp.int32), jax.ShapeDtypeStruct((rows,), bool)
    with dispatch.xla_only():
        leaves = jax.eval_shape(empty, given, row)
        tree = jax.tree.structure(leaves)
        found = jax.tree_util.tree_leaves_with_path(leaves)
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in found]
        state = dict(zip(names, [leaf for _, leaf in found], strict=True))
        programs = {
            "prefill": export.export(jax.jit(prefill), platforms=PLATFORMS)(given, tokens, row, row, state),
            "step": export.export(jax.jit(step), platforms=PLATFORMS)(given, row, row, active, state),
        }
    shapes = {
        name: {"shape": [n if isinstance(n, int) else str(n) for n in leaf.shape], "dtype": leaf.dtype.name}
        for name, leaf in state.items()
    }
    return programs, shapes
