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
from recallax.models.lm import LM
from recallax.models.readout import Autoencode
from recallax.pallas_kernels import dispatch
from recallax.train.export import read_state
from recallax.train.run_folder import write_atomic
from recallax.train.weights_folder import Weights, read_json, read_safetensors, write_folder, write_safetensors
from recallax.types import SeqInfo, StepInfo

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAMS = ("prefill", "step")

type Named = dict[str, Array]


class Programs(NamedTuple):
    """What `export_programs` wrote, ready to be called."""

    weights: Weights
    prefill: Callable[..., Any]
    """(weights, tokens [B, T], lengths [B], start [B], state): logits after each row's last token, and the state.

    Row b holds lengths[b] >= 1 tokens and padding on the right; they stand at positions from start[b], and 0 starts
    afresh."""
    step: Callable[..., Any]
    """(weights, token [B], position [B], active [B], state): inactive rows keep their state."""
    described: dict[str, Any]
    """programs.json."""

    def empty(self, rows: int) -> dict[str, np.ndarray]:
        """The state of rows that have seen nothing."""
        shapes = self.described["state"]
        return {
            name: np.zeros([rows if n == "b" else n for n in entry["shape"]], entry["dtype"])
            for name, entry in shapes.items()
        }


def export_programs(run: Path, out: Path, *, length: int, context: int) -> None:
    """Write the programs of a run's newest checkpoint to the new folder `out`. Needs the extra `export`.

    length: tokens that one call of prefill takes at most. context: tokens that the state has room for.

    Raises ConfigError where the model cannot decode, and what `read_state` and `write_folder` raise.
    """
    if not 1 <= length <= context:
        raise ConfigError(f"length is {length} and context {context}; both must be at least 1, and length the smaller")
    config, graph, _, params, others = read_state(run)
    if isinstance(config.model.readout, Autoencode):
        raise ConfigError("the readout Autoencode reads the end of a whole row, so this model has no step to export")
    flat = flatten_dict(params) | flatten_dict(others)
    weights = {".".join(map(str, path)): np.asarray(leaf) for path, leaf in flat.items()}
    paths = {".".join(map(str, path)): path for path in flat}

    def model(named: Mapping[str, Array]) -> LM:
        leaves = {paths[name]: leaf for name, leaf in named.items()}
        return nnx.merge(graph, *(unflatten_dict({p: leaves[p] for p in flatten_dict(of)}) for of in (params, others)))

    programs, shapes = _exported(model, weights, length, context)
    described = {
        "model": to_json(config.model),
        "vocab_size": config.model.vocab_size or config.task.vocab_size,
        "length": length,
        "context": context,
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

    write_folder(out, fill)


def load_programs(folder: Path) -> Programs:
    """Raises WeightsError where a file is missing or unsound. Running the programs runs what the folder holds."""
    described = read_json(folder / "programs.json")
    prefill, step = (export.deserialize(bytearray((folder / f"{name}.jax").read_bytes())) for name in PROGRAMS)
    return Programs(read_safetensors(folder / "weights.safetensors"), prefill.call, step.call, described)


def _exported(
    model: Callable[[Mapping[str, Array]], LM], weights: Weights, length: int, context: int
) -> tuple[dict[str, export.Exported], dict[str, Any]]:
    """The programs by name, and shape and dtype of every array of the state."""
    given = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    (rows,) = export.symbolic_shape("b")

    def empty(named: Named, token: Int[Array, " B"]) -> Any:
        return model(named).init_state(token.shape[0], context)

    def prefill(
        named: Named, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], start: Int[Array, " B"], state: Named
    ) -> tuple[Float[Array, "B V"], Named]:
        places = jnp.arange(length)[None]
        segments = (places < lengths[:, None]).astype(jnp.int32)
        seq = SeqInfo(start[:, None] + places, segments, jnp.zeros(tokens.shape, bool))
        at = jnp.maximum(lengths[:, None] - 1, 0)
        logits, after, _ = model(named).prefill(tokens, seq, tree.unflatten(state[name] for name in names), at)
        return logits[:, 0], dict(zip(names, jax.tree.leaves(after), strict=True))

    def step(
        named: Named, token: Int[Array, " B"], position: Int[Array, " B"], active: Array, state: Named
    ) -> tuple[Float[Array, "B V"], Named]:
        before = tree.unflatten(state[name] for name in names)
        logits, after = model(named).step(token, StepInfo(position, active), before)
        return logits, dict(zip(names, jax.tree.leaves(after), strict=True))

    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    tokens, active = jax.ShapeDtypeStruct((rows, length), jnp.int32), jax.ShapeDtypeStruct((rows,), bool)
    with dispatch.portable():
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
