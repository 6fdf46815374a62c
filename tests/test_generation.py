"""Generation against the whole call, on either padding, in pieces, forked, sampled and stopped."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float, Int, Key

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
from recallax.models import LM, Autoencoder, Block, LMConfig, Untied, accounting
from recallax.models.generation import NO_TOKEN, DecodingState, Generator
from recallax.models.prompts import PromptError, Prompts, pad_prompts, unpack_documents
from recallax.models.sampling import Greedy, MultinomialSampling, Sampling, row_keys
from recallax.pallas_kernels.neural_memory.inner_optimizer import InnerOptimizer, LinearNet
from recallax.tasks import ContextRepetition, Copying, StateTracking
from recallax.train.inference import first_question
from recallax.types import SeqInfo
from tests.test_laws import close

pytestmark = pytest.mark.usefixtures("strict", "chunks_of_four")

VOCAB, MAX_LEN = 23, 48
LENGTHS, NEW = (5, 14, 9, 1), 6
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
SWEPT = ("retrieval", "mom")


def parametrize_on_one_worker(*names: str, swept: Sequence[str] = SWEPT):
    """All laws of a mixer in one process, which compiles its programs once: four rows of 14 tokens, and six more."""
    marks = {name: [pytest.mark.full] if name in swept else [] for name in names}
    params = [pytest.param(name, marks=[pytest.mark.xdist_group(f"generation-{name}"), *marks[name]]) for name in names]
    return pytest.mark.parametrize("name", params)


each_mixer = parametrize_on_one_worker(*MIXERS)


@functools.cache
def model(name: str) -> LM:
    """Two repeated layers and a window, so that a state has leaves with rows on different axes."""
    blocks = {
        "conv": Block(mixer=BaseConv(conv_size=3), channel=Identity()),
        "mixer": Block(mixer=MIXERS[name], channel=Identity()),
        "window": Block(mixer=SlidingWindow(window=4, num_heads=2), channel=Identity()),
    }
    pattern = {"based": "conv mixer*2 window"}.get(name, "mixer*2")
    config = LMConfig(d_model=16, vocab_size=VOCAB, pattern=pattern, blocks=blocks, lm_head=Untied())
    graph, params, rest = nnx.split(config.build(nnx.Rngs(0)), nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    size = 0.05 if name == "titans" else 0.3  # memories that learn blow rounding up
    leaves = [x + size * jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(leaves)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest)


@functools.cache
def greedy(name: str) -> Generator:
    return Generator(model(name), max_len=MAX_LEN)


@functools.cache
def sampled() -> Generator:
    return Generator(model("based"), max_len=MAX_LEN, sampling=MultinomialSampling(temperature=3.0, top_k=20))


on_based = pytest.mark.xdist_group("generation-based")


def token_ids(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(VOCAB, size=n).tolist() for n in lengths]


def prompts(name: str = "based", **choices) -> Prompts:
    return pad_prompts(token_ids(0, LENGTHS), prefix_lengths=PREFIXES.get(name, 0), **choices)


def same(a, b) -> None:
    """Every leaf bit for bit."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# The loop against the call


@parametrize_on_one_worker(
    "based", "landmark", "titans", "prefix", "mom", swept=("titans", "mom")
)  # retrieval: another function
def test_greedy_tokens_are_the_likeliest_of_the_whole_call(name):
    generator = greedy(name)
    done = generator.generate(generator.prefill(prompts(name)), NEW)
    assert done.tokens.shape == (4, NEW) and (done.lengths == NEW).all()
    assert len(set(done.tokens.ravel().tolist())) > 5  # the law could fail
    rows = [[*prompt, *more] for prompt, more in zip(token_ids(0, LENGTHS), done.tokens.tolist(), strict=True)]
    tokens, seq = pad_prompts(rows, prefix_lengths=PREFIXES.get(name, 0))
    at = np.array(LENGTHS)[:, None] - 1 + np.arange(NEW + 1)[None]
    graph, weights = nnx.split(model(name))
    logits, _ = jax.jit(lambda *of: nnx.merge(graph, weights)(*of))(jnp.asarray(tokens), seq, at)
    np.testing.assert_array_equal(np.asarray(logits[:, :-1]).argmax(axis=-1), done.tokens)
    close(done.state.logits, logits[:, -1])
    assert done.state.position.tolist() == [n + NEW for n in LENGTHS]


