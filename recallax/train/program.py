"""A config made executable: the model's graph, the compiled step and evaluation, and where the state lies."""

import copy
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from recallax.layers.base import Statistic
from recallax.models import accounting
from recallax.tasks.base import Split
from recallax.train.evaluate import Evaluator, evaluate, make_evaluator
from recallax.train.mesh import batch_sharding, make_mesh, place, state_shardings
from recallax.train.optimizer import logical_axes, make_optimizer, schedule
from recallax.train.run import RunConfig
from recallax.train.step import StepReport, TrainState, make_step
from recallax.types import Batch


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
        self._optimizer = make_optimizer(config, params)
        shapes = jax.eval_shape(self._initial)
        self._shardings = state_shardings(self.mesh, shapes, logical_axes(params), self._optimizer)
        self.abstract: TrainState = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self._shardings,
        )
        """Shapes, dtypes and shardings of the state."""
        self.leaf_names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes.params)]
        self._step = jax.jit(
            make_step(config, self.graph, self._optimizer),
            in_shardings=(self._shardings, self.rows),
            out_shardings=(self._shardings, self._whole),  # every process reads the whole report
            donate_argnums=0,
        )
        self._evaluators: dict[Split, Evaluator] = {}

    def initial(self) -> TrainState:
        """The state at step 0, a function of the config's seed alone."""
        return jax.jit(self._initial, out_shardings=self._shardings)()

    def beginning(self, params: dict, statistics: dict) -> TrainState:
        """The state at step 0 of a run that begins with these parameters in place of its own."""
        return jax.jit(self._begun, out_shardings=self._shardings)(params, statistics)

    def batch(self, index: int) -> Batch:
        """Train batch number `index`, as numpy."""
        train = self.config.train
        return self.config.task.batch(train.data_seed, "train", index, train.batch_size)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        """One optimizer step on a numpy batch; the given state's buffers are used up."""
        return self._step(state, place(batch, self.rows))

    def evaluate(self, state: TrainState, split: Split, batches: int | None = None) -> dict[str, float]:
        """Exact weighted means over the first batches of a split (`RunConfig.evaluate` says how many)."""
        if split not in self._evaluators:
            self._evaluators[split] = make_evaluator(self.graph, self.config.task, split, self._whole)
        return evaluate(
            self._evaluators[split],
            state.params,
            state.statistics,
            self.config.task,
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
