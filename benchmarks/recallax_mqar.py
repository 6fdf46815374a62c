"""recallax's side of `train_speed`: the step of `recallax train`, on batches made beforehand.

It also writes what the opponent starts from: parameters, batches, learning rates and the optimizer's settings.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np

from benchmarks.jobs import Training
from benchmarks.worker import Work, serve
from recallax.layers import Attention, Based, MixerConfig
from recallax.models.zoology import zoology
from recallax.tasks import MQAR
from recallax.train.program import Program
from recallax.train.run import RunConfig, Train
from recallax.train.step import StepReport, labelled

MIXERS: dict[str, MixerConfig] = {"based": Based(feature_dim=16), "attention": Attention(rotary_base=None)}


class Recallax(Work):
    """A `Program` and its state."""

    def __init__(self, job: Training):
        self.program = Program(
            RunConfig(
                task=MQAR.single(length=job.length, pairs=job.pairs, vocab_size=job.vocab_size),
                model=zoology(MIXERS[job.mixer], job.d_model),
                train=Train(batch_size=job.batch_size),
            )
        )
        self.state = self.program.initial()
        self.batches = [self.program.batch(index) for index in range(job.steps)]

    def step(self, part: str, index: int) -> StepReport:
        self.state, report = self.program.step(self.state, self.batches[index])
        jax.block_until_ready((self.state, report))
        return report

    def read(self, result: StepReport) -> list[float]:
        return [float(result.loss), float(result.gradient_norm)]

    def write(self, folder: Path) -> None:
        """What the opponent starts from. The places of the labels are handed over too: it need not look for them."""
        leaves = jax.tree_util.tree_leaves_with_path(self.state.params)
        parameters = {".".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in leaves}
        np.savez(folder / "parameters.npz", allow_pickle=False, **parameters)
        task = self.program.config.task
        found = [labelled(task, "train", batch) for batch in self.batches]
        np.savez(
            folder / "batches.npz",
            tokens=np.stack([batch.tokens for batch in self.batches]),
            at=np.stack([np.asarray(x.at) for x in found]),
            targets=np.stack([np.asarray(x.targets) for x in found]),
        )
        rates = [float(np.asarray(self.program.learning_rate(index))) for index in range(len(self.batches))]
        (folder / "optimizer.json").write_text(json.dumps({**asdict(self.program.config.optim), "rates": rates}))


def main(folder: Path) -> None:
    trainer = Recallax(Training.read(folder))
    trainer.write(folder)
    serve(trainer, {"jax": jax.__version__})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
