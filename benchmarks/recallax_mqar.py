"""recallax's side of `train_speed`: the step of `recallax train`, on batches made beforehand.

It also writes what the opponent starts from: parameters, batches, and the optimizer's settings.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from benchmarks.messages import BATCHES, PARAMETERS, OptimizerMessage, TrainingMessage, write_arrays
from benchmarks.worker import Workload, serve_workload
from recallax.layers import Attention, Based, MixerConfig
from recallax.models.zoology_lm import zoology
from recallax.tasks import MQAR
from recallax.train.program import Program
from recallax.train.run_config import AdamW, RunConfig, Train
from recallax.train.step import StepMetrics, select_labelled


def mixer_config(message: TrainingMessage) -> MixerConfig:
    """Return the config of the mixer that a message names. Raises KeyError for an unknown name."""
    mixers: dict[str, MixerConfig] = {
        "based": Based(feature_dim=message.feature_dim),
        "attention": Attention(rope_theta=None),
    }
    return mixers[message.mixer]


class RecallaxTraining(Workload):
    """A `Program`, its state and its batches.

    Args:
        message: The model and the batches.
        optim: The optimizer's settings.
    """

    def __init__(self, message: TrainingMessage, optim: AdamW | None = None):
        self.message = message
        self.program = Program(
            RunConfig(
                task=MQAR.single(length=message.length, num_kv_pairs=message.pairs, vocab_size=message.vocab_size),
                model=zoology(mixer_config(message), message.d_model),
                train=Train(batch_size=message.batch_size),
                optim=optim or AdamW(),
            )
        )
        self.state = self.program.init_state()
        self.batches = [self.program.batch(index) for index in range(message.steps)]

    def step(self, part: str, index: int) -> StepMetrics:
        self.state, report = self.program.step(self.state, self.batches[index])
        jax.block_until_ready((self.state, report))
        return report

    def read(self, result: StepMetrics) -> list[float]:
        return [float(result.loss), float(result.gradient_norm)]

    def parameters(self) -> dict[str, np.ndarray]:
        """Return the current parameters under the opponent's names.

        Raises:
            HandoverError: The model has other parameters than those declared.
        """
        leaves = jax.tree_util.tree_leaves_with_path(self.state.params)
        return self.message.to_opponent({".".join(str(key.key) for key in path): leaf for path, leaf in leaves})

    def write(self, folder: Path) -> None:
        """Write what the opponent starts from.

        The positions of the labels are included, so that the opponent does not search for them.

        Args:
            folder: Both sides' folder.

        Raises:
            HandoverError: Parameters or batches are not those declared.
        """
        write_arrays(folder / PARAMETERS, self.parameters(), self.message.parameter_specs())
        task = self.program.config.task
        labels = [select_labelled(task, "train", batch) for batch in self.batches]
        batches = {
            "tokens": np.stack([batch.tokens for batch in self.batches]),
            "positions": np.stack([np.asarray(x.indices) for x in labels]),
            "targets": np.stack([np.asarray(x.targets) for x in labels]),
        }
        write_arrays(folder / BATCHES, batches, self.message.batch_specs())
        optim = self.program.config.optim
        OptimizerMessage(
            learning_rates=[float(np.asarray(self.program.learning_rate(i))) for i in range(len(self.batches))],
            weight_decay=optim.weight_decay,
            b1=optim.b1,
            b2=optim.b2,
            eps=optim.eps,
            max_grad_norm=optim.max_grad_norm,
        ).write(folder)


def main(folder: Path) -> None:
    """Write what the opponent starts from, then reply to the driver."""
    training = RecallaxTraining(TrainingMessage.read(folder))
    training.write(folder)
    serve_workload(training, {"jax": jax.__version__})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