@on_based
def test_a_generation_may_be_divided():
    generator = sampled()
    begun = generator.prefill(prompts())
    whole = generator.generate(begun, NEW, seed=3)
    first = generator.generate(begun, NEW // 2, seed=3)
    second = generator.generate(first.state, NEW // 2, seed=3)
    np.testing.assert_array_equal(np.concatenate([first.tokens, second.tokens], axis=1), whole.tokens)
    same(second.state, whole.state)


class CountingSampler(Sampling):
    """Greedy, and tells how often it is traced and how often it runs."""

    def __init__(self) -> None:
        self.traced, self.ran = [], []

    def sample(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        self.traced.append(logits.shape)
        jax.debug.callback(lambda: self.ran.append(1))
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@on_based
def test_the_loop_is_compiled_once_and_ends_when_all_rows_have_stopped():
    begun = greedy("based").prefill(prompts())
    wanted = greedy("based").generate(begun, NEW)
    stop = sorted({int(wanted.tokens[row, row + 1]) for row in range(4)})
    ends = [1 + min(np.flatnonzero(np.isin(row, stop)), default=NEW) for row in wanted.tokens]
    assert max(ends) < NEW and len(set(ends)) > 1
    counted = CountingSampler()
    generator = Generator(model("based"), max_len=MAX_LEN, sampling=counted, stop_token_ids=stop)
    for seed in range(3):
        done = generator.generate(begun, NEW, seed=seed)
    jax.effects_barrier()
    assert counted.traced == [(4, VOCAB)]
    assert len(counted.ran) == 3 * max(ends)
    assert done.lengths.tolist() == ends
    for row, end in enumerate(ends):
        assert done.sequences()[row].tolist() == wanted.tokens[row, :end].tolist()
        assert (done.tokens[row, end:] == NO_TOKEN).all()


@parametrize_on_one_worker("based", "landmark", "titans", "mom", swept=("titans", "mom"))
def test_a_stopped_row_keeps_its_state_bit_for_bit(name):
    """While the others go on; it is that of the tokens before the stop token."""
    begun = greedy(name).prefill(prompts(name))
    free = greedy(name).generate(begun, NEW)
    stop = next(int(t) for t in free.tokens[3, 1:] if not (free.tokens == t).any(axis=1).all())
    generator = Generator(model(name), max_len=MAX_LEN, stop_token_ids=[stop])
    done = generator.generate(begun, NEW)
    ends = [row.index(stop) if stop in row else NEW for row in free.tokens.tolist()]
    assert done.lengths.tolist() == [min(end + 1, NEW) for end in ends] and max(ends) == NEW
    assert done.state.active.tolist() == [end == NEW for end in ends]
    again = generator.generate(done.state, NEW)
    ids = token_ids(0, LENGTHS)
    read = [[*ids[row], *free.tokens[row, :end].tolist()][:14] for row, end in enumerate(ends)]
    wanted = greedy(name).prefill(pad_prompts(read, length=14))
    for row in np.flatnonzero(np.array(ends) < NEW).tolist():
        assert again.lengths[row] == 0 and again.state.position[row] == len(ids[row]) + ends[row]
        same(generator.fork(again.state, [row]), generator.fork(done.state, [row]))
        if len(ids[row]) + ends[row] <= 14:
            close(generator.fork(done.state, [row])[:3], generator.fork(wanted, [row])[:3], 1e-4)
    # A stopped row goes on with what is read next.
    more = greedy(name).prefill(pad_prompts(token_ids(5, (2, 2, 2, 2)), length=14), done.state)
    assert more.active.all() and (more.position == done.state.position + 2).all()


# Batches


@each_mixer
def test_padding_on_either_side_and_packed_rows_are_the_same_prompts(name):
    generator = greedy(name)
    right = generator.generate(generator.prefill(prompts(name)), NEW)
    same(generator.generate(generator.prefill(prompts(name, padding_side="left")), NEW), right)
    # The same prompts in two packed rows.
    ids, ahead = token_ids(0, LENGTHS), PREFIXES.get(name, (0,) * 4)
    tokens, segments, positions = np.zeros((3, 2, 20), np.int32)
    prefix = np.zeros((2, 20), bool)
    for row, first, number, which in ((0, 0, 1, 0), (0, 5, 2, 1), (1, 2, 7, 2), (1, 11, 3, 3)):
        here = slice(first, first + LENGTHS[which])
        tokens[row, here], segments[row, here], positions[row, here] = ids[which], number, np.arange(LENGTHS[which])
        prefix[row, here] = positions[row, here] < ahead[which]
    apart = unpack_documents(tokens, SeqInfo(positions, segments, prefix))
    same(apart, prompts(name))
    same(generator.generate(generator.prefill(apart), NEW), right)


@each_mixer
def test_a_row_depends_neither_on_the_others_nor_on_its_place(name):
    generator, order = greedy(name), [2, 0, 3, 1]
    ids, ahead = token_ids(0, LENGTHS), PREFIXES.get(name, (0,) * 4)
    done = generator.generate(generator.prefill(prompts(name)), NEW)
    moved = pad_prompts([ids[i] for i in order], prefix_lengths=[ahead[i] for i in order])
    other = generator.generate(generator.prefill(moved), NEW)
    same(other.tokens, done.tokens[order])
    same(other.state, generator.fork(done.state, order))
    strangers = token_ids(9, (11, 14, 2, 3))
    beside = pad_prompts([strangers[0], ids[1], *strangers[2:]], prefix_lengths=[0, ahead[1], 0, 0])
    among = generator.generate(generator.prefill(beside), NEW)
    same(among.tokens[1], done.tokens[1])
    same(generator.fork(among.state, [1]), generator.fork(done.state, [1]))
    assert (among.tokens[0] != done.tokens[0]).any()


# Forks


@each_mixer
def test_generation_does_not_depend_on_batch_order(name):
    """An answer reads at most 14 tokens here, and so does a prompt: they share their programs."""
    generator, context = greedy(name), 2
    begun = generator.fork(generator.prefill(prompts(name)), [context])
    kept = jax.tree.map(np.array, begun)
    questions = token_ids(3, (3, 1, 4, 2, 4, 1))
    answers = generator.answer(begun, questions, NEW, batch_size=4, max_question_length=14)
    same(begun, kept)
    order = [5, 3, 0, 1, 4, 2]
    again = generator.answer(begun, [questions[i] for i in order], NEW, batch_size=4, max_question_length=14)
    same(again, [answers[i] for i in order])
    same(generator.answer(begun, questions[3:4], NEW, batch_size=4, max_question_length=14), answers[3:4])
    assert len({tuple(answer.tolist()) for answer in answers}) > 2
    # The states, too.
    copies = generator.fork(begun, [0] * 4)
    first, second = (
        generator.prefill(pad_prompts([questions[i] for i in some], length=14), copies)
        for some in ((0, 1, 2, 3), (2, 5, 1, 0))
    )
    same(generator.fork(first, [0, 1, 2, 2]), generator.fork(second, [3, 2, 0, 0]))
    # And what they say is what a prompt of context and question says.
    ids, ahead = token_ids(0, LENGTHS)[context], PREFIXES.get(name, (0,) * 4)[context]
    whole = generator.prefill(
        pad_prompts([ids + question for question in questions[:4]], prefix_lengths=ahead, length=14)
    )
    close(first.model_state, whole.model_state, 1e-4)
    close(first.logits, whole.logits, 1e-4)
    same(generator.generate(whole, NEW).sequences(), answers[:4])


@on_based
def test_sampled_answers_are_keyed_by_name():
    generator = sampled()
    begun = generator.fork(generator.prefill(prompts()), [2])
    questions, order = token_ids(3, (3, 1, 4)), [2, 0, 1]
    answers = generator.answer(begun, questions, NEW, batch_size=4, max_question_length=14)
    shuffled = [questions[i] for i in order]
    same(
        generator.answer(begun, shuffled, NEW, batch_size=4, max_question_length=14, question_ids=order),
        [answers[i] for i in order],
    )
    twice = generator.answer(begun, [questions[0], questions[0]], NEW, batch_size=4, max_question_length=14)
    same(twice[0], answers[0])
    assert (twice[0] != twice[1]).any()


# Pieces


@each_mixer
def test_a_prompt_may_be_read_in_pieces(name, monkeypatch):
    """Across landmarks and grids, which they do not fit; rows end in different pieces."""
    generator, piece = greedy(name), 6
    whole = generator.prefill(prompts(name))
    read: list[int] = []
    reader = generator._prefill_chunk_jit

    def counted(weights, here, tokens, *more):
        read.append(tokens.shape[1])
        return reader(weights, here, tokens, *more)

    with monkeypatch.context() as patched:
        patched.setattr(generator, "_prefill_chunk_jit", counted)
        pieces = generator.prefill(prompts(name, padding_side="left"), chunk_size=piece)
    assert read == [piece] * -(-max(LENGTHS) // piece)
    close(pieces.model_state, whole.model_state)
    close(pieces.logits, whole.logits)
    same(pieces[2:], whole[2:])
    same(generator.generate(pieces, NEW).tokens, generator.generate(whole, NEW).tokens)
    if name in PREFIXES:
        with pytest.raises(PromptError, match=r"prefix of prompt 1 is 6 tokens.*chunk_size is 5: increase it"):
            generator.prefill(prompts(name), chunk_size=5)
        causal = generator.prefill(prompts())
        assert jnp.abs(causal.logits - whole.logits).max() > 0.01  # the prefix counts


# A task's questions


def test_task_prompt_ends_before_its_answer():
    copying = first_question(Copying(test_lengths=(6,)), "test", 0)
    assert copying.prompt[0] == 26 and copying.prompt[-1] == 27 and copying.prefix_length == 7
    assert copying.answer.tolist() == [*copying.prompt[1:-1], 28]
    task = StateTracking(test_lengths=(9,))  # asks at every token, and its answers are not what follows
    dense = first_question(task, "test", 0)
    assert (len(dense.prompt), len(dense.answer), dense.prefix_length) == (1, 1, 0)
    filled = ContextRepetition(fill_strategy="iterate", prefix_length=11)
    reread = first_question(filled.apply_to_task(Copying(test_lengths=(6,))), "test", 0)
    assert (
        reread.prompt[:11].tolist() == filled.apply_to_context(copying.prompt[:7], Copying()).tolist()
        and reread.prefix_length == 11
    )
    same(reread.answer, copying.answer)


# Sampling

LOGITS = np.array([1.0, -0.5, 2.0, 2.0, 0.3, -3.0, 1.0, 0.9, 1.6, -1.0], np.float32)


def expected_probabilities(rule: MultinomialSampling) -> np.ndarray:
    """Its probabilities by the definition, one id after the other."""
    scaled = np.exp(LOGITS.astype(np.float64) / rule.temperature)
    order = sorted(range(len(LOGITS)), key=lambda i: (-LOGITS[i], i))[: rule.top_k]
    wanted, total, reached = np.zeros(len(LOGITS)), sum(scaled[i] for i in order), 0.0
    for i in order:
        if rule.top_p is not None and reached >= rule.top_p:
            break
        wanted[i] = scaled[i]
        reached += scaled[i] / total
    return wanted / wanted.sum()


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
def test_draws_have_the_distribution_that_the_rule_defines(rule, support):
    wanted, draws = expected_probabilities(rule), 20_000
    assert (wanted > 0).sum() == support
    keys = row_keys(jax.random.key(1), jnp.arange(draws), jnp.full(draws, 7))
    drawn = jax.jit(rule.sample)(jnp.tile(jnp.asarray(LOGITS), (draws, 1)), keys)
    share = np.bincount(np.asarray(drawn), minlength=len(LOGITS)) / draws
    assert ((share > 0) <= (wanted > 0)).all() and ((wanted > 2e-3) <= (share > 0)).all()
    sigma = np.sqrt(wanted * (1 - wanted) / draws)
    assert (np.abs(share - wanted) <= 4.5 * sigma + 1e-9).all()


def test_the_likeliest_of_equals_is_the_lowest():
    keys = jax.random.split(jax.random.key(0), 2)
    assert Greedy().sample(jnp.asarray([LOGITS, -LOGITS]), keys).tolist() == [2, 5]


@on_based
def test_draws_are_keyed_by_seed_row_and_position():
    generator = sampled()
    begun = generator.fork(generator.prefill(prompts()), [0] * 4)
    first, again, other = (generator.generate(begun, NEW, seed=seed).tokens for seed in (0, 0, 1))
    same(first, again)
    assert (first != other).any(axis=1).all()
    assert len({tuple(row) for row in first.tolist()}) == 4  # equal prompts, own draws
    assert all(len(set(row)) > 2 for row in first.tolist())
    named = generator.generate(begun, NEW, row_ids=[3, 3, 0, 8]).tokens
    same(named[:3], first[[3, 3, 0]])
    keys = [row_keys(jax.random.key(0), jnp.array([row]), jnp.array([at])) for row in range(4) for at in range(4)]
    assert len({tuple(np.asarray(jax.random.key_data(key)).ravel().tolist()) for key in keys}) == 16


# Refusals


def generation_state(rows: int = 1) -> DecodingState:
    return greedy("based").fork(greedy("based").prefill(prompts()), list(range(rows)))


WRONG = {
    "there are no prompts": lambda: pad_prompts([]),
    "prompt 1 has 3 tokens; it must have at most length=2": lambda: pad_prompts([[1], [1, 2, 3]], length=2),
    "prefix of prompt 0 is 3 tokens; it must be from 0 to the prompt's 1": lambda: pad_prompts([[1]], prefix_lengths=3),
    "prompt 0 has the token -1": lambda: pad_prompts([[1, -1]]),
    "prompt 1 has the token 23; ids of this model are 0 to 22": lambda: greedy("based").prefill(
        pad_prompts([[1], [2, 23]])
    ),
    "prompt 1 is empty": lambda: greedy("based").prefill(pad_prompts([[1], []])),
    "row 0 has several documents": lambda: greedy("based").prefill(
        Prompts(np.array([[1, 2]]), SeqInfo(np.array([[0, 0]]), np.array([[1, 2]]), np.zeros((1, 2), bool)))
    ),
    "row 0 would have 49 tokens .* max_len is 48": lambda: greedy("based").prefill(pad_prompts([[1] * 49])),
    "row 1 would have 50 tokens after generation; max_len is 48: increase it, or request 2": lambda: greedy(
        "based"
    ).generate(generation_state(2)._replace(position=jnp.array([5, 40])), 10),
    "max_new_tokens is 0": lambda: greedy("based").generate(generation_state(), 0),
    "chunk_size is 0": lambda: greedy("based").prefill(pad_prompts([[1]]), chunk_size=0),
    "a continued document cannot have a prefix": lambda: greedy("based").prefill(
        pad_prompts([[1, 2]], prefix_lengths=1), generation_state()
    ),
    "there are 2 prompts for a state of 1 rows": lambda: greedy("based").prefill(
        pad_prompts([[1], [2]]), generation_state()
    ),
    "rows to fork are .0, 1.; .* from 0 to 0": lambda: greedy("based").fork(generation_state(), [0, 1]),
    "the context has 2 rows": lambda: greedy("based").answer(generation_state(2), [[1]], 2),
    "question_ids has 1 ids for 2": lambda: greedy("based").answer(generation_state(), [[1], [2]], 2, question_ids=[0]),
    "row_ids has 3 ids for 1 rows": lambda: greedy("based").generate(generation_state(), 2, row_ids=[0, 1, 2]),
}


@on_based
@pytest.mark.parametrize("message", WRONG)
def test_wrong_prompts_are_refused(message):
    with pytest.raises(PromptError, match=message):
        WRONG[message]()


def test_wrong_settings_are_refused():
    for wrong, message in (
        (lambda: MultinomialSampling(temperature=0.0), r"temperature is 0.0; it must be above 0.*Greedy"),
        (lambda: MultinomialSampling(temperature=float("nan")), "temperature is nan"),
        (lambda: MultinomialSampling(top_k=0), "top_k is 0"),
        (lambda: MultinomialSampling(top_p=1.5), "top_p is 1.5"),
        (lambda: MultinomialSampling(top_p=0.0), "top_p is 0.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            wrong()
    with pytest.raises(ConfigError, match="stop_token_ids has the token 23"):
        Generator(model("based"), max_len=8, stop_token_ids=[23])
    with pytest.raises(ConfigError, match="max_len is 1"):
        Generator(model("based"), max_len=1)
    block = {"based": Block(mixer=MIXERS["based"])}
    config = LMConfig(d_model=16, vocab_size=9, pattern="based", blocks=block, lm_head=Autoencoder())
    with pytest.raises(ConfigError, match=r"Autoencode.*cannot decode"):
        Generator(accounting.abstract_model(config), max_len=8)


def test_a_prefix_beyond_what_the_model_reads_is_refused():
    """Instead of the NaN that the layer makes of it."""
    block = {"prefix": Block(mixer=PrefixLinear(memory=Based(feature_dim=4), max_prefix_len=4))}
    config = LMConfig(d_model=16, vocab_size=VOCAB, pattern="prefix", blocks=block)
    generator = Generator(config.build(nnx.Rngs(0)), max_len=16)
    with pytest.raises(PromptError, match="prefix of prompt 1 is 5 tokens; this model reads at most 4"):
        generator.prefill(pad_prompts(token_ids(0, (5, 6)), prefix_lengths=(4, 5)))
    with pytest.raises(FloatingPointError, match="after prompt 1 are not finite"):
        generator.max_prefix = 5
        generator.prefill(pad_prompts(token_ids(0, (5, 6)), prefix_lengths=(4, 5)))
