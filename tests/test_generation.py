"""Generation: agreement with one call, padding, chunked prefill, forks, sampling, stop tokens and errors."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from recallax.cli.errors import EXIT_FAILURE, run_with_error_messages
from recallax.config import ConfigError
from recallax.layers import (
    BaseConv,
    Based,
    GatedDeltaNet,
    Identity,
    Landmark,
    MemoryAsContext,
    MixerConfig,
    MoM,
    NeuralMemory,
    PrefixLinear,
    SlidingWindow,
)
from recallax.models import LM, Autoencoder, Block, DocumentLimits, LMConfig, Untied, accounting
from recallax.models.generation import NO_TOKEN, DecodingState, Generator, NonFiniteLogitsError
from recallax.models.prompts import PromptError, Prompts, pad_prompts, unpack_documents
from recallax.models.sampling import Greedy, MultinomialSampling, Sampling, row_keys
from recallax.pallas_kernels.neural_memory.inner_optimizer import InnerOptimizer, LinearNet
from recallax.tasks import ContextRepetition, Copying, StateTracking
from recallax.train.inference import first_question
from recallax.types import SeqInfo
from tests.test_laws import close

pytestmark = pytest.mark.usefixtures("strict", "chunks_of_four")

VOCAB, MAX_LEN = 23, 48
LENGTHS, NUM_NEW = (5, 14, 9, 1), 6
MEMORY = NeuralMemory(num_heads=1, inner_optimizer=InnerOptimizer(network=LinearNet(), chunk_size=2), conv_size=0)
MIXERS: dict[str, MixerConfig] = {
    "based": Based(feature_dim=4, num_heads=2),
    "landmark": Landmark(block_size=3, num_heads=2, num_kv_heads=1, top_k=16),
    "retrieval": Landmark(block_size=2, num_heads=2, top_k=2, select_per="head"),
    "titans": MemoryAsContext(memory=MEMORY, block_size=4, num_heads=2, num_persistent_tokens=2),
    "prefix": PrefixLinear(memory=GatedDeltaNet(num_heads=2, head_k_dim=4)),
    "mom": MoM(memory=GatedDeltaNet(num_heads=2, head_k_dim=4), num_memories=3, top_k=2),
}
PREFIXES = {"prefix": (3, 6, 4, 1)}
FULL_ONLY = ("retrieval", "mom")


def parametrize_on_one_worker(*names: str, full_only: Sequence[str] = FULL_ONLY):
    """Run the tests of each mixer in one process, which compiles once; mark the mixers in `full_only` as full."""
    marks = {name: [pytest.mark.full] if name in full_only else [] for name in names}
    params = [pytest.param(name, marks=[pytest.mark.xdist_group(f"generation-{name}"), *marks[name]]) for name in names]
    return pytest.mark.parametrize("name", params)


each_mixer = parametrize_on_one_worker(*MIXERS)


@functools.cache
def model(name: str) -> LM:
    """Return a model with two repeated layers and a window, whose state has leaves with rows on different axes."""
    blocks = {
        "conv": Block(mixer=BaseConv(conv_size=3), channel=Identity()),
        "mixer": Block(mixer=MIXERS[name], channel=Identity()),
        "window": Block(mixer=SlidingWindow(window=4, num_heads=2), channel=Identity()),
    }
    pattern = {"based": "conv mixer*2 window"}.get(name, "mixer*2")
    config = LMConfig(d_model=16, vocab_size=VOCAB, pattern=pattern, blocks=blocks, lm_head=Untied())
    graph, params, rest = nnx.split(config.build(nnx.Rngs(0)), nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    size = 0.05 if name == "titans" else 0.3  # neural memories amplify rounding errors
    leaves = [x + size * jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(leaves)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest)


@functools.cache
def greedy_generator(name: str) -> Generator:
    return Generator(model(name), max_len=MAX_LEN)


@functools.cache
def sampling_generator() -> Generator:
    return Generator(model("based"), max_len=MAX_LEN, sampling=MultinomialSampling(temperature=3.0, top_k=20))


on_based_worker = pytest.mark.xdist_group("generation-based")


def token_ids(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(VOCAB, size=n).tolist() for n in lengths]


def prompts(name: str = "based", **choices) -> Prompts:
    return pad_prompts(token_ids(0, LENGTHS), prefix_lengths=PREFIXES.get(name, 0), **choices)


def assert_identical(a, b) -> None:
    """Assert that all leaves are equal bit for bit."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# Agreement with one call


