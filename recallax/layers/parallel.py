"""Three mixers side by side on one input, each behind a learned gate: Hydra's block without its norm and residual.

    y = g1 ssm(x) + g2 attention(x) + g3 experts(x)         scalar gates that start at `gate_init`

A path that is `NoChannelMixer` has no gate and adds exactly 0. What stands in a path is free: any mixer with a state. State:
those of the paths. Logged: each path's size beside the input's, |g path| / |x|.
Source: Hydra (arXiv 2508.15099); gates in the manner of LayerScale, started at (.8, .2, .5).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from recallax.config import ConfigError
from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer, State
from recallax.layers.dense import parameter
from recallax.layers.no_channel_mixer import NoChannelMixer
from recallax.types import DIAGNOSTIC_PREFIX, Aux, Mean, Precision, SeqInfo, StepInfo, add_aux

PATHS: tuple[str, ...] = ("ssm", "attention", "experts")


@dataclass(frozen=True, kw_only=True)
class Parallel(MixerConfig):
    """See the head of the file."""

    ssm: MixerConfig = NoChannelMixer()
    attention: MixerConfig = NoChannelMixer()
    experts: MixerConfig = NoChannelMixer()
    gate_init: tuple[float, float, float] = (0.8, 0.2, 0.5)

    def __post_init__(self) -> None:
        if not self.active_paths:
            raise ConfigError(f"every path is Nothing; give at least one of {', '.join(PATHS)}")
        if len(found := {part.landmark_interval for part in self.active_paths.values()} - {None}) > 1:
            raise ConfigError(f"paths want landmarks every {sorted(found, key=str)} tokens; they must agree")

    @property
    def active_paths(self) -> dict[str, MixerConfig]:
        """The paths that are there."""
        named = {name: getattr(self, name) for name in PATHS}
        return {name: part for name, part in named.items() if not isinstance(part, NoChannelMixer)}

    @property
    def grid(self) -> int:
        return math.lcm(*(part.grid for part in self.active_paths.values()))

    @property
    def landmark_interval(self) -> int | None:
        return next(
            (part.landmark_interval for part in self.active_paths.values() if part.landmark_interval is not None), None
        )

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "ParallelMixer":
        return ParallelMixer(self, d_model, layer, precision=precision, rngs=rngs)


class ParallelMixer(RecurrentMixer):
    """See the head of the file."""

    def __init__(self, config: Parallel, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        built: dict[str, RecurrentMixer] = {}
        for name, part in config.active_paths.items():
            mixer = part.build(d_model, layer, precision=precision, rngs=rngs)
            if not isinstance(mixer, RecurrentMixer):
                raise ConfigError(f"{type(mixer).__name__} has no state; the path {name} of Parallel needs one")
            built[name] = mixer
        self.paths = nnx.Dict(built)
        starts = dict(zip(PATHS, config.gate_init, strict=True))
        self.gates = nnx.Dict(
            {name: parameter(jnp.asarray(starts[name], precision.param), (), weight_decay=False) for name in built}
        )
        self.dtype = precision.compute

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        outputs, aux = {}, {}
        for name, path in self.paths.items():
            key = None if seq.key is None else jax.random.fold_in(seq.key, PATHS.index(name))
            outputs[name], more = path(x, seq._replace(key=key))
            aux = add_aux(aux, more)
        return self._gated_sum(outputs), add_aux(aux, self._path_norms(outputs, x, jnp.asarray(seq.segment_ids) > 0))

    def init_state(self, batch: int, max_len: int) -> State:
        return {name: path.init_state(batch, max_len) for name, path in self.paths.items()}

    def prefill(self, x: Float[Array, "B T D"], seq: SeqInfo, state: State) -> tuple[Float[Array, "B T D"], State, Aux]:
        outputs, states, aux = {}, {}, {}
        for name, path in self.paths.items():
            outputs[name], states[name], more = path.prefill(x, seq, state[name])
            aux = add_aux(aux, more)
        return (
            self._gated_sum(outputs),
            states,
            add_aux(aux, self._path_norms(outputs, x, jnp.asarray(seq.segment_ids) > 0)),
        )

    def step(self, x: Float[Array, "B D"], info: StepInfo, state: State) -> tuple[Float[Array, "B D"], State]:
        outputs, states = {}, {}
        for name, path in self.paths.items():
            outputs[name], states[name] = path.step(x, info, state[name])
        return self._gated_sum(outputs), states

    def _gated_sum(self, outputs: dict[str, Array]) -> Array:
        """In float32, rounded once."""
        total = jnp.zeros(())
        for name, y in outputs.items():
            gate = jnp.broadcast_to(self.gates[name][...].astype(jnp.float32), y.shape)
            total = gate * y.astype(jnp.float32) + jnp.broadcast_to(total, y.shape)
        return total.astype(self.dtype)

    def _path_norms(self, outputs: dict[str, Array], x: Float[Array, "B T D"], valid: Bool[Array, "B T"]) -> Aux:
        def size(a: Array) -> Array:
            return jnp.sum(jnp.where(valid, jnp.linalg.norm(a.astype(jnp.float32), axis=-1), 0))

        gates = {name: jnp.abs(gate[...].astype(jnp.float32)) for name, gate in self.gates.items()}
        told = {f"{DIAGNOSTIC_PREFIX}{name}_size": Mean(gates[name] * size(y), size(x)) for name, y in outputs.items()}
        return jax.lax.stop_gradient(told)
