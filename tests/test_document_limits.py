"""Limits of a model on the documents of a row: what mixers declare, and every place that checks batches."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recallax.config import ConfigError
from recallax.layers import (
    Based,
    Landmark,
    LongMamba,
    MemoryAsContext,
    MemoryAsGate,
    MixerConfig,
    NeuralMemory,
    NoChannelMixer,
    Parallel,
    PrefixLinear,
    SlidingWindow,
    SparseGlobalAttention,
    Workspace,
)
from recallax.models import (
    LM,
    Block,
    DocumentLayoutError,
    DocumentLimits,
    Generator,
    LMConfig,
    PromptError,
    pad_prompts,
    raise_in_compiled_programs,
)
from recallax.pallas_kernels.neural_memory import InnerOptimizer
from recallax.tasks import MQAR, Bytes, MaskedPrefix, Text
from recallax.tasks.base import Split, Task
from recallax.train import RunConfig
from recallax.train.program import Program
from recallax.train.run_config import tiny_run
from recallax.types import AnyArray, Batch, SeqInfo

LENGTH = 12
NEURAL = NeuralMemory(num_heads=2, inner_optimizer=InnerOptimizer(chunk_size=4))
GRID_MIXERS: dict[str, MixerConfig] = {
    "MemoryAsContext": MemoryAsContext(
        memory=replace(NEURAL, inner_optimizer=InnerOptimizer(chunk_size=2)),
        block_size=4,
        num_persistent_tokens=1,
        query_source="learned",
        num_retrieved_tokens=1,
    ),
    "Workspace": Workspace(num_slots=2, slot_dim=4, chunk_size=4),
    "NeuralMemory": NEURAL,
    "SparseGlobalAttention": SparseGlobalAttention(window=4, top_k=2, block_size=4, num_heads=2),
    "Parallel": Parallel(ssm=NEURAL, attention=SlidingWindow(window=2, num_heads=2)),
}
PREFIX_MIXER = PrefixLinear(memory=Based(feature_dim=4), max_prefix_len=4)
HYBRID = LMConfig(
    d_model=8,
    vocab_size=16,
    pattern="landmark parallel",
    blocks={
        "landmark": Block(mixer=Landmark(block_size=3, num_heads=2), channel=NoChannelMixer()),
        "parallel": Block(mixer=GRID_MIXERS["Workspace"], channel=NoChannelMixer()),
    },
)


def model_of(mixer: MixerConfig, pattern: str = "block*2") -> LMConfig:
    block = Block(mixer=mixer, channel=NoChannelMixer())
    return LMConfig(d_model=8, vocab_size=16, pattern=pattern, blocks={"block": block})


def row(*sizes: int, left: int = 0, prefix: int = 0) -> SeqInfo:
    """A row of documents with `prefix` prefix tokens each, after `left` tokens of padding; 0 is a token of padding."""
    documents = [(np.arange(max(size, 1)), np.full(max(size, 1), i * (size > 0))) for i, size in enumerate(sizes, 1)]
    positions, segment_ids = (np.concatenate(part) for part in zip(*documents, strict=True))
    pad = (left, LENGTH - left - len(positions))
    positions, segment_ids = (np.pad(part, pad)[None].astype(np.int32) for part in (positions, segment_ids))
    return SeqInfo(positions, segment_ids, (positions < prefix) & (segment_ids > 0))


def compiled(model: LM):
    graphdef, weights = nnx.split(model)
    call = jax.jit(lambda weights, tokens, seq: nnx.merge(graphdef, weights)(tokens, seq)[0])
    return lambda seq: call(weights, jnp.zeros((1, LENGTH), jnp.int32), seq)


def real_tokens_are_finite(logits: jax.Array, seq: SeqInfo) -> bool:
    return bool(np.isfinite(np.asarray(logits))[np.asarray(seq.segment_ids) > 0].all())


PADDED_INSIDE = row(5)._replace(
    positions=np.array([[0, 1, 0, 2, 3, *[0] * 7]], np.int32),
    segment_ids=np.array([[1, 1, 0, 1, 1, *[0] * 7]], np.int32),
)
MISALIGNED = {
    "starts inside a block": (row(3, 9), "starts at token 3; "),
    "after left padding": (row(4, 3, 3, left=1), "starts at token 8; "),
    "starts in a later block": (row(4, 6, 2), "starts at token 10; "),
    "padding inside": (PADDED_INSIDE, "with position 2 at token 3; .* without padding inside"),
}
ALIGNED = [row(4, 8), row(4, 4, 4), row(12), row(4, 4, 2, left=2), row(3, 0, 5)]


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", GRID_MIXERS)
def test_call_with_misaligned_documents_raises(name: str) -> None:
    """The check refuses what compiled programs answer with NaN, and accepts what they compute."""
    config = model_of(GRID_MIXERS[name], "block")
    model = config.build(nnx.Rngs(0))
    call, tokens = compiled(model), jnp.zeros((1, LENGTH), jnp.int32)
    for seq in ALIGNED:
        assert real_tokens_are_finite(call(seq), seq)
        config.document_limits.check_batch(seq)
    seq, start = MISALIGNED["starts inside a block"]
    assert not real_tokens_are_finite(call(seq), seq)
    rule = "needs documents that start at multiples of 4 tokens from the start of the row's first document"
    for on_device in (False, True):
        rows = jax.tree.map(jnp.asarray, seq) if on_device else seq
        with pytest.raises(DocumentLayoutError, match=f"^row 0 has .* {start}{name} of block 'block' {rule}"):
            model(tokens, rows)
        with pytest.raises(DocumentLayoutError, match=rule):
            model.prefill(tokens, rows, model.init_state(1, LENGTH))


@pytest.mark.parametrize("case", MISALIGNED)
def test_messages_name_the_document(case: str) -> None:
    seq, message = MISALIGNED[case]
    with pytest.raises(DocumentLayoutError, match=message):
        model_of(GRID_MIXERS["Workspace"]).document_limits.check_batch(seq)


def test_first_wrong_row_is_named() -> None:
    seq = jax.tree.map(lambda *parts: np.concatenate(parts), row(4, 8), row(12), row(4, 5, 3), row(1, 11))
    with pytest.raises(DocumentLayoutError, match="row 2 has a document that starts at token 9"):
        model_of(GRID_MIXERS["Workspace"]).document_limits.check_batch(seq)


@pytest.mark.usefixtures("strict")
def test_continued_rows_count_from_the_start_of_their_document() -> None:
    """A prefill from position 6 may start its next document two tokens later, at position 8 of the grid."""
    limits = model_of(GRID_MIXERS["Workspace"]).document_limits
    seq = row(2, 8)
    continued = seq._replace(positions=np.where(seq.segment_ids == 1, seq.positions + 6, seq.positions))
    limits.check_batch(continued, continued=True)
    with pytest.raises(DocumentLayoutError, match="starts at token 2"):
        limits.check_batch(seq, continued=True)
    model = model_of(GRID_MIXERS["Workspace"], "block").build(nnx.Rngs(0))
    graphdef, weights = nnx.split(model)
    prefill = jax.jit(lambda weights, *arguments: nnx.merge(graphdef, weights).prefill(*arguments)[:2])
    tokens = jnp.zeros((1, LENGTH), jnp.int32)
    _, state = prefill(weights, tokens, row(6), model.init_state(1, 2 * LENGTH))
    logits, _ = prefill(weights, tokens, continued, state)
    assert real_tokens_are_finite(logits, continued)


SLOW_NEURAL = replace(NEURAL, inner_optimizer=InnerOptimizer(chunk_size=6))
WIDE_SPARSE = SparseGlobalAttention(window=10, top_k=2, block_size=10)


@pytest.mark.parametrize(
    ("mixer", "grid", "prefix_limit"),
    [
        (MemoryAsGate(attention=GRID_MIXERS["Workspace"], memory=SLOW_NEURAL), 12, None),
        (Parallel(ssm=NEURAL, attention=WIDE_SPARSE), 20, None),
        (LongMamba(mixer=NEURAL), 4, None),
        (Parallel(ssm=PREFIX_MIXER, attention=replace(PREFIX_MIXER, max_prefix_len=3)), 1, 3),
        (MemoryAsGate(attention=SlidingWindow(window=2), memory=PREFIX_MIXER), 1, 4),
    ],
)
def test_composite_has_the_limits_of_its_parts(mixer: MixerConfig, grid: int, prefix_limit: int | None) -> None:
    assert (mixer.grid, mixer.prefix_limit) == (grid, prefix_limit)


@pytest.mark.usefixtures("strict")
def test_landmarks_count_as_places() -> None:
    """With a landmark after every 3 tokens, documents of 3 k tokens take 4 k places."""
    limits, model = HYBRID.document_limits, HYBRID.build(nnx.Rngs(0))
    assert limits.grid == 3
    call, good, bad = compiled(model), row(3, 6, 3), row(4, 8)
    assert real_tokens_are_finite(call(good), good) and not real_tokens_are_finite(call(bad), bad)
    limits.check_batch(good)
    with pytest.raises(DocumentLayoutError, match=r"token 4; .* and landmarks \(one after every 3 tokens\)"):
        limits.check_batch(bad)


@pytest.mark.usefixtures("strict")
def test_too_many_prefix_tokens_are_rejected() -> None:
    config = model_of(PREFIX_MIXER)
    model, tokens = config.build(nnx.Rngs(0)), jnp.zeros((1, LENGTH), jnp.int32)
    call, good, bad = compiled(model), row(5, 7, prefix=2), row(5, 7, prefix=3)
    assert real_tokens_are_finite(call(good), good) and not real_tokens_are_finite(call(bad), bad)
    assert real_tokens_are_finite(model(tokens, good)[0], good)
    message = "row 0 has 6 prefix tokens; PrefixLinear of block 'block' reads at most 4"
    with pytest.raises(DocumentLayoutError, match=message):
        model(tokens, bad)
    generator = Generator(model, max_len=LENGTH)
    with pytest.raises(PromptError, match="the prompts do not fit the model: row 0 has 5 prefix tokens"):
        generator.prefill(pad_prompts([[1] * 6], prefix_lengths=5))


@pytest.mark.usefixtures("strict")
def test_compiled_programs_raise_in_the_debugging_context(capfd: pytest.CaptureFixture[str]) -> None:
    call, bad = compiled(model_of(GRID_MIXERS["Workspace"]).build(nnx.Rngs(0))), row(3, 9)
    assert not real_tokens_are_finite(call(bad), bad)  # compiled without the check before the context is entered
    with raise_in_compiled_programs():
        assert real_tokens_are_finite(call(row(4, 8)), row(4, 8))
    message = "starts at token 3; Workspace of block"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message), raise_in_compiled_programs():
        call(bad).block_until_ready()
    assert not real_tokens_are_finite(call(bad), bad)


@dataclass(frozen=True, kw_only=True)
class PackedRows(Task):
    """Rows of two documents, of which the second starts at token 3 in one batch of each split."""

    misaligned_batch: int | None = None
    vocab_size: int = 16

    @property
    def groups(self) -> tuple[str, ...]:
        return ("all",)

    def lengths(self, split: Split) -> tuple[int, ...]:
        return (LENGTH,)

    def max_targets(self, split: Split, length: int) -> int:
        return length

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        one = row(3, 9) if index == self.misaligned_batch else row(4, 8)
        seq: SeqInfo = jax.tree.map(lambda part: np.repeat(part, size, axis=0), one)
        zeros = np.zeros((size, LENGTH), np.int32)
        return Batch(zeros, zeros, np.ones(zeros.shape, np.float32), zeros, zeros, seq)

    def solve(self, tokens: AnyArray) -> np.ndarray:
        return np.zeros_like(tokens)

    def chance(self) -> float:
        return 1.0


def test_batches_of_training_and_evaluation_are_checked() -> None:
    task = MQAR.single(length=LENGTH, num_kv_pairs=2, vocab_size=16)
    base = RunConfig(task=task, model=model_of(GRID_MIXERS["Workspace"], "block"))
    program = Program(tiny_run(base, task=PackedRows(misaligned_batch=1)))
    program.batch(0)
    rule = "of the task PackedRows: row 0 has a document that starts at token 3; Workspace of block 'block'"
    with pytest.raises(ConfigError, match=f"^batch 1 of train {rule}"):
        program.batch(1)
    state = program.init_state()
    with pytest.raises(ConfigError, match=f"^batch 1 of valid {rule}"):
        program.evaluate(state, "valid")
    # Without the check, only the metrics show it.
    program._document_limits = DocumentLimits(layers=())
    assert np.isnan(program.evaluate(state, "valid")["loss"])


def test_config_rejects_a_task_whose_grid_does_not_fit() -> None:
    text = Text(length=48, tokenizer=Bytes())
    task = MaskedPrefix(task=replace(text, grid=6), prefix_length=4)
    model = replace(model_of(GRID_MIXERS["Workspace"]), vocab_size=None)
    for wrong in (task, replace(text, grid=6)):
        with pytest.raises(ConfigError, match="documents must start at multiples of 4 tokens for Workspace of block"):
            RunConfig(task=wrong, model=model)
    with pytest.raises(ConfigError, match="set the grid of the task to 12"):
        RunConfig(task=replace(text, grid=6), model=model)
    config = RunConfig(task=replace(text, grid=8), model=model)
    config.model.document_limits.check_batch(config.task.batch(0, "train", 0, 8).seq)
    # With a grid of 1 it depends on the corpus. The embedded one has a document per split, which fits.
    config = RunConfig(task=text, model=model)
    config.model.document_limits.check_batch(config.task.batch(0, "train", 0, 8).seq)
    assert RunConfig(task=text, model=replace(model_of(Based(feature_dim=4)), vocab_size=None)).task == text


def test_config_rejects_a_prefix_that_is_too_long() -> None:
    task = MQAR.single(length=LENGTH, num_kv_pairs=2, vocab_size=16)
    limit = max(task.prefix_lengths("train", LENGTH))
    RunConfig(task=task, model=model_of(replace(PREFIX_MIXER, max_prefix_len=limit)))
    with pytest.raises(ConfigError, match=f"rows of MQAR have {limit} prefix tokens; .* reads at most {limit - 1}"):
        RunConfig(task=task, model=model_of(replace(PREFIX_MIXER, max_prefix_len=limit - 1)))