# The mixer `retrieval` is missing, because with few retrieved blocks one call computes another function.
@parametrize_on_one_worker("based", "landmark", "titans", "prefix", "mom", full_only=("titans", "mom"))
def test_greedy_tokens_equal_the_argmax_of_one_call(name):
    generator = greedy_generator(name)
    done = generator.generate(generator.prefill(prompts(name)), NUM_NEW)
    assert done.tokens.shape == (4, NUM_NEW) and (done.lengths == NUM_NEW).all()
    assert len(set(done.tokens.ravel().tolist())) > 5  # the test can detect wrong tokens
    rows = [[*prompt, *new] for prompt, new in zip(token_ids(0, LENGTHS), done.tokens.tolist(), strict=True)]
    tokens, seq = pad_prompts(rows, prefix_lengths=PREFIXES.get(name, 0))
    positions = np.array(LENGTHS)[:, None] - 1 + np.arange(NUM_NEW + 1)[None]
    graph, weights = nnx.split(model(name))
    logits, _ = jax.jit(lambda *args: nnx.merge(graph, weights)(*args))(jnp.asarray(tokens), seq, positions)
    np.testing.assert_array_equal(np.asarray(logits[:, :-1]).argmax(axis=-1), done.tokens)
    close(done.state.logits, logits[:, -1])
    assert done.state.position.tolist() == [n + NUM_NEW for n in LENGTHS]


