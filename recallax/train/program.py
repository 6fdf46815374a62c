"""A config made executable: the model's graph, the compiled step and evaluation, and where the state lies."""

import copy
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from recallax.layers.base import Statistic
from recallax.models import accounting
from recallax.tasks.base import Split
from recallax.train.curriculum.parameter_masks import ResolvedStage, resolve_stages
from recallax.train.curriculum.stages import INITIAL_CURRICULUM_STATE, CurriculumState
from recallax.train.evaluate import Evaluator, evaluate, make_evaluator
from recallax.train.mesh import batch_sharding, make_mesh, shard_batch, state_shardings
from recallax.train.optimizer import learning_rate_schedule, logical_axes, make_optimizer
from recallax.train.run_config import RunConfig
from recallax.train.step import StepMetrics, TrainState, make_step
from recallax.types import Batch

type StepFn = Callable[..., tuple[TrainState, StepMetrics]]


class Program:
    """What a run executes; holds no state of its own besides compiled functions."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.mesh = make_mesh(config)
        self.batch_sharding = batch_sharding(self.mesh)
        self._replicated = NamedSharding(self.mesh, PartitionSpec())
        self.learning_rate = learning_rate_schedule(config)
        model = accounting.abstract_model(config.model, config.task.vocab_size)
        self.graphdef, params, _ = nnx.split(model, nnx.Param, Statistic)
        self.stages = resolve_stages(config)
        """The stages of the run; a single one without a curriculum."""
        optimizers = [
            make_optimizer(config, params, None if part is None else part.trainable) for _, part in self.stages
        ]
        self._optimizer = optimizers[0]
        shapes = jax.eval_shape(self._init_state)
        self._shardings = state_shardings(self.mesh, shapes, logical_axes(params), self._optimizer)
        self.abstract_state: TrainState = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self._shardings,
        )
        """Shapes, dtypes and shardings of the state."""
        self.leaf_names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes.params)]
        self._step_fns = [self._compile_step(*both) for both in zip(self.stages, optimizers, strict=True)]
        self._evaluators: dict[tuple[int | None, Split], Evaluator] = {}

    def init_state(self) -> TrainState:
        """The state at step 0, a function of the config's seed alone."""
        return jax.jit(self._init_state, out_shardings=self._shardings)()

    def init_state_from(self, params: dict, statistics: dict) -> TrainState:
        """The state at step 0 of a run that begins with these parameters in place of its own."""
        return jax.jit(self._state_from_params, out_shardings=self._shardings)(params, statistics)

    def batch(self, index: int, stage: int = 0) -> Batch:
        """Train batch number `index`, as numpy."""
        train = self.config.train
        return self.stages[stage].config.task.batch(train.data_seed, "train", index, train.batch_size)

    def step(
        self, state: TrainState, batch: Batch, curriculum_state: CurriculumState = INITIAL_CURRICULUM_STATE
    ) -> tuple[TrainState, StepMetrics]:
        """One optimizer step on a numpy batch; the given state's buffers are used up."""
        step, begin = self._step_fns[curriculum_state.stage_index], np.int32(curriculum_state.start_step)
        more = () if self.config.curriculum is None else (begin,)
        return step(state, shard_batch(batch, self.batch_sharding), *more)

    def check_stages(self) -> None:
        """Trace the step of every stage, so that one that cannot run says so before the first has begun."""
        for stage, step in enumerate(self._step_fns if self.config.curriculum is not None else []):
            jax.eval_shape(step, self.abstract_state, self.batch(0, stage), np.int32(0))

    def evaluate(
        self, state: TrainState, split: Split, batches: int | None = None, stage: int | None = None
    ) -> dict[str, float]:
        """Exact weighted means over the first batches of a split (`RunConfig.evaluate` says how many).

        stage: of the task of that stage instead of the run's.
        """
        task = self.config.task if stage is None else self.stages[stage].config.task
        if (stage, split) not in self._evaluators:
            self._evaluators[stage, split] = make_evaluator(self.graphdef, task, split, self._replicated)
        return evaluate(
            self._evaluators[stage, split],
            state.params,
            state.statistics,
            task,
            split,
            seed=self.config.train.data_seed,
            batches=batches or self.config.evaluate.batches,
            batch_size=self.config.evaluate.batch_size,
            sharding=self.batch_sharding,
        )

    def with_seeds_of(self, config: RunConfig) -> "Program":
        """The same compiled functions for a config that differs in its seeds alone, of which they know nothing."""
        other = copy.copy(self)
        other.config = config
        return other

    def vmapped_step(self) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
        """The step of several states at once, each on its own batch; all leaves have a leading axis, of one device."""
        return jax.jit(jax.vmap(make_step(self.config, self.graphdef, self._optimizer)), donate_argnums=0)

    def _compile_step(self, stage: ResolvedStage, optimizer: optax.GradientTransformation) -> StepFn:
        more = () if stage.mask is None else (self._replicated,)
        return jax.jit(
            make_step(stage.config, self.graphdef, optimizer, stage.mask),
            in_shardings=(self._shardings, self.batch_sharding, *more),
            out_shardings=(self._shardings, self._replicated),  # every process reads the whole report
            donate_argnums=0,
        )

    def _init_state(self) -> TrainState:
        key = jax.random.key(self.config.train.seed)
        model = self.config.model.build(nnx.Rngs(jax.random.fold_in(key, 0)), self.config.task.vocab_size)
        _, params, statistics = nnx.split(model, nnx.Param, Statistic)
        return self._state_from_params(nnx.to_pure_dict(params), nnx.to_pure_dict(statistics))

    def _state_from_params(self, params: dict, statistics: dict) -> TrainState:
        key = jax.random.key(self.config.train.seed)
        zero = jnp.zeros((), jnp.int32)
        moments = self._optimizer.init(params)
        return TrainState(zero, params, statistics, moments, jax.random.fold_in(key, 1), zero, zero)
