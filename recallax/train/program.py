"""The compiled functions of a run: initialization, training steps and evaluation, and the sharding of its state."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recallax.layers.base import Statistic
from recallax.models import DocumentLayoutError, accounting
from recallax.tasks.base import Split, Task
from recallax.train.evaluate import Evaluator, evaluate, make_evaluator
from recallax.train.leaf_checksums import leaf_forms
from recallax.train.mesh import batch_sharding, make_mesh, shard_batch, state_shardings
from recallax.train.optimizer import learning_rate_schedule, logical_axes
from recallax.train.phase_factory import make_phases
from recallax.train.phases import Phase, PhasePosition
from recallax.train.run_config import RunConfig
from recallax.train.step import StepFn, StepMetrics, TrainState, make_step
from recallax.types import Batch

FIRST_PHASE = PhasePosition()


class Program:
    """The compiled functions of a run, without its training state.

    Args:
        config: Config of the run.
        mesh: The device mesh. None: the one that the config requires.

    Raises:
        ConfigError: The config does not fit the devices, or a stage of its curriculum does not fit the model.
    """

    def __init__(self, config: RunConfig, mesh: Mesh | None = None):
        self.config = config
        self.mesh = make_mesh(config) if mesh is None else mesh
        self.batch_sharding = batch_sharding(self.mesh)
        self._replicated = NamedSharding(self.mesh, PartitionSpec())
        self.learning_rate = learning_rate_schedule(config)
        model = accounting.abstract_model(config.model, config.task.vocab_size)
        self.graphdef, params, _ = nnx.split(model, nnx.Param, Statistic)
        self.phases = make_phases(config)
        """The phases of the run, in order; one without a curriculum."""
        optimizers = [phase.make_optimizer(params) for phase in self.phases]
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
        """Paths of the parameters, in `jax.tree` order."""
        pairs = zip(self.phases, optimizers, strict=True)
        self._step_fns = [self._compile_step(phase, optimizer) for phase, optimizer in pairs]
        self._document_limits = config.model.document_limits
        self._evaluators: dict[tuple[int | None, Split], Evaluator] = {}

    def init_state(self) -> TrainState:
        """Return the state at step 0, which depends on `train.seed` only."""
        return jax.jit(self._init_state, out_shardings=self._shardings)()

    def init_state_from(self, params: dict, statistics: dict) -> TrainState:
        """Return the state at step 0 with given parameters and statistics.

        Args:
            params: Parameters, with the structure of `TrainState.params`.
            statistics: Statistics, with the structure of `TrainState.statistics`.

        Returns:
            The state, with fresh optimizer moments.

        Raises:
            ValueError: Leaves are missing or unknown, or have other shapes or dtypes than those of the model.
        """
        variables = {"params": params, "statistics": statistics}
        given = leaf_forms(jax.eval_shape(lambda tree: tree, variables))
        expected = leaf_forms({name: getattr(self.abstract_state, name) for name in variables})
        if names := sorted(name for name in given | expected if given.get(name) != expected.get(name)):
            lines = [f"{n}: found {given.get(n, 'nothing')}, expected {expected.get(n, 'nothing')}" for n in names]
            raise ValueError(
                "\n  ".join(["the variables do not fit the model of the run; pass those of its config:", *lines])
            )
        return jax.jit(self._state_from_params, out_shardings=self._shardings)(params, statistics)

    def batch(self, index: int, phase: int = 0) -> Batch:
        """Return training batch number `index` of the task of a phase, as numpy arrays.

        Args:
            index: Number of the batch.
            phase: Index of the phase.

        Raises:
            DocumentLayoutError: The documents of the batch do not fit the model.
        """
        task, size = self.phases[phase].config.task, self.config.train.batch_size
        return self._make_batch(task, "train", index, size)

    def step(
        self, state: TrainState, batch: Batch, position: PhasePosition = FIRST_PHASE
    ) -> tuple[TrainState, StepMetrics]:
        """Take one optimizer step.

        Args:
            state: The state; its buffers are donated.
            batch: A batch of numpy arrays.
            position: The phase of the run.

        Returns:
            The next state, and the metrics of the step, both on the devices.
        """
        step = self._step_fns[position.index]
        return step(state, shard_batch(batch, self.batch_sharding), np.int32(position.start_step))

    def step_memory(self, batch: Batch, phase: int) -> Any:
        """Compile the step of a phase, for its first call too, and return the memory that it takes.

        Args:
            batch: A batch of numpy arrays; only its shapes are read.
            phase: Index of the phase.

        Returns:
            What `jax.stages.Compiled.memory_analysis` returns: sizes in bytes on one device, or None.
        """
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=self.batch_sharding
            ),
            batch,
        )
        return self._step_fns[phase].lower(self.abstract_state, batch, np.int32(0)).compile().memory_analysis()

    def check_phases(self) -> None:
        """Trace the step of every phase of a run that has several, so that errors appear before training starts."""
        for index, step in enumerate(self._step_fns if len(self._step_fns) > 1 else []):
            jax.eval_shape(step, self.abstract_state, self.batch(0, index), np.int32(0))

    def data_digest(self) -> str:
        """Return a digest of the data outside the config, such as a text corpus, that the run trains on."""
        tasks = [self.config.task, *(phase.config.task for phase in self.phases)]
        return "+".join(dict.fromkeys(digest for task in tasks if (digest := task.data_digest())))

    def evaluate(
        self, state: TrainState, split: Split, batches: int | None = None, phase: int | None = None
    ) -> dict[str, float]:
        """Compute exact weighted means over the first batches of a split.

        Args:
            state: The state.
            split: The split.
            batches: Number of batches; None for `evaluate.batches` of the config.
            phase: Index of the phase whose task is used; None for the task of the run.

        Returns:
            Metrics by name, as `recallax.train.evaluate.evaluate` returns them.
        """
        task = self.config.task if phase is None else self.phases[phase].config.task
        if (phase, split) not in self._evaluators:
            self._evaluators[phase, split] = make_evaluator(self.graphdef, task, split, self._replicated)
        return evaluate(
            self._evaluators[phase, split],
            state.params,
            state.statistics,
            task,
            split,
            partial(self._make_batch, task, split, size=self.config.evaluate.batch_size),
            batches=batches or self.config.evaluate.batches,
            sharding=self.batch_sharding,
        )

    def with_seeds_of(self, config: RunConfig) -> "Program":
        """Return a program that shares the compiled functions, for a config that differs in its seeds only."""
        other = copy.copy(self)
        other.config = config
        return other

    def vmapped_step(self) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
        """Return a step of several runs on one device; all leaves have a leading axis with one entry per run."""
        step = make_step(self.phases[0], self.graphdef, self._optimizer)
        return jax.jit(jax.vmap(lambda state, batch: step(state, batch, jnp.zeros((), jnp.int32))), donate_argnums=0)

    def _make_batch(self, task: Task, split: Split, index: int, size: int) -> Batch:
        batch = task.batch(self.config.train.data_seed, split, index, size)
        try:
            self._document_limits.check_batch(batch.seq)
        except DocumentLayoutError as error:
            name = type(task).__name__
            raise DocumentLayoutError(f"batch {index} of {split} of the task {name}: {error}") from error
        return batch

    def _compile_step(self, phase: Phase, optimizer: optax.GradientTransformation) -> StepFn:
        return jax.jit(
            make_step(phase, self.graphdef, optimizer),
            in_shardings=(self._shardings, self.batch_sharding, self._replicated),
            out_shardings=(self._shardings, self._replicated),  # every process reads all metrics
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