@on_based_worker
def test_generation_can_be_continued():
    generator = sampling_generator()
    prompt_state = generator.prefill(prompts())
    whole = generator.generate(prompt_state, NUM_NEW, seed=3)
    first = generator.generate(prompt_state, NUM_NEW // 2, seed=3)
    second = generator.generate(first.state, NUM_NEW // 2, seed=3)
    np.testing.assert_array_equal(np.concatenate([first.tokens, second.tokens], axis=1), whole.tokens)
    assert_identical(second.state, whole.state)


class CountingSampler(Sampling):
    """Greedy sampling that counts how often it is traced and how often it runs."""

    def __init__(self) -> None:
        self.traced_shapes, self.calls = [], []

    def sample(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        self.traced_shapes.append(logits.shape)
        jax.debug.callback(lambda: self.calls.append(1))
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@on_based_worker
def test_loop_is_compiled_once_and_ends_when_all_rows_have_stopped():
    prompt_state = greedy_generator("based").prefill(prompts())
    expected = greedy_generator("based").generate(prompt_state, NUM_NEW)
    stop = sorted({int(expected.tokens[row, row + 1]) for row in range(4)})
    ends = [1 + min(np.flatnonzero(np.isin(row, stop)), default=NUM_NEW) for row in expected.tokens]
    assert max(ends) < NUM_NEW and len(set(ends)) > 1
    sampler = CountingSampler()
    generator = Generator(model("based"), max_len=MAX_LEN, sampling=sampler, stop_token_ids=stop)
    for seed in range(3):
        done = generator.generate(prompt_state, NUM_NEW, seed=seed)
    jax.effects_barrier()
    assert sampler.traced_shapes == [(4, VOCAB)]
    assert len(sampler.calls) == 3 * max(ends)
    assert done.lengths.tolist() == ends
    for row, end in enumerate(ends):
        assert done.sequences()[row].tolist() == expected.tokens[row, :end].tolist()
        assert (done.tokens[row, end:] == NO_TOKEN).all()


@parametrize_on_one_worker("based", "landmark", "titans", "mom", full_only=("titans", "mom"))
def test_stopped_row_keeps_its_state(name):
    """Other rows continue. The state of a stopped row is that of the tokens before its stop token."""
    prompt_state = greedy_generator(name).prefill(prompts(name))
    unstopped = greedy_generator(name).generate(prompt_state, NUM_NEW)
    stop = next(int(t) for t in unstopped.tokens[3, 1:] if not (unstopped.tokens == t).any(axis=1).all())
    generator = Generator(model(name), max_len=MAX_LEN, stop_token_ids=[stop])
    done = generator.generate(prompt_state, NUM_NEW)
    ends = [row.index(stop) if stop in row else NUM_NEW for row in unstopped.tokens.tolist()]
    assert done.lengths.tolist() == [min(end + 1, NUM_NEW) for end in ends] and max(ends) == NUM_NEW
    assert done.state.active.tolist() == [end == NUM_NEW for end in ends]
    again = generator.generate(done.state, NUM_NEW)
    ids = token_ids(0, LENGTHS)
    consumed = [[*ids[row], *unstopped.tokens[row, :end].tolist()][:14] for row, end in enumerate(ends)]
    expected = greedy_generator(name).prefill(pad_prompts(consumed, length=14))
    for row in np.flatnonzero(np.array(ends) < NUM_NEW).tolist():
        assert again.lengths[row] == 0 and again.state.position[row] == len(ids[row]) + ends[row]
        assert_identical(generator.fork(again.state, [row]), generator.fork(done.state, [row]))
        if len(ids[row]) + ends[row] <= 14:
            close(generator.fork(done.state, [row])[:3], generator.fork(expected, [row])[:3], 1e-4)
    # A stopped row becomes active again when it reads more tokens.
    extended = greedy_generator(name).prefill(pad_prompts(token_ids(5, (2, 2, 2, 2)), length=14), done.state)
    assert extended.active.all() and (extended.position == done.state.position + 2).all()


# Batches


@each_mixer
def test_padding_side_and_packing_do_not_change_results(name):
    generator = greedy_generator(name)
    right = generator.generate(generator.prefill(prompts(name)), NUM_NEW)
    assert_identical(generator.generate(generator.prefill(prompts(name, padding_side="left")), NUM_NEW), right)
    # The same prompts in two packed rows.
    ids, prefix_lengths = token_ids(0, LENGTHS), PREFIXES.get(name, (0,) * 4)
    tokens, segments, positions = np.zeros((3, 2, 20), np.int32)
    prefix = np.zeros((2, 20), bool)
    for row, first, segment, prompt in ((0, 0, 1, 0), (0, 5, 2, 1), (1, 2, 7, 2), (1, 11, 3, 3)):
        span = slice(first, first + LENGTHS[prompt])
        tokens[row, span], segments[row, span], positions[row, span] = ids[prompt], segment, np.arange(LENGTHS[prompt])
        prefix[row, span] = positions[row, span] < prefix_lengths[prompt]
    unpacked = unpack_documents(tokens, SeqInfo(positions, segments, prefix))
    assert_identical(unpacked, prompts(name))
    assert_identical(generator.generate(generator.prefill(unpacked), NUM_NEW), right)


@each_mixer
def test_row_does_not_depend_on_other_rows_or_its_index(name):
    generator, order = greedy_generator(name), [2, 0, 3, 1]
    ids, prefix_lengths = token_ids(0, LENGTHS), PREFIXES.get(name, (0,) * 4)
    done = generator.generate(generator.prefill(prompts(name)), NUM_NEW)
    permuted = pad_prompts([ids[i] for i in order], prefix_lengths=[prefix_lengths[i] for i in order])
    other = generator.generate(generator.prefill(permuted), NUM_NEW)
    assert_identical(other.tokens, done.tokens[order])
    assert_identical(other.state, generator.fork(done.state, order))
    other_ids = token_ids(9, (11, 14, 2, 3))
    mixed = pad_prompts([other_ids[0], ids[1], *other_ids[2:]], prefix_lengths=[0, prefix_lengths[1], 0, 0])
    other = generator.generate(generator.prefill(mixed), NUM_NEW)
    assert_identical(other.tokens[1], done.tokens[1])
    assert_identical(generator.fork(other.state, [1]), generator.fork(done.state, [1]))
    assert (other.tokens[0] != done.tokens[0]).any()


# Forks


@each_mixer
def test_answers_do_not_depend_on_batch_order(name):
    """Questions and prompts have at most 14 tokens here, so that they share compiled programs."""
    generator, context = greedy_generator(name), 2
    prompt_state = generator.fork(generator.prefill(prompts(name)), [context])
    before = jax.tree.map(np.array, prompt_state)
    questions = token_ids(3, (3, 1, 4, 2, 4, 1))
    answers = generator.answer(prompt_state, questions, NUM_NEW, batch_size=4, max_question_length=14)
    assert_identical(prompt_state, before)
    order = [5, 3, 0, 1, 4, 2]
    again = generator.answer(prompt_state, [questions[i] for i in order], NUM_NEW, batch_size=4, max_question_length=14)
    assert_identical(again, [answers[i] for i in order])
    assert_identical(
        generator.answer(prompt_state, questions[3:4], NUM_NEW, batch_size=4, max_question_length=14), answers[3:4]
    )
    assert len({tuple(answer.tolist()) for answer in answers}) > 2
    # The states do not depend on the order either.
    copies = generator.fork(prompt_state, [0] * 4)
    first, second = (
        generator.prefill(pad_prompts([questions[i] for i in indices], length=14), copies)
        for indices in ((0, 1, 2, 3), (2, 5, 1, 0))
    )
    assert_identical(generator.fork(first, [0, 1, 2, 2]), generator.fork(second, [3, 2, 0, 0]))
    # Answers equal those of prompts that contain context and question.
    ids, prefix_length = token_ids(0, LENGTHS)[context], PREFIXES.get(name, (0,) * 4)[context]
    whole = generator.prefill(
        pad_prompts([ids + question for question in questions[:4]], prefix_lengths=prefix_length, length=14)
    )
    close(first.model_state, whole.model_state, 1e-4)
    close(first.logits, whole.logits, 1e-4)
    assert_identical(generator.generate(whole, NUM_NEW).sequences(), answers[:4])


@on_based_worker
def test_sampled_answers_depend_on_question_ids():
    generator = sampling_generator()
    prompt_state = generator.fork(generator.prefill(prompts()), [2])
    questions, order = token_ids(3, (3, 1, 4)), [2, 0, 1]
    answers = generator.answer(prompt_state, questions, NUM_NEW, batch_size=4, max_question_length=14)
    shuffled = [questions[i] for i in order]
    assert_identical(
        generator.answer(prompt_state, shuffled, NUM_NEW, batch_size=4, max_question_length=14, question_ids=order),
        [answers[i] for i in order],
    )
    twice = generator.answer(prompt_state, [questions[0], questions[0]], NUM_NEW, batch_size=4, max_question_length=14)
    assert_identical(twice[0], answers[0])
    assert (twice[0] != twice[1]).any()


# Chunked prefill


@each_mixer
def test_chunked_prefill_equals_one_prefill(name, monkeypatch):
    """Chunks cross landmarks and the grids of mixers, and rows end in different chunks."""
    generator, chunk_size = greedy_generator(name), 6
    whole = generator.prefill(prompts(name))
    chunk_lengths: list[int] = []
    prefill_chunk = generator._prefill_chunk_jit

    def record_length(weights, state, tokens, *rest):
        chunk_lengths.append(tokens.shape[1])
        return prefill_chunk(weights, state, tokens, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(generator, "_prefill_chunk_jit", record_length)
        chunked = generator.prefill(prompts(name, padding_side="left"), chunk_size=chunk_size)
    assert chunk_lengths == [chunk_size] * -(-max(LENGTHS) // chunk_size)
    close(chunked.model_state, whole.model_state)
    close(chunked.logits, whole.logits)
    assert_identical(chunked[2:], whole[2:])
    assert_identical(generator.generate(chunked, NUM_NEW).tokens, generator.generate(whole, NUM_NEW).tokens)
    if name in PREFIXES:
        with pytest.raises(PromptError, match=r"prefix of prompt 1 is 6 tokens.*chunk_size is 5: increase it"):
            generator.prefill(prompts(name), chunk_size=5)
        causal = generator.prefill(prompts())
        assert jnp.abs(causal.logits - whole.logits).max() > 0.01  # the prefix has an effect


# Questions of tasks


def test_task_prompt_ends_before_its_answer():
    copying = first_question(Copying(test_lengths=(6,)), "test", 0)
    assert copying.prompt[0] == 26 and copying.prompt[-1] == 27 and copying.prefix_length == 7
    assert copying.answer.tolist() == [*copying.prompt[1:-1], 28]
    task = StateTracking(test_lengths=(9,))  # every token is a question, and answers are not tokens of the row
    dense = first_question(task, "test", 0)
    assert (len(dense.prompt), len(dense.answer), dense.prefix_length) == (1, 1, 0)
    repetition = ContextRepetition(fill_strategy="iterate", prefix_length=11)
    repeated = first_question(repetition.apply_to_task(Copying(test_lengths=(6,))), "test", 0)
    assert (
        repeated.prompt[:11].tolist() == repetition.apply_to_context(copying.prompt[:7], Copying()).tolist()
        and repeated.prefix_length == 11
    )
    assert_identical(repeated.answer, copying.answer)


# Sampling

LOGITS = np.array([1.0, -0.5, 2.0, 2.0, 0.3, -3.0, 1.0, 0.9, 1.6, -1.0], np.float32)


def expected_probabilities(rule: MultinomialSampling) -> np.ndarray:
    """Return the probability of each id by the definition, in a loop over the ids."""
    scaled = np.exp(LOGITS.astype(np.float64) / rule.temperature)
    order = sorted(range(len(LOGITS)), key=lambda i: (-LOGITS[i], i))[: rule.top_k]
    expected, total, cumulative = np.zeros(len(LOGITS)), sum(scaled[i] for i in order), 0.0
    for i in order:
        if rule.top_p is not None and cumulative >= rule.top_p:
            break
        expected[i] = scaled[i]
        cumulative += scaled[i] / total
    return expected / expected.sum()


@pytest.mark.parametrize(
    ("rule", "support"),
    [
        (MultinomialSampling(temperature=0.7), 10),
        (MultinomialSampling(temperature=1.8, top_k=3), 3),
        (MultinomialSampling(top_k=99), 10),
        (MultinomialSampling(top_p=0.6), 3),
        (MultinomialSampling(top_p=0.62, temperature=2.0), 5),
        (MultinomialSampling(top_p=1e-6), 1),
        (MultinomialSampling(top_k=4, top_p=0.5), 2),
        (MultinomialSampling(top_k=5, top_p=0.9, temperature=1.3), 5),
    ],
    ids=str,
)
def test_samples_follow_the_defined_distribution(rule, support):
    expected, num_samples = expected_probabilities(rule), 20_000
    assert (expected > 0).sum() == support
    keys = row_keys(jax.random.key(1), jnp.arange(num_samples), jnp.full(num_samples, 7))
    samples = jax.jit(rule.sample)(jnp.tile(jnp.asarray(LOGITS), (num_samples, 1)), keys)
    frequency = np.bincount(np.asarray(samples), minlength=len(LOGITS)) / num_samples
    assert ((frequency > 0) <= (expected > 0)).all() and ((expected > 2e-3) <= (frequency > 0)).all()
    sigma = np.sqrt(expected * (1 - expected) / num_samples)
    assert (np.abs(frequency - expected) <= 4.5 * sigma + 1e-9).all()


@pytest.mark.parametrize("temperature", [1e-37, 1.2e-38, 1e-46])
@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.9}], ids=str)
def test_tiny_temperatures_select_the_most_likely_id(temperature, options):
    rule = MultinomialSampling(temperature=temperature, **options)
    logits = jnp.asarray([[39.0, 41.0, 42.0, -40.0, 40.0], [-39.0, -39.5, -45.0, -38.5, -1e4]])
    keys = jax.random.split(jax.random.key(0), (4, 2))
    assert jax.jit(jax.vmap(rule.sample, (None, 0)))(logits, keys).tolist() == [[2, 3]] * 4


def test_greedy_selects_the_lowest_of_tied_ids():
    keys = jax.random.split(jax.random.key(0), 2)
    assert Greedy().sample(jnp.asarray([LOGITS, -LOGITS]), keys).tolist() == [2, 5]


@on_based_worker
def test_samples_depend_on_seed_row_and_position():
    generator = sampling_generator()
    prompt_state = generator.fork(generator.prefill(prompts()), [0] * 4)
    first, again, other = (generator.generate(prompt_state, NUM_NEW, seed=seed).tokens for seed in (0, 0, 1))
    assert_identical(first, again)
    assert (first != other).any(axis=1).all()
    assert len({tuple(row) for row in first.tolist()}) == 4  # equal prompts have different samples
    assert all(len(set(row)) > 2 for row in first.tolist())
    by_row_id = generator.generate(prompt_state, NUM_NEW, row_ids=[3, 3, 0, 8]).tokens
    assert_identical(by_row_id[:3], first[[3, 3, 0]])
    keys = [
        row_keys(jax.random.key(0), jnp.array([row]), jnp.array([position]))
        for row in range(4)
        for position in range(4)
    ]
    assert len({tuple(np.asarray(jax.random.key_data(key)).ravel().tolist()) for key in keys}) == 16


# Errors


def generation_state(rows: int = 1) -> DecodingState:
    return greedy_generator("based").fork(greedy_generator("based").prefill(prompts()), list(range(rows)))


INVALID_PROMPTS = {
    "there are no prompts": lambda: pad_prompts([]),
    "prompt 1 has 3 tokens; it must have at most length=2": lambda: pad_prompts([[1], [1, 2, 3]], length=2),
    "prefix of prompt 0 is 3 tokens; it must be from 0 to the prompt's 1": lambda: pad_prompts([[1]], prefix_lengths=3),
    "prompt 0 has the token -1": lambda: pad_prompts([[1, -1]]),
    "prompt 1 has the token 23; ids of this model are 0 to 22": lambda: greedy_generator("based").prefill(
        pad_prompts([[1], [2, 23]])
    ),
    "prompt 1 is empty": lambda: greedy_generator("based").prefill(pad_prompts([[1], []])),
    "row 0 has several documents": lambda: greedy_generator("based").prefill(
        Prompts(np.array([[1, 2]]), SeqInfo(np.array([[0, 0]]), np.array([[1, 2]]), np.zeros((1, 2), bool)))
    ),
    "row 0 would have 49 tokens .* max_len is 48": lambda: greedy_generator("based").prefill(pad_prompts([[1] * 49])),
    "row 1 would have 50 tokens after generation; max_len is 48: increase it, or request 2": lambda: greedy_generator(
        "based"
    ).generate(generation_state(2)._replace(position=jnp.array([5, 40])), 10),
    "max_new_tokens is 0": lambda: greedy_generator("based").generate(generation_state(), 0),
    "chunk_size is 0": lambda: greedy_generator("based").prefill(pad_prompts([[1]]), chunk_size=0),
    "a continued document cannot have a prefix": lambda: greedy_generator("based").prefill(
        pad_prompts([[1, 2]], prefix_lengths=1), generation_state()
    ),
    "there are 2 prompts for a state of 1 rows": lambda: greedy_generator("based").prefill(
        pad_prompts([[1], [2]]), generation_state()
    ),
    "rows to fork are .0, 1.; .* from 0 to 0": lambda: greedy_generator("based").fork(generation_state(), [0, 1]),
    "the context has 2 rows": lambda: greedy_generator("based").answer(generation_state(2), [[1]], 2),
    "question_ids has 1 ids for 2": lambda: greedy_generator("based").answer(
        generation_state(), [[1], [2]], 2, question_ids=[0]
    ),
    "seed is 4294967296; it must be from 0 to 4294967295": lambda: greedy_generator("based").generate(
        generation_state(), 2, seed=2**32
    ),
    "seed is -1; it must be": lambda: greedy_generator("based").answer(generation_state(), [[1]], 2, seed=-1),
    "a row id is 2147483648; it must be from 0": lambda: greedy_generator("based").generate(
        generation_state(), 2, row_ids=[2**31]
    ),
    "row_ids has 3 ids for 1 rows": lambda: greedy_generator("based").generate(
        generation_state(), 2, row_ids=[0, 1, 2]
    ),
}


@on_based_worker
@pytest.mark.parametrize("message", INVALID_PROMPTS)
def test_invalid_prompts_are_rejected(message):
    with pytest.raises(PromptError, match=message):
        INVALID_PROMPTS[message]()


def test_invalid_options_are_rejected():
    for make, message in (
        (lambda: MultinomialSampling(temperature=0.0), r"temperature is 0.0; it must be above 0.*Greedy"),
        (lambda: MultinomialSampling(temperature=float("nan")), "temperature is nan"),
        (lambda: MultinomialSampling(top_k=0), "top_k is 0"),
        (lambda: MultinomialSampling(top_p=1.5), "top_p is 1.5"),
        (lambda: MultinomialSampling(top_p=0.0), "top_p is 0.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
    with pytest.raises(ConfigError, match="stop_token_ids has the token 23"):
        Generator(model("based"), max_len=8, stop_token_ids=[23])
    with pytest.raises(ConfigError, match="max_len is 1"):
        Generator(model("based"), max_len=1)
    block = {"based": Block(mixer=MIXERS["based"])}
    config = LMConfig(d_model=16, vocab_size=9, pattern="based", blocks=block, lm_head=Autoencoder())
    with pytest.raises(ConfigError, match=r"Autoencode.*cannot decode"):
        Generator(accounting.abstract_model(config), max_len=8)


@on_based_worker
def test_non_finite_logits_are_one_error(monkeypatch, capsys):
    generator, state = greedy_generator("based"), generation_state(4)
    token = int(generator.generate(state, 1).tokens[0, 0])
    weights = jax.tree.map(lambda x: x, generator._weights)
    embedding = weights["embedding"][...]
    weights["embedding"][...] = embedding.at[token].set(jnp.nan)  # only the first step after this token is not finite
    monkeypatch.setattr(generator, "_weights", weights)
    with pytest.raises(NonFiniteLogitsError, match="logits of row 0 are not finite"):
        generator.generate(state, 2)

    def command():
        raise NonFiniteLogitsError("the logits are not finite")

    assert run_with_error_messages(command) == EXIT_FAILURE
    assert capsys.readouterr().err == "recallax: the logits are not finite\n"


def test_too_long_prefix_is_rejected():
    """Without the check, the layer returns NaN."""
    block = {"prefix": Block(mixer=PrefixLinear(memory=Based(feature_dim=4), max_prefix_len=4))}
    config = LMConfig(d_model=16, vocab_size=VOCAB, pattern="prefix", blocks=block)
    generator = Generator(config.build(nnx.Rngs(0)), max_len=16)
    with pytest.raises(PromptError, match="row 1 has 5 prefix tokens; PrefixLinear of block 'prefix' reads at most 4"):
        generator.prefill(pad_prompts(token_ids(0, (5, 6)), prefix_lengths=(4, 5)))
    with pytest.raises(NonFiniteLogitsError, match="after prompt 1 are not finite"):
        generator.document_limits = DocumentLimits(layers=())
        generator.prefill(pad_prompts(token_ids(0, (5, 6)), prefix_lengths=(4, 5)))
