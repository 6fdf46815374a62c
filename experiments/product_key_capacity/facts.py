"""Random facts: a task whose tokens are the numbers of facts, and the model of one layer that stores them."""

from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.layers import LayerInfo, MixerConfig, NoChannelMixer
from recallax.layers.base import Statistic
from recallax.layers.dense import Linear
from recallax.models import LM, Block, LMConfig
from recallax.models.lm_head import LogitProjection
from recallax.pallas_kernels.grid import gather_tokens
from recallax.tasks.base import Split, Task, batch_rng
from recallax.types import Aux, Batch, Precision, SeqInfo, unpacked_seq_info


@dataclass(frozen=True, kw_only=True)
class RandomFacts(Task):
    """Recall one random answer per fact; a row is one token, the number of the fact.

    Train rows are facts drawn at random with replacement. The valid and test splits both list all facts in order, so
    `num_facts` rows cover every fact once.
    """

    num_facts: int
    """Number of facts."""
    num_answers: int
    """Number of answers, from which that of each fact is drawn with equal probability."""
    answer_seed: int = 0
    """Seed of the answers, which are the same in all splits."""

    @property
    def vocab_size(self) -> int:
        return max(self.num_facts, self.num_answers)

    @property
    def groups(self) -> tuple[str, ...]:
        return ("recall",)

    @property
    def answers(self) -> Int[np.ndarray, " facts"]:
        """The answer of each fact."""
        rng = batch_rng(self.answer_seed, "train", 0, "answer")
        return rng.integers(self.num_answers, size=self.num_facts, dtype=np.int32)

    def lengths(self, split: Split) -> tuple[int, ...]:
        return (1,)

    def max_targets(self, split: Split, length: int) -> int:
        return 1

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        if split == "train":
            facts = batch_rng(seed, split, index, "facts").integers(self.num_facts, size=size)
        else:
            facts = np.arange(index * size, (index + 1) * size) % self.num_facts
        tokens = facts.astype(np.int32)[:, None]
        zeros = np.zeros_like(tokens)
        weights = np.ones(tokens.shape, np.float32)
        return Batch(tokens, self.answers[tokens], weights, zeros, zeros, unpacked_seq_info(size, 1))

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Look the answers up."""
        return self.answers[tokens]

    def chance(self) -> float:
        """Compute the accuracy of the most frequent answer."""
        return float(np.bincount(self.answers).max() / self.num_facts)


@dataclass(frozen=True, kw_only=True)
class FactModelConfig(LMConfig):
    """A model whose layer is the only place that can store facts; the mixer of its only block is the layer."""

    num_answers: int
    """Number of answers."""

    def build(self, rngs: nnx.Rngs, vocab_size: int | None = None) -> "FactModel":
        assert vocab_size is not None, "the task defines the number of facts"
        return FactModel(self, vocab_size, rngs)


def fact_model(layer: MixerConfig, d_model: int, num_answers: int) -> FactModelConfig:
    """Return the model around a layer.

    Args:
        layer: The layer under test.
        d_model: Width of the vectors.
        num_answers: Number of answers.

    Returns:
        The model config.
    """
    block = Block(mixer=layer, channel=NoChannelMixer())
    return FactModelConfig(d_model=d_model, pattern="layer", blocks={"layer": block}, num_answers=num_answers)


class FactModel(LM):
    """logits = readout(layer(vector of the fact)), without norms and without a residual connection.

    The vectors are standard normal and are not trained. A trained embedding, and a readout that reads the vectors
    besides the output of the layer, would store facts too.

    Args:
        config: Config of the model.
        vocab_size: Number of facts.
        rngs: Random number generators of the vectors and the parameters.
    """

    def __init__(self, config: FactModelConfig, vocab_size: int, rngs: nnx.Rngs):
        precision, width = Precision(), config.d_model
        (block,) = config.blocks.values()
        self.vectors = Statistic(jax.random.normal(rngs.params(), (vocab_size, width)))
        self.layer = block.mixer.build(width, LayerInfo(0, 1), precision=precision, rngs=rngs)
        self.readout = Linear(width, config.num_answers, precision=precision, rngs=rngs, std=width**-0.5)

    def logit_projection(
        self, tokens: Int[Array, "B T"], seq: SeqInfo, logit_indices: Int[Array, "B N"] | None = None
    ) -> tuple[LogitProjection, Aux]:
        y, aux = self.layer(self.vectors[tokens], seq)
        y = y if logit_indices is None else gather_tokens(y, logit_indices)
        return LogitProjection(y, self.readout.kernel[...].T), aux

    def init_state(self, batch: int, max_len: int) -> Float[Array, ""]:
        raise TypeError("a FactModel answers single facts; it has no state and cannot decode")
