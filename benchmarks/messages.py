"""Messages and arrays of a comparison, declared once and checked by both sides.

The driver and recallax's side write, the opponent's side reads. Every field, array name, shape and dtype is declared in
this file, and a side that deviates raises `HandoverError` with the difference. Needs Python 3.11 and numpy.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, get_args, get_origin

import numpy as np

PARAMETERS, BATCHES = "parameters.npz", "batches.npz"
"""Files of a training comparison, in the folder of its message."""
INPUTS, RECALLAX_RESULTS = "inputs.npz", "recallax.npz"
"""Files of an op comparison; each opponent names its own file of results."""
CONV_SIZE = 3
"""Taps of the model's short convolution."""
PROJECTION_PATHS = {
    "based": {"q": "query.parts.q", "k": "writer.parts.k", "v": "writer.parts.v", "out": "readout.out"},
    "attention": {"q": "q", "k": "k", "v": "v", "out": "out"},
}
"""Paths of the projections in recallax's parameters, by mixer and by their name in the opponent's model."""


class HandoverError(ValueError):
    """One side of a comparison does not hand over, or does not expect, what is declared."""


class ArraySpec(NamedTuple):
    """Shape and dtype of one array."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def check_arrays(arrays: Mapping[str, Any], specs: Mapping[str, ArraySpec], source: str) -> None:
    """Check the names, shapes and dtypes of arrays.

    Args:
        arrays: NumPy, JAX or PyTorch arrays by name.
        specs: The declared arrays by name.
        source: Where the arrays come from, for the message.

    Raises:
        HandoverError: Lists all missing and unexpected names, wrong shapes and wrong dtypes.
    """
    found = {name: ArraySpec(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in arrays.items()}
    differences = [f"missing: {name} {spec}" for name, spec in specs.items() if name not in found]
    differences += [f"unexpected: {name} {spec}" for name, spec in found.items() if name not in specs]
    differences += [
        f"wrong: {name} is {found[name]}, expected {spec}"
        for name, spec in specs.items()
        if name in found and found[name] != spec
    ]
    if differences:
        raise HandoverError(f"{source}: the arrays differ from those declared:\n  " + "\n  ".join(differences))


def write_arrays(path: Path, arrays: Mapping[str, Any], specs: Mapping[str, ArraySpec]) -> None:
    """Write arrays to an `.npz` file.

    Args:
        path: The file.
        arrays: NumPy or JAX arrays by name.
        specs: The declared arrays by name.

    Raises:
        HandoverError: The arrays are not those declared; nothing is written.
    """
    check_arrays(arrays, specs, f"writing {path.name}")
    np.savez(path, allow_pickle=False, **{name: np.asarray(x) for name, x in arrays.items()})


def read_arrays(path: Path, specs: Mapping[str, ArraySpec]) -> dict[str, np.ndarray]:
    """Read arrays from an `.npz` file.

    Args:
        path: The file.
        specs: The declared arrays by name.

    Returns:
        The arrays by name, in the order of `specs`.

    Raises:
        HandoverError: The arrays in the file are not those declared.
    """
    with np.load(path) as file:
        arrays = dict(file.items())
    check_arrays(arrays, specs, f"reading {path.name}")
    return {name: arrays[name] for name in specs}


@dataclass(frozen=True, kw_only=True)
class Message:
    """A JSON object whose fields are those of the class."""

    FILE: ClassVar[str] = "message.json"
    """The message's file in the folder that both sides read."""

    def encode(self) -> str:
        """Return the message as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Self:
        """Parse a message.

        Args:
            text: JSON, as `encode` returns it.

        Returns:
            The message.

        Raises:
            HandoverError: A field is missing, unexpected or of the wrong type.
        """
        found = json.loads(text)
        if not isinstance(found, dict):
            raise HandoverError(f"{cls.__name__}: expected a JSON object, got {text[:80]}")
        declared = {field.name: field for field in fields(cls)}
        required = [name for name, field in declared.items() if field.default is MISSING]
        differences = [f"missing: {name}" for name in required if name not in found]
        differences += [f"unexpected: {name}" for name in found if name not in declared]
        differences += [
            f"wrong: {name} is {value!r}, expected {declared[name].type}"
            for name, value in found.items()
            if name in declared and not _has_type(value, declared[name].type)
        ]
        if differences:
            raise HandoverError(f"{cls.__name__}: the fields differ from those declared: " + "; ".join(differences))
        return cls(**found)

    def write(self, folder: Path) -> None:
        """Write the message to its file in a folder."""
        (folder / self.FILE).write_text(self.encode())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the message from its file in a folder. Raises HandoverError as `decode` does."""
        return cls.decode((folder / cls.FILE).read_text())


def _has_type(value: object, expected: Any) -> bool:
    if get_origin(expected) is list:
        (item,) = get_args(expected)
        return isinstance(value, list) and all(_has_type(x, item) for x in value)
    if expected is float:
        return type(value) in (int, float)
    return type(value) is expected


@dataclass(frozen=True, kw_only=True)
class StepRequest(Message):
    """The driver's request to a worker."""

    steps: int
    part: str = ""
    """A part of the workload; "" where it has one part only."""


@dataclass(frozen=True, kw_only=True)
class StepReply(Message):
    """A worker's reply, with one entry per step."""

    seconds: list[float]
    cpu_seconds: list[float]
    """Seconds of all threads of the process."""
    readings: list[list[float]]
    """Result of `Workload.read` for each step."""


