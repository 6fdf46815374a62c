"""Three parallel mixers on one input, each with a learned gate: Hydra's block without its norm and residual.

    y = g1 ssm(x) + g2 attention(x) + g3 experts(x)         scalar gates that start at `gate_init`

A path can be any recurrent mixer. A path that is `NoChannelMixer` has no gate and adds exactly 0. State: the states of
the paths. Diagnostics: the relative norm |g path(x)| / |x| of each path.
Source: Hydra (arXiv 2508.15099); scalar gates similar to LayerScale, initialised at (0.8, 0.2, 0.5).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import ConfigError
from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer, State
from recallax.layers.dense import parameter
from recallax.layers.no_channel_mixer import NoChannelMixer
from recallax.types import DIAGNOSTIC_PREFIX, Aux, Mean, Precision, SeqInfo, StepInfo, add_aux

PATHS: tuple[str, ...] = ("ssm", "attention", "experts")
"""Names of the paths, which are fields of `Parallel`."""


@dataclass(frozen=True, kw_only=True)
class Parallel(MixerConfig):
    """Gated sum of three parallel mixers (Hydra)."""

    ssm: MixerConfig = NoChannelMixer()
    """First path, usually a state-space model."""
    attention: MixerConfig = NoChannelMixer()
    """Second path, usually attention."""
    experts: MixerConfig = NoChannelMixer()
    """Third path, usually a mixture of experts."""
    gate_init: tuple[float, float, float] = (0.8, 0.2, 0.5)
    """Initial gates of the three paths."""

    def __post_init__(self) -> None:
        if not self.active_paths:
            raise ConfigError(f"every path is NoChannelMixer; give at least one of {', '.join(PATHS)}")
        intervals = {path.landmark_interval for path in self.active_paths.values()} - {None}
        if len(intervals) > 1:
            raise ConfigError(f"paths need landmarks every {sorted(intervals, key=str)} tokens; they must agree")

    @property
    def active_paths(self) -> dict[str, MixerConfig]:
        """Configs of the paths that are not `NoChannelMixer`, by name."""
        paths = {name: getattr(self, name) for name in PATHS}
        return {name: path for name, path in paths.items() if not isinstance(path, NoChannelMixer)}

    @property
    def landmark_interval(self) -> int | None:
        intervals = (path.landmark_interval for path in self.active_paths.values())
        return next((interval for interval in intervals if interval is not None), None)

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "ParallelMixer":
        return ParallelMixer(self, d_model, layer, precision=precision, rngs=rngs)


class ParallelMixer(RecurrentMixer):
    """Gated sum of the outputs of recurrent mixers; each may add auxiliary losses."""

    def __init__(self, config: Parallel, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        paths: dict[str, RecurrentMixer] = {}
        for name, path in config.active_paths.items():
            mixer = path.build(d_model, layer, precision=precision, rngs=rngs)
            if not isinstance(mixer, RecurrentMixer):
                raise ConfigError(
                    f"{type(mixer).__name__} has no state; the path {name} of Parallel must be a recurrent mixer"
                )
            paths[name] = mixer
        self.paths = nnx.Dict(paths)
        gates = dict(zip(PATHS, config.gate_init, strict=True))
        self.gates = nnx.Dict(
            {name: parameter(jnp.asarray(gates[name], precision.param), (), weight_decay=False) for name in paths}
        )
        self.dtype = precision.compute

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        outputs, aux = {}, {}
        for name, path in self.paths.items():
            key = None if seq.key is None else jax.random.fold_in(seq.key, PATHS.index(name))
            outputs[name], path_aux = path(x, seq._replace(key=key))
            aux = add_aux(aux, path_aux)
        return self._gated_sum(outputs), add_aux(aux, self._path_norms(outputs, x, seq))

    def init_state(self, batch: int, max_len: int) -> State:
        return {name: path.init_state(batch, max_len) for name, path in self.paths.items()}

    def prefill(self, x: Float[Array, "B T D"], seq: SeqInfo, state: State) -> tuple[Float[Array, "B T D"], State, Aux]:
        outputs, states, aux = {}, {}, {}
        for name, path in self.paths.items():
            outputs[name], states[name], path_aux = path.prefill(x, seq, state[name])
            aux = add_aux(aux, path_aux)
        return self._gated_sum(outputs), states, add_aux(aux, self._path_norms(outputs, x, seq))

    def step(self, x: Float[Array, "B D"], info: StepInfo, state: State) -> tuple[Float[Array, "B D"], State]:
        outputs, states = {}, {}
        for name, path in self.paths.items():
            outputs[name], states[name] = path.step(x, info, state[name])
        return self._gated_sum(outputs), states

    def _gated_sum(self, outputs: dict[str, Array]) -> Array:
        """Sum the outputs in float32 and round once."""
        total = jnp.zeros(())
        for name, y in outputs.items():
            gate = jnp.broadcast_to(self.gates[name][...].astype(jnp.float32), y.shape)
            total = gate * y.astype(jnp.float32) + jnp.broadcast_to(total, y.shape)
        return total.astype(self.dtype)

    def _path_norms(self, outputs: dict[str, Array], x: Float[Array, "B T D"], seq: SeqInfo) -> Aux:
        """Compute |g path(x)| / |x| of each path, over all tokens that are not padding."""
        valid = jnp.asarray(seq.segment_ids) > 0

        def total_norm(a: Array) -> Array:
            return jnp.sum(jnp.where(valid, jnp.linalg.norm(a.astype(jnp.float32), axis=-1), 0))

        gates = {name: jnp.abs(gate[...].astype(jnp.float32)) for name, gate in self.gates.items()}
        norms = {
            f"{DIAGNOSTIC_PREFIX}{name}_size": Mean(gates[name] * total_norm(y), total_norm(x))
            for name, y in outputs.items()
        }
        return jax.lax.stop_gradient(norms)
