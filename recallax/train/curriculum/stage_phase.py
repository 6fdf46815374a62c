"""Stages of a curriculum as phases of a run: the parameters that train, and those that a stage sets."""

import math
from collections.abc import Mapping
from dataclasses import replace

import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Int

from recallax.config import ConfigError
from recallax.models.parameter_paths import LeafPath
from recallax.train.curriculum.parameter_masks import (
    ParameterMask,
    ParameterNames,
    ParameterShape,
    match_parameters,
    parameter_names,
)
from recallax.train.curriculum.per_parameter_adam import make_masked_optimizer
from recallax.train.curriculum.stages import Curriculum, Ramp, Stage
from recallax.train.phases import Phase
from recallax.train.run_config import RunConfig


class StagePhase(Phase):
    """A stage of a curriculum as a phase of a run.

    Args:
        config: The config of the run, with the task and the loss weights of the stage.
        mask: The parameters that train, and those that are set.
    """

    def __init__(self, config: RunConfig, mask: ParameterMask):
        self.config = config
        self.mask = mask

    def make_optimizer(self, params: nnx.State) -> optax.GradientTransformation:
        return make_masked_optimizer(self.config, params, self.mask.trainable)

    def set_parameters(self, params: dict, phase_step: Int[Array, ""]) -> dict:
        return self.mask.apply_ramps(params, phase_step)

    def stop_gradients(self, params: dict) -> dict:
        return self.mask.stop_frozen_gradients(params)

    def restore_frozen(self, updated: dict, previous: dict) -> dict:
        return self.mask.select(updated, previous)


def resolve_stages(config: RunConfig) -> list[StagePhase]:
    """Return the stages of a run with a curriculum, in order.

    Args:
        config: Config of the run.

    Returns:
        One phase per stage; empty without a curriculum.

    Raises:
        ConfigError: A stage does not fit the model; the message names the stage and the pattern.
    """
    if config.curriculum is None:
        return []
    names, shapes = parameter_names(config.model, config.task.vocab_size)
    return [_resolve_stage(config, stage, names, shapes) for stage in config.curriculum.stages]


def describe_stages(config: RunConfig, curriculum: Curriculum) -> list[str]:
    """Describe the stages of a run.

    Args:
        config: Config of the run.
        curriculum: Its curriculum.

    Returns:
        Lines for each stage: the rule that ends it, the number of trained parameters, the lengths of its rows, and the
        gates that it sets.
    """
    _, shapes = parameter_names(config.model, config.task.vocab_size)
    lines = []
    for number, (stage, phase) in enumerate(zip(curriculum.stages, resolve_stages(config), strict=True), 1):
        trainable = flatten_dict(phase.mask.trainable)
        count = sum(math.prod(shape) for path, (shape, _) in shapes.items() if trainable[path])
        lengths = ", ".join(map(str, phase.config.task.lengths("train")))
        rule = " ".join([type(stage.until).__name__, *(f"{name}={value}" for name, value in vars(stage.until).items())])
        gates = [f"{r.gate} {r.start:g}" + ("" if r.start == r.end else f" to {r.end:g}") for r in stage.ramps]
        lines.append(f"  {number}  {stage.name:<14}{rule}")
        lines.append(f"{'':19}{count:,} parameters train, on rows of {lengths} tokens")
        lines += [f"{'':19}{'; '.join(gates)}"] if gates else []
    return lines


def _resolve_stage(
    config: RunConfig,
    stage: Stage,
    names: Mapping[LeafPath, ParameterNames],
    shapes: Mapping[LeafPath, ParameterShape],
) -> StagePhase:
    ramps = _resolve_ramps(stage, names, shapes)
    selected, frozen = (
        {path for pattern in patterns for path in match_parameters(names, pattern, stage.name)}
        for patterns in (stage.trainable, stage.frozen)
    )
    trainable = {path: path in selected and path not in frozen and path not in ramps for path in names}
    if not any(trainable.values()):
        raise ConfigError(
            f"stage {stage.name!r} trains nothing: all of {list(stage.trainable)} is frozen or ramped; leave some out"
        )
    train = replace(config.train, loss_weights=config.train.loss_weights | stage.loss_weights)
    stage_config = replace(config, task=stage.task or config.task, train=train, curriculum=None)
    return StagePhase(stage_config, ParameterMask(unflatten_dict(trainable), ramps, stage.until.min_duration()))


def _resolve_ramps(
    stage: Stage, names: Mapping[LeafPath, ParameterNames], shapes: Mapping[LeafPath, ParameterShape]
) -> dict[LeafPath, Ramp]:
    """Return the ramps of a stage by the path of the parameter."""
    ramps: dict[LeafPath, Ramp] = {}
    for ramp in stage.ramps:
        for path in match_parameters(names, ramp.gate, stage.name):
            name, layer_shape = names[path].layer_names[0], shapes[path].shape[shapes[path].num_stacked_axes :]
            if math.prod(layer_shape) != 1:
                raise ConfigError(
                    f"stage {stage.name!r} ramps {name}, which has the shape {list(layer_shape)}; a ramped parameter "
                    "must have one number per layer, such as *.gates.attention"
                )
            if path in ramps:
                raise ConfigError(
                    f"stage {stage.name!r} ramps {name} twice, with {ramps[path].gate!r} and {ramp.gate!r}; remove one"
                )
            ramps[path] = ramp
    return ramps
