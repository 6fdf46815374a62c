"""Export of a run's model as two StableHLO programs, prefill and step, which run without recallax.

    prefill.jax, step.jax               input of `jax.export.deserialize`
    prefill.stablehlo, step.stablehlo   the modules alone, as portable bytecode, for other compilers
    weights.safetensors                 the first argument of both programs, by name
    programs.json                       shapes and dtypes of all arguments and results

Both programs support CPU, CUDA and TPU, since every op uses its XLA implementation, and any number of rows. Weights are
arguments and not constants: the programs share them, they can be replaced or sharded, and no file reaches the limit of
2 GB for serialised modules.
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
from jaxtyping import Array, Bool, Float, Int

from recallax.atomic_files import write_atomic
from recallax.config import ConfigError, to_json
from recallax.convert.run_weights import RunState, read_run_state
from recallax.convert.safetensors_file import MAX_HEADER_BYTES, WeightDict, read_safetensors, write_safetensors
from recallax.convert.weights_folder import read_json, write_folder_atomic
from recallax.models.lm import LM
from recallax.models.lm_head import Autoencoder
from recallax.pallas_kernels import dispatch
from recallax.train.run_config import RunConfig
from recallax.types import SeqInfo, StepInfo

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM_NAMES = ("prefill", "step")
WEIGHTS_FILE, METADATA_FILE = "weights.safetensors", "programs.json"
BATCH_SYMBOL = "b"
"""The symbolic number of rows in shapes."""

type NamedArrays = dict[str, Array]
type ModelFactory = Callable[[Mapping[str, Array]], LM]


class ExportedPrograms(NamedTuple):
    """Exported programs, ready to be called."""

    weights: WeightDict
    """The first argument of both programs."""
    prefill: Callable[..., Any]
    """(weights, tokens [B, T], lengths [B], start [B], state) -> (float32 logits after each row's last token, state).

    Row b contains lengths[b] >= 1 tokens and padding on the right, at positions from start[b]; position 0 resets the
    state."""
    step: Callable[..., Any]
    """(weights, token [B], position [B], active [B], state) -> (float32 logits, state). Inactive rows keep it."""
    metadata: dict[str, Any]
    """The content of programs.json."""

    def init_state(self, batch_size: int) -> dict[str, np.ndarray]:
        """Return the state before any token.

        Args:
            batch_size: The number of rows.

        Returns:
            Zeros by name.
        """
        return {
            name: np.zeros([batch_size if n == BATCH_SYMBOL else n for n in entry["shape"]], entry["dtype"])
            for name, entry in self.metadata["state"].items()
        }


def export_programs(run_folder: Path, out: Path, *, prefill_length: int, max_len: int) -> None:
    """Write the programs of a run's newest checkpoint to a new folder. Needs `recallax[export]`.

    Args:
        run_folder: The run's folder.
        out: The new folder.
        prefill_length: Tokens per row of one call of prefill.
        max_len: Largest number of tokens per row, which bounds the state.

    Raises:
        ConfigError: If the lengths are invalid or the model cannot decode.
        WeightsError: If the folder exists or cannot be written.
        RunFolderError: If the run has no checkpoint.
        CheckpointError: If the checkpoint cannot be read.
    """
    if not 1 <= prefill_length <= max_len:
        raise ConfigError(f"prefill_length is {prefill_length}; it must be from 1 to max_len, which is {max_len}")
    run = read_run_state(run_folder)
    if isinstance(run.config.model.lm_head, Autoencoder):
        raise ConfigError("the Autoencoder head reads the end of a whole row, so this model has no step to export")
    make_model, weights = _functional_model(run)
    programs, state_shapes = _export_prefill_and_step(make_model, weights, prefill_length, max_len)
    metadata = _programs_metadata(run.config, prefill_length, max_len, state_shapes)

    def write_files(folder: Path) -> None:
        write_safetensors(folder / WEIGHTS_FILE, weights)
        for name, program in programs.items():
            (folder / f"{name}.jax").write_bytes(program.serialize())
            (folder / f"{name}.stablehlo").write_bytes(program.mlir_module_serialized)
        write_atomic(folder / METADATA_FILE, json.dumps(metadata, indent=1) + "\n")

    write_folder_atomic(out, write_files)


def load_programs(folder: Path) -> ExportedPrograms:
    """Load exported programs. Calling them executes the code in the folder.

    Args:
        folder: A folder that `export_programs` wrote.

    Returns:
        The programs and their weights.

    Raises:
        WeightsError: If the weights or the metadata are missing or malformed.
    """
    metadata = read_json(folder / METADATA_FILE, MAX_HEADER_BYTES)
    prefill, step = (export.deserialize(bytearray((folder / f"{name}.jax").read_bytes())) for name in PROGRAM_NAMES)
    return ExportedPrograms(read_safetensors(folder / WEIGHTS_FILE), prefill.call, step.call, metadata)


def _functional_model(run: RunState) -> tuple[ModelFactory, WeightDict]:
    """Return a function from named weights to the model, and the run's weights."""
    parts = [flatten_dict(part) for part in (run.params, run.statistics)]
    names = {path: ".".join(map(str, path)) for part in parts for path in part}
    weights = {names[path]: np.asarray(leaf) for part in parts for path, leaf in part.items()}

    def make_model(named: Mapping[str, Array]) -> LM:
        states = (unflatten_dict({path: named[names[path]] for path in part}) for part in parts)
        return nnx.merge(run.graphdef, *states)

    return make_model, weights


def _programs_metadata(
    config: RunConfig, prefill_length: int, max_len: int, state_shapes: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of programs.json."""
    return {
        "model": to_json(config.model),
        "vocab_size": config.model.vocab_size or config.task.vocab_size,
        "length": prefill_length,
        "context": max_len,
        "platforms": list(PLATFORMS),
        "rows": f"{BATCH_SYMBOL} is any number of rows",
        "prefill": "(weights, tokens [b, length] int32, lengths [b] int32, start [b] int32, state) -> (logits, state)",
        "step": "(weights, token [b] int32, position [b] int32, active [b] bool, state) -> (logits, state)",
        "state": state_shapes,
    }


def _export_prefill_and_step(
    make_model: ModelFactory, weights: WeightDict, prefill_length: int, max_len: int
) -> tuple[dict[str, export.Exported], dict[str, Any]]:
    """Return the programs by name, and the shape and dtype of every array of the state."""
    (batch,) = export.symbolic_shape(BATCH_SYMBOL)
    weight_specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    token_spec = jax.ShapeDtypeStruct((batch, prefill_length), jnp.int32)
    active_spec = jax.ShapeDtypeStruct((batch,), bool)

    def init_state(named: NamedArrays, token: Int[Array, " B"]) -> Any:
        return make_model(named).init_state(token.shape[0], max_len)

    with dispatch.xla_only():
        state_tree = jax.eval_shape(init_state, weight_specs, row)
        paths = jax.tree_util.tree_leaves_with_path(state_tree)
        state = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
        prefill, step = _prefill_and_step(make_model, jax.tree.structure(state_tree), list(state))
        programs = {
            "prefill": export.export(jax.jit(prefill), platforms=PLATFORMS)(weight_specs, token_spec, row, row, state),
            "step": export.export(jax.jit(step), platforms=PLATFORMS)(weight_specs, row, row, active_spec, state),
        }
    shapes = {
        name: {"shape": [n if isinstance(n, int) else str(n) for n in leaf.shape], "dtype": leaf.dtype.name}
        for name, leaf in state.items()
    }
    return programs, shapes


def _prefill_and_step(
    make_model: ModelFactory, tree: Any, names: list[str]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the functions to export, whose state is a dictionary with one entry per leaf of `tree`."""

    def from_named(state: NamedArrays) -> Any:
        return tree.unflatten(state[name] for name in names)

    def to_named(state: Any) -> NamedArrays:
        return dict(zip(names, jax.tree.leaves(state), strict=True))

    def prefill(
        weights: NamedArrays,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        start: Int[Array, " B"],
        state: NamedArrays,
    ) -> tuple[Float[Array, "B V"], NamedArrays]:
        index = jnp.arange(tokens.shape[1])[None]
        segment_ids = (index < lengths[:, None]).astype(jnp.int32)
        seq = SeqInfo(start[:, None] + index, segment_ids, jnp.zeros(tokens.shape, bool))
        last = jnp.maximum(lengths[:, None] - 1, 0)
        logits, new_state, _ = make_model(weights).prefill(tokens, seq, from_named(state), last)
        return logits[:, 0], to_named(new_state)

    def step(
        weights: NamedArrays,
        token: Int[Array, " B"],
        position: Int[Array, " B"],
        active: Bool[Array, " B"],
        state: NamedArrays,
    ) -> tuple[Float[Array, "B V"], NamedArrays]:
        logits, new_state = make_model(weights).step(token, StepInfo(position, active), from_named(state))
        return logits, to_named(new_state)

    return prefill, step
