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
from recallax.train.curriculum import START, Standing
from recallax.train.evaluate import Evaluator, evaluate, make_evaluator
from recallax.train.mesh import batch_sharding, make_mesh, place, state_shardings
from recallax.train.optimizer import logical_axes, make_optimizer, schedule
from recallax.train.run import RunConfig
from recallax.train.stages import Lesson, lessons
from recallax.train.step import StepReport, TrainState, make_step
from recallax.types import Batch

type Step = Callable[..., tuple[TrainState, StepReport]]


class Program:
    """What a run executes; holds no state of its own besides compiled functions."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.mesh = make_mesh(config)
        self.rows = batch_sharding(self.mesh)
        self._whole = NamedSharding(self.mesh, PartitionSpec())
        self.learning_rate = schedule(config)
        model = accounting.abstract_model(config.model, config.task.vocab_size)
        self.graph, params, _ = nnx.split(model, nnx.Param, Statistic)
        self.lessons = lessons(config)
        """The stages of the run; a single one without a curriculum."""
        optimizers = [make_optimizer(config, params, None if part is None else part.trains) for _, part in self.lessons]
        self._optimizer = optimizers[0]
        shapes = jax.eval_shape(self._initial)
        self._shardings = state_shardings(self.mesh, shapes, logical_axes(params), self._optimizer)
        self.abstract: TrainState = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self._shardings,
        )
        """Shapes, dtypes and shardings of the state."""
        self.leaf_names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes.params)]
        self._steps = [self._compiled(*both) for both in zip(self.lessons, optimizers, strict=True)]
        self._evaluators: dict[tuple[int | None, Split], Evaluator] = {}

    def initial(self) -> TrainState:
        """The state at step 0, a function of the config's seed alone."""
        return jax.jit(self._initial, out_shardings=self._shardings)()

    def beginning(self, params: dict, statistics: dict) -> TrainState:
        """The state at step 0 of a run that begins with these parameters in place of its own."""
        return jax.jit(self._begun, out_shardings=self._shardings)(params, statistics)

    def batch(self, index: int, stage: int = 0) -> Batch:
        """Train batch number `index`, as numpy."""
        train = self.config.train
        return self.lessons[stage].config.task.batch(train.data_seed, "train", index, train.batch_size)

    def step(self, state: TrainState, batch: Batch, standing: Standing = START) -> tuple[TrainState, StepReport]:
        """One optimizer step on a numpy batch; the given state's buffers are used up."""
        step, begin = self._steps[standing.stage], np.int32(standing.begin)
        more = () if self.config.curriculum is None else (begin,)
        return step(state, place(batch, self.rows), *more)

    def check_stages(self) -> None:
        """Trace the step of every stage, so that one that cannot run says so before the first has begun."""
        for stage, step in enumerate(self._steps if self.config.curriculum is not None else []):
            jax.eval_shape(step, self.abstract, self.batch(0, stage), np.int32(0))

    def evaluate(
        self, state: TrainState, split: Split, batches: int | None = None, stage: int | None = None
    ) -> dict[str, float]:
        """Exact weighted means over the first batches of a split (`RunConfig.evaluate` says how many).

        stage: of the task of that stage instead of the run's.
        """
        task = self.config.task if stage is None else self.lessons[stage].config.task
        if (stage, split) not in self._evaluators:
            self._evaluators[stage, split] = make_evaluator(self.graph, task, split, self._whole)
        return evaluate(
            self._evaluators[stage, split],
            state.params,
            state.statistics,
            task,
            split,
            seed=self.config.train.data_seed,
            batches=batches or self.config.evaluate.batches,
            batch_size=self.config.evaluate.batch_size,
            sharding=self.rows,
        )

    def reseeded(self, config: RunConfig) -> "Program":
        """The same compiled functions for a config that differs in its seeds alone, of which they know nothing."""
        other = copy.copy(self)
        other.config = config
        return other

    def many(self) -> Callable[[TrainState, Batch], tuple[TrainState, StepReport]]:
        """The step of several states at once, each on its own batch; all leaves have a leading axis, of one device."""
        return jax.jit(jax.vmap(make_step(self.config, self.graph, self._optimizer)), donate_argnums=0)

    def _compiled(self, lesson: Lesson, optimizer: optax.GradientTransformation) -> Step:
        more = () if lesson.part is None else (self._whole,)
        return jax.jit(
            make_step(lesson.config, self.graph, optimizer, lesson.part),
            in_shardings=(self._shardings, self.rows, *more),
            out_shardings=(self._shardings, self._whole),  # every process reads the whole report
            donate_argnums=0,
        )

    def _initial(self) -> TrainState:
        key = jax.random.key(self.config.train.seed)
        model = self.config.model.build(nnx.Rngs(jax.random.fold_in(key, 0)), self.config.task.vocab_size)
        _, params, statistics = nnx.split(model, nnx.Param, Statistic)
        return self._begun(nnx.to_pure_dict(params), nnx.to_pure_dict(statistics))

    def _begun(self, params: dict, statistics: dict) -> TrainState:
        key = jax.random.key(self.config.train.seed)
        zero = jnp.zeros((), jnp.int32)
        moments = self._optimizer.init(params)
        return TrainState(zero, params, statistics, moments, jax.random.fold_in(key, 1), zero, zero)