class Parameter(NamedTuple):
    """One parameter of the model that both sides train."""

    path: str
    """In recallax, its keys joined by dots."""
    name: str
    """In the state dict of the PyTorch model."""
    shape: tuple[int, ...]
    """In recallax."""
    transposed: bool = False
    """Whether PyTorch stores the transpose: kernels are [inputs, outputs], weights of `nn.Linear` [outputs, inputs]."""

    @property
    def opponent_spec(self) -> ArraySpec:
        """Shape and dtype in PyTorch."""
        return ArraySpec(self.shape[::-1] if self.transposed else self.shape)


@dataclass(frozen=True, kw_only=True)
class TrainingMessage(Message):
    """A model and the batches that it is trained on."""

    threads: int
    mixer: str
    """A key of `PROJECTION_PATHS`."""
    vocab_size: int
    length: int
    pairs: int
    """Per row; also the number of labelled positions."""
    steps: int
    """The largest number of steps that the driver requests: so many batches are made beforehand."""
    d_model: int = 64
    batch_size: int = 64
    feature_dim: int = 16
    """Width of BASED's queries and keys."""

    def parameters(self) -> tuple[Parameter, ...]:
        """All parameters of the model."""
        width, conv, mixer = self.d_model, "stack.parts.0", "stack.parts.1"
        key_width = {"based": self.feature_dim, "attention": width}[self.mixer]
        found = [
            Parameter("embedding", "embedding.weight", (self.vocab_size, width)),
            Parameter("norm.scale", "norm.weight", (width,)),
            Parameter(f"{conv}.mixer.taps", "blocks.0.mixer.taps", (CONV_SIZE, width)),
            Parameter(f"{conv}.mixer.bias", "blocks.0.mixer.bias", (width,)),
            Parameter(f"{conv}.mixer.gate.kernel", "blocks.0.mixer.gate.weight", (width, width), transposed=True),
            Parameter(f"{conv}.mixer.gate.bias", "blocks.0.mixer.gate.bias", (width,)),
        ]
        for index, block in enumerate((conv, mixer)):
            for norm in ("mixer_norm", "channel_norm"):
                found.append(Parameter(f"{block}.{norm}.scale", f"blocks.{index}.{norm}.weight", (width,)))
        for name, path in PROJECTION_PATHS[self.mixer].items():
            shape = (width, key_width if name in ("q", "k") else width)
            found.append(
                Parameter(f"{mixer}.mixer.{path}.kernel", f"blocks.1.mixer.{name}.weight", shape, transposed=True)
            )
        return tuple(found)

    def parameter_specs(self) -> dict[str, ArraySpec]:
        """The arrays of `PARAMETERS`, named and shaped as in the opponent's model."""
        return {parameter.name: parameter.opponent_spec for parameter in self.parameters()}

    def to_opponent(self, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Rename and transpose recallax's parameters.

        Args:
            arrays: All parameters of recallax's model by path.

        Returns:
            The parameters of the opponent's model by name.

        Raises:
            HandoverError: recallax's model has other parameters than those declared.
        """
        table = self.parameters()
        specs = {parameter.path: ArraySpec(parameter.shape) for parameter in table}
        check_arrays(arrays, specs, f"recallax's parameters with the mixer {self.mixer}")
        found = {parameter.name: np.asarray(arrays[parameter.path]) for parameter in table}
        return {p.name: np.ascontiguousarray(found[p.name].T) if p.transposed else found[p.name] for p in table}

    def batch_specs(self) -> dict[str, ArraySpec]:
        """The arrays of `BATCHES`: tokens, and positions and ids of the labelled targets."""
        labels = ArraySpec((self.steps, self.batch_size, self.pairs), "int32")
        return {
            "tokens": ArraySpec((self.steps, self.batch_size, self.length), "int32"),
            "positions": labels,
            "targets": labels,
        }


@dataclass(frozen=True, kw_only=True)
class OptimizerMessage(Message):
    """AdamW with clipping by the global norm; weight decay applies to parameters of rank 2 and more."""

    FILE: ClassVar[str] = "optimizer.json"
    learning_rates: list[float]
    """One per step."""
    weight_decay: float
    b1: float
    b2: float
    eps: float
    max_grad_norm: float


@dataclass(frozen=True, kw_only=True)
class OpMessage(Message):
    """An op, named as in `op_benchmarks`, and the sizes of its inputs."""

    threads: int
    op: str
    batch: int
    length: int
    heads: int
    keys: int
    """Width of a key."""
    values: int
    """Width of a value."""

    def input_specs(self) -> dict[str, ArraySpec]:
        """The op's inputs, float32, by name.

        Raises:
            HandoverError: The op has no opponent.
        """
        tokens = (self.batch, self.length, self.heads)
        key, value, gate = ArraySpec((*tokens, self.keys)), ArraySpec((*tokens, self.values)), ArraySpec(tokens)
        if self.op == "gated_delta_net":
            return {"q": key, "k": key, "v": value, "log_decay": gate, "beta": gate}
        if self.op == "mamba2":
            return {"x": value, "dt": gate, "a": ArraySpec((self.heads,)), "b": key, "c": key}
        raise HandoverError(f"no inputs are declared for {self.op}: it is not compared with an opponent")

    def output_spec(self) -> ArraySpec:
        """The op's output, and the output's gradient."""
        return ArraySpec((self.batch, self.length, self.heads, self.values))

    def file_specs(self) -> dict[str, ArraySpec]:
        """The arrays of `INPUTS`: the inputs, and the gradient `d_out` of the output."""
        return self.input_specs() | {"d_out": self.output_spec()}

    def result_specs(self) -> dict[str, ArraySpec]:
        """The arrays of results: the output `out`, and the gradient of each input under the input's name."""
        return {"out": self.output_spec()} | self.input_specs()
