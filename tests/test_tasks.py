"""Recall tasks: tests that run for every task, then tests of single tasks.

`RECALLAX_WRITE_GOLDEN=1 pytest tests/test_tasks.py -k golden` rewrites the golden rows.
"""

import importlib
import inspect
import itertools
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from experiments.window_reach.sweep import fraction_within_window
from recallax import tasks
from recallax.config import Config, ConfigError, from_json, to_json
from recallax.tasks import MQAR, SPLITS, MixtureSlice, OverwriteSlice, Split, Task
from recallax.tasks.base import most_frequent_token_accuracy
from recallax.tasks.masked_prefix import masked_prefix_loss_weights
from recallax.tasks.mqar import sample_query_slots
from recallax.tasks.random_ids import first_occurrence, sample_without_replacement
from recallax.tasks.repeated_context import FillStrategy, repeat_batch_context
from recallax.tasks.state_tracking import cayley_table
from recallax.tasks.task_transform import TaskTransform
from recallax.types import Batch, check_shapes

GOLDEN = Path(__file__).parent / "golden" / "tasks.json"
MQAR_MIXTURE = (
    MixtureSlice(length=32, num_kv_pairs=2, num_examples=3),
    MixtureSlice(length=32, num_kv_pairs=6),
    MixtureSlice(length=48, num_kv_pairs=4),
)

CASES: dict[str, Task] = {
    "mqar": MQAR(
        vocab_size=64, mixture=MQAR_MIXTURE, test_mixture=(*MQAR_MIXTURE[1:], MixtureSlice(length=64, num_kv_pairs=16))
    ),
    "mqar_zoology": MQAR.single(length=32, num_kv_pairs=4, vocab_size=64, filler="zoology"),
    "mqar_zero": MQAR.single(length=32, num_kv_pairs=8, vocab_size=64, filler="zero", test_slices=((32, 8), (64, 8))),
    "mqar_twice": MQAR(
        vocab_size=64, mixture=MQAR_MIXTURE[:1], test_mixture=(MixtureSlice(length=36, num_kv_pairs=6),), num_passes=2
    ),
    "mqar_full_vocabulary": MQAR.single(length=32, num_kv_pairs=7, vocab_size=16),
    "overwrites": tasks.OverwriteRecall(
        vocab_size=40,
        noise_vocab_size=8,
        mixture=(
            OverwriteSlice(length=48, num_keys=4, num_writes=4, num_examples=2),
            OverwriteSlice(length=48, num_keys=3, num_writes=8),
        ),
        test_mixture=(
            OverwriteSlice(length=48, num_keys=3, num_writes=8),
            OverwriteSlice(length=96, num_keys=6, num_writes=42),
        ),
    ),
    "overwrites_full_vocabulary": tasks.OverwriteRecall.length_extrapolation(
        length=24, num_keys=4, num_writes=5, length_factors=(1, 2), vocab_size=9, noise_vocab_size=1
    ),
    "in_context_recall": tasks.InContextRecall(length=32),
    "noisy_recall": tasks.NoisyRecall(length=32, frac_noise=0.6),
    "fuzzy_recall": tasks.FuzzyRecall(length=48, vocab_size=12),
    "selective_copying": tasks.SelectiveCopying(length=40, num_tokens_to_copy=8),
    "compression": tasks.Compression(),
    "memorization": tasks.Memorization(length=16),
    "copying": tasks.Copying(train_lengths=(8, 16), test_lengths=(12, 30)),
    "induction": tasks.InductionHeads(length=64, test_lengths=(32, 64, 128)),
    "key_retrieval": tasks.KeyRetrieval(
        train_slices=((32, 2), (48, 4)), queries_per_fact=2, test_slices=((48, 1), (48, 4), (96, 4))
    ),
    "set_disjointness": tasks.SetDisjointness(
        vocab_size=64, set_sizes=((2, 8), (4, 4)), test_set_sizes=((2, 8), (4, 20))
    ),
    **{
        f"state_tracking_{g}": tasks.StateTracking(group=g, length=40, test_lengths=(40, 64))
        for g in ("parity", "S3", "A5", "Z60", "S5")
    },
}
CASES["text"] = tasks.Text(length=48, ngram_size=4, max_ngram_count=200)
CASES["set_disjointness_long_first"] = tasks.SetDisjointness(
    vocab_size=64, set_sizes=((4, 8),), test_set_sizes=((3, 9),), order="long_first"
)
CASES |= {
    "repeated_mqar": tasks.JRTPrompt(task=CASES["mqar"], num_repeats=3),
    "repeated_sets": tasks.JRTPrompt(task=CASES["set_disjointness"]),
    "filled_mqar": tasks.PrefixFill(task=CASES["mqar"], prefix_length=10, strategy="iterate"),
    "filled_sets": tasks.PrefixFill(task=CASES["set_disjointness"], prefix_length=23, strategy="twice"),
    "masked_mqar": tasks.MaskedPrefix(task=CASES["mqar"]),
    "masked_recall": tasks.MaskedPrefix(task=CASES["in_context_recall"], prefix_length=12, mask_token_id=1),
}
each_task = pytest.mark.parametrize("task", [pytest.param(task, id=name) for name, task in CASES.items()])


def batches(task: Task, split: Split, count: int = 8, size: int = 6, seed: int = 0) -> list[Batch]:
    return [task.batch(seed, split, index, size) for index in range(count)]


def accuracy(answers: np.ndarray, batch: Batch) -> float:
    return float(np.sum((answers == batch.targets) * batch.weights) / np.sum(batch.weights))


# ---- every task


def test_cases_cover_every_exported_task():
    exported = {
        v for v in vars(tasks).values() if isinstance(v, type) and issubclass(v, Task) and not inspect.isabstract(v)
    }
    assert {type(task) for task in CASES.values()} == exported


@each_task
def test_batch_is_a_pure_function_of_its_arguments(task):
    def leaves(*arguments) -> list[np.ndarray]:
        batch = task.batch(*arguments)
        return [*batch[:-1], *batch.seq[:-1]]

    first = leaves(0, "train", 1, 5)
    leaves(3, "test", 7, 2)
    assert all(np.array_equal(a, b) for a, b in zip(first, leaves(0, "train", 1, 5), strict=True))
    for other in ((1, "train", 1, 5), (0, "valid", 1, 5), (0, "test", 1, 5), (0, "train", 2, 5)):
        assert not np.array_equal(first[0], leaves(*other)[0]), other


@each_task
def test_no_array_of_a_batch_aliases_another(task):
    batch = task.batch(0, "test", 0, 2)
    assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(batch[:-1], 2))
    assert all(a.flags.writeable for a in batch[:-1])


@each_task
@pytest.mark.parametrize("split", SPLITS)
def test_shapes_dtypes_and_ranges(task, split):
    for batch in batches(task, split):
        check_shapes(batch)
        check_shapes(batch.seq)
        assert [a.dtype.name for a in batch[:-1]] == ["int32", "int32", "float32", "int32", "int32"]
        assert [a.dtype.name for a in batch.seq[:-1]] == ["int32", "int32", "bool"]
        assert batch.tokens.shape[0] == 6 and batch.tokens.shape[1] in task.lengths(split)
        for ids, below in ((batch.tokens, task.vocab_size), (batch.targets, task.vocab_size)):
            assert ids.min() >= 0 and ids.max() < below
        assert batch.group.min() >= 0 and batch.group.max() < len(task.groups)
        assert batch.term.min() >= 0 and batch.term.max() < len(task.terms)
        assert batch.weights.min() >= 0 and np.all(batch.weights.sum(axis=1) > 0)


@each_task
@pytest.mark.parametrize("split", SPLITS)
def test_padding_is_on_the_right_with_weight_0(task, split):
    for batch in batches(task, split):
        segments, positions = batch.seq.segment_ids, batch.seq.positions
        real = segments > 0
        assert np.all(np.diff(real.astype(int), axis=1) <= 0) and np.all(segments[:, 0] == 1)
        assert not np.any(batch.weights[~real])
        packed = isinstance(task, tasks.Text)
        assert packed or (segments.max() == 1 and np.array_equal(positions[0], np.arange(batch.tokens.shape[1])))
        starts = real & (np.diff(segments, axis=1, prepend=0) != 0)
        assert np.array_equal(starts[real], positions[real] == 0)
        assert np.all(np.diff(segments, axis=1)[starts[:, 1:]] == 1)
        assert np.all(np.diff(positions, axis=1)[real[:, 1:] & ~starts[:, 1:]] == 1)


@each_task
@pytest.mark.parametrize("split", SPLITS)
def test_prefix_is_the_context_before_all_targets(task, split):
    """Masked tokens, which only train batches have, are targets within the prefix."""
    sizes: dict[int, set[int]] = {}
    for batch in batches(task, split, count=40):
        length, prefix = batch.tokens.shape[1], batch.seq.prefix
        prefix_lengths = prefix.sum(axis=1)
        assert np.array_equal(prefix, np.arange(length) < prefix_lengths[:, None])
        assert not np.any(prefix & (batch.seq.segment_ids == 0))
        assert not np.any(batch.weights[prefix & (batch.term == 0)])
        sizes.setdefault(length, set()).update(prefix_lengths.tolist())
    for length, observed in sizes.items():
        assert sorted(observed) == list(task.prefix_lengths(split, length))


@each_task
@pytest.mark.parametrize("split", ["valid", "test"])
def test_oracle_is_correct(task, split):
    for batch in batches(task, split, count=12, size=16):
        before = batch.tokens.copy()
        assert accuracy(task.solve(batch.tokens), batch) == 1.0
        assert np.array_equal(before, batch.tokens)


@each_task
@pytest.mark.parametrize("split", SPLITS)
def test_lengths_groups_and_max_targets(task, split):
    most: Counter[int] = Counter()
    groups: set[int] = set()
    for batch in batches(task, split, count=40):
        length, labelled = batch.tokens.shape[1], batch.weights > 0
        most[length] = max(most[length], int(labelled.sum(axis=1).max()))
        groups |= set(batch.group[labelled].tolist())
    assert sorted(most) == list(task.lengths(split)) == sorted(set(task.lengths(split)))
    recalls = tasks.InContextRecall | tasks.NoisyRecall | tasks.FuzzyRecall
    recall = isinstance(task.task if isinstance(task, TaskTransform) else task, recalls)
    for length, count in most.items():
        bound = task.max_targets(split, length)
        # Recall rows reach the bound only if they repeat a single key, which is too rare to occur here.
        # Transformed rows of equal length may come from rows of different lengths.
        # Text has one label less than its bound, because computing all logits is cheaper than gathering all but one.
        assert count <= bound if recall or isinstance(task, TaskTransform | tasks.Text) else count == bound
    if split == "test" and not recall:
        trained = {int(g) for b in batches(task, "train", count=40) for g in np.unique(b.group[b.weights > 0])}
        assert groups | trained == set(range(len(task.groups)))
    if split == "test" and recall:
        assert groups == {task.groups.index("recall")}


@each_task
def test_train_and_test_rows_are_disjoint(task):
    if isinstance(task, tasks.Memorization):
        pytest.skip("the same keys are queries in every split by definition")
    rows = {s: {row.tobytes() for b in batches(task, s, 40, 16) for row in b.tokens} for s in SPLITS}
    assert not rows["train"] & rows["test"] and not rows["train"] & rows["valid"] and not rows["valid"] & rows["test"]
    assert len(rows["train"]) == 40 * 16


@each_task
def test_shortcuts_do_not_exceed_chance(task):
    """Shortcuts ignore the query: a constant, the previous token, and the most frequent token of the row."""
    trained = [b.targets[(b.weights > 0) & (b.group == b.group.max())] for b in batches(task, "train", 24)]
    constant = np.bincount(np.concatenate(trained)).argmax()
    scores = {"constant": [], "token before": [], "most frequent token": []}
    size = 32 if isinstance(task, tasks.Text) else 48  # an epoch of the text has no more rows
    for batch in batches(task, "test", count=24, size=size):
        most_frequent = np.array([np.bincount(row).argmax() for row in batch.tokens])[:, None]
        scores["constant"].append(accuracy(np.full_like(batch.targets, constant), batch))
        scores["token before"].append(accuracy(np.roll(batch.tokens, 1, axis=1), batch))
        scores["most frequent token"].append(accuracy(np.broadcast_to(most_frequent, batch.targets.shape), batch))
    if isinstance(task.task if isinstance(task, TaskTransform) else task, tasks.SetDisjointness):
        assert np.mean(scores.pop("most frequent token")) == 1.0  # only the shared token occurs twice
    assert 0 < task.chance() < 1
    for name, accuracies in scores.items():
        assert np.mean(accuracies) < task.chance() + 0.03, name


@pytest.mark.parametrize(
    ("task", "answers", "values"),
    [(CASES["selective_copying"], 8, 14), (CASES["compression"], 31, 15), (tasks.Copying(test_lengths=(12,)), 12, 26)],
)
def test_most_frequent_token_accuracy(task, answers, values):
    draws = np.random.default_rng(0).integers(values, size=(4000, answers))
    share = np.mean([np.bincount(row).max() for row in draws]) / answers
    if isinstance(task, tasks.Copying):
        share *= 12 / 13  # the final "." is not a letter
    assert task.chance() == pytest.approx(share, rel=0.03)


def test_chance_of_mqar_and_set_disjointness():
    assert MQAR.single(length=64, num_kv_pairs=4, test_slices=((64, 4), (64, 8))).chance() == pytest.approx(3 / 16)
    assert tasks.SetDisjointness(test_set_sizes=((1, 4), (4, 8))).chance() == pytest.approx(5 / 8)
    task = CASES["mqar_zero"]
    assert most_frequent_token_accuracy(task, task.vocab_size // 2, task.vocab_size - 1) == pytest.approx(task.chance())


@each_task
def test_config_json_round_trip(task):
    assert from_json(to_json(task), Task) == task


@each_task
def test_batches_have_random_access(task):
    assert task.batch(2**40, "train", 2**50, 2).tokens.shape[0] == 2


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_negative_batch_indices_are_rejected(seed, index):
    with pytest.raises(ValueError, match="at least 0"):
        CASES["mqar"].batch(seed, "train", index, 2)


def test_golden_rows():
    rows = {
        f"{name}.{split}": {k: getattr(batch, k)[0].tolist() for k in ("tokens", "targets", "group")}
        | {"labelled": np.flatnonzero(batch.weights[0]).tolist()}
        for name, task in CASES.items()
        if not isinstance(task, TaskTransform)
        for split in ("train", "test")
        for batch in [task.batch(0, split, 0, 2)]
    }
    if os.environ.get("RECALLAX_WRITE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text("{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in rows.items()) + "\n}\n")
    expected = json.loads(GOLDEN.read_text())
    assert rows.keys() == expected.keys()
    for name, row in rows.items():
        assert row == expected[name], name


# ---- errors

INVALID_CONFIGS = [
    (lambda: MQAR.single(length=32, num_kv_pairs=9), r"length 32 is too short for 9 pairs in 1 passes.*36"),
    (lambda: MQAR(mixture=(MixtureSlice(length=64, num_kv_pairs=16),), num_passes=2), r"in 2 passes.*96"),
    (lambda: MQAR.single(length=33, num_kv_pairs=4), "even length"),
    (lambda: MQAR.single(length=32, num_kv_pairs=0), "num_kv_pairs >= 1"),
    (lambda: MQAR.single(length=32, num_kv_pairs=8, vocab_size=17), "vocab_size must be at least 18"),
    (lambda: MQAR(mixture=()), "at least one slice"),
    (lambda: MQAR(mixture=(MixtureSlice(length=32, num_kv_pairs=2, num_examples=0),)), "num_examples >= 1"),
    (lambda: MQAR(power_a=0.0), "above 0"),
    (lambda: MQAR(num_passes=0), "at least 1"),
    (lambda: CASES["mqar"].max_targets("train", 64), r"does not occur in train.*\(32, 48\)"),
    (lambda: tasks.SetDisjointness(set_sizes=((8, 4),)), "short <= long"),
    (lambda: tasks.SetDisjointness(set_sizes=()), "at least one"),
    (lambda: tasks.SetDisjointness(vocab_size=64), "at least 83"),
    (lambda: tasks.InContextRecall(length=31), "even"),
    (lambda: tasks.InContextRecall(vocab_size=1), "at least 2"),
    (lambda: tasks.NoisyRecall(frac_noise=1.0), r"\[0, 1\)"),
    (lambda: tasks.NoisyRecall(vocab_size=16), "has 0 ids"),
    (lambda: tasks.FuzzyRecall(length=11), "12"),
    (lambda: tasks.FuzzyRecall(vocab_size=6), "at least 7"),
    (lambda: tasks.SelectiveCopying(length=32), "33"),
    (lambda: tasks.Compression(length=1), "at least 2"),
    (lambda: tasks.Memorization(length=15), "even"),
    (lambda: tasks.Copying(train_lengths=(5, 4)), "shortest, longest"),
    (lambda: tasks.InductionHeads(test_lengths=(2,)), "at least 3"),
    (lambda: tasks.StateTracking(test_lengths=()), "test length"),
    (
        lambda: tasks.OverwriteRecall.length_extrapolation(length=32, num_keys=4, num_writes=13),
        r"too short for 13 writes and 4 queries.*34",
    ),
    (lambda: tasks.OverwriteRecall.length_extrapolation(length=32, num_keys=4, num_writes=3), "num_writes >= num_keys"),
    (lambda: tasks.OverwriteRecall.length_extrapolation(length=32, num_keys=1, num_writes=3), "num_keys >= 2"),
    (
        lambda: tasks.OverwriteRecall.length_extrapolation(
            length=32, num_keys=4, num_writes=5, vocab_size=15, noise_vocab_size=8
        ),
        "least 16",
    ),
    (lambda: tasks.OverwriteRecall(noise_vocab_size=0), "at least 1"),
    (lambda: tasks.OverwriteRecall(mixture=()), "at least one slice"),
    (lambda: CASES["overwrites"].max_targets("train", 96), r"does not occur in train.*\(48,\)"),
    (lambda: tasks.KeyRetrieval(train_slices=((87, 8),)), "at least 88"),
    (lambda: tasks.KeyRetrieval(test_slices=((39, 8),)), "at least 40"),
    (lambda: tasks.KeyRetrieval(queries_per_fact=0), "at least 1"),
    (lambda: tasks.KeyRetrieval(num_names=4), "1 to 4"),
    (lambda: tasks.KeyRetrieval(test_slices=()), "at least one"),
    (lambda: tasks.KeyRetrieval(num_words=1), "at least 2"),
    (lambda: sample_without_replacement(np.random.default_rng(0), 2, 5, 4), "cannot draw 5"),
]


@pytest.mark.parametrize(("make", "message"), INVALID_CONFIGS)
def test_invalid_task_configs_are_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [(MQAR, "filler", "zology"), (tasks.SetDisjointness, "order", "short"), (tasks.StateTracking, "group", "S6")],
)
def test_unknown_choices_are_rejected(cls, field, value):
    """The task rejects them, or the runtime type checker if it is on."""
    with pytest.raises((ConfigError, TypeError), match=rf"is '{value}'; did you mean|Actual value: '{value}'"):
        cls(**{field: value})


def test_invalid_configs_raise_config_error():
    with pytest.raises(ConfigError):
        MQAR.single(length=32, num_kv_pairs=9)
    assert issubclass(Task, Config)


# ---- sampling


@pytest.mark.parametrize(("count", "pool"), [(2, 3), (2, 9), (3, 16)])  # by permutation, and by rejection
def test_sample_without_replacement_is_uniform(count, pool):
    rows = 40_000
    samples = sample_without_replacement(np.random.default_rng(0), rows, count, pool)
    tuples = list(itertools.permutations(range(pool), count))
    seen = Counter(map(tuple, samples.tolist()))
    assert set(seen) == set(tuples)
    expected = rows / len(tuples)
    chi2 = sum((n - expected) ** 2 / expected for n in seen.values())
    assert abs(chi2 - (len(tuples) - 1)) < 5 * np.sqrt(2 * len(tuples))


def test_first_occurrence():
    ids = np.array([[5, 3, 5, 5, 3, 0], [1, 1, 1, 2, 3, 2]])
    assert first_occurrence(ids).tolist() == [[0, 1, 0, 0, 1, 5], [0, 0, 0, 3, 4, 3]]


# ---- MQAR


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_query_slots_follow_the_power_law(power):
    """The first two samples have the distribution p(i) p(j) / (1 - p(i))."""
    slots, rows = 6, 60_000
    samples = sample_query_slots(np.random.default_rng(0), rows, 2, slots, power)
    p = np.arange(1, slots + 1) ** (power - 1)
    p /= p.sum()
    analytic = np.outer(p, p) / (1 - p)[:, None]
    np.fill_diagonal(analytic, 0)
    assert analytic.sum() == pytest.approx(1)
    frequency = np.zeros((slots, slots))
    np.add.at(frequency, (samples[:, 0], samples[:, 1]), 1 / rows)
    deviation = np.abs(frequency - analytic) / np.sqrt(np.maximum(analytic, 1e-9) / rows)
    assert np.all(frequency[analytic == 0] == 0) and deviation[analytic > 0].max() < 4.5


def test_query_slots_of_full_rows():
    batch = MQAR.single(length=16, num_kv_pairs=4, vocab_size=32).batch(0, "train", 0, 4000)
    keys, queries = batch.tokens[:, 0:8:2], batch.tokens[:, 8::2]
    assert np.array_equal(np.sort(keys, axis=1), np.sort(queries, axis=1))
    # Slots follow the order of the context: the first key has the first slot with p(1) = 1 / (1 + 1/2 + 1/3 + 1/4).
    assert np.mean(queries[:, 0] == keys[:, 0]) == pytest.approx(0.48, abs=0.03)
    assert np.mean(queries[:, 0] == keys[:, 3]) < 0.1


@pytest.mark.parametrize("filler", ["disjoint", "zoology", "zero"])
@pytest.mark.parametrize("passes", [1, 2])
def test_mqar_rows_match_definition(filler, passes):
    pairs, length, vocab = 6, 48, 64
    segment = MixtureSlice(length=length, num_kv_pairs=pairs)
    task = MQAR(vocab_size=vocab, mixture=(segment,), test_mixture=(segment,), filler=filler, num_passes=passes)
    batch = task.batch(0, "train", 0, 64)
    start = 2 * pairs * passes
    for tokens, targets, weights in zip(batch.tokens, batch.targets, batch.weights, strict=True):
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == pairs and keys.min() >= 1 and keys.max() < vocab // 2
        assert len(set(values)) == pairs and values.min() >= vocab // 2
        assert np.array_equal(tokens[:start], np.tile(tokens[: 2 * pairs], passes))
        queries = np.flatnonzero(weights)
        assert len(queries) == pairs and queries.min() >= start and np.all(queries % 2 == 0)
        assert sorted(tokens[queries]) == sorted(keys)
        pair = dict(zip(keys.tolist(), values.tolist(), strict=True))
        assert [pair[k] for k in tokens[queries].tolist()] == targets[queries].tolist()
        assert np.allclose(weights[queries], 1 / pairs) and not targets[weights == 0].any()
        rest = np.delete(tokens[start:], queries - start)
        if filler == "disjoint":
            assert not set(rest) & set(keys)
        if filler == "zero":
            assert not rest.any()


def test_disjoint_filler_is_uniform():
    pairs, vocab = 3, 12
    batch = MQAR.single(length=256, num_kv_pairs=pairs, vocab_size=vocab).batch(0, "train", 0, 400)
    queries = batch.weights > 0
    share = np.zeros(vocab)
    for tokens, is_query in zip(batch.tokens, queries, strict=True):
        free = np.setdiff1d(np.arange(vocab), tokens[0 : 2 * pairs : 2])
        rest = tokens[2 * pairs :][~is_query[2 * pairs :]]
        counts = np.bincount(rest, minlength=vocab)
        assert counts[free].sum() == len(rest)
        share[: len(free)] += counts[free] / len(rest) / len(batch.tokens)
    assert np.allclose(share[: vocab - pairs], 1 / (vocab - pairs), atol=0.003)


def nearest_pair(tokens: np.ndarray) -> np.ndarray:
    """Answer like an ideal induction head: the token after the last earlier occurrence."""
    answers = np.zeros_like(tokens)
    for row, answer in zip(tokens.tolist(), answers, strict=True):
        following: dict[int, int] = {}
        for t, token in enumerate(row):
            answer[t] = following.get(token, 0)
            if t + 1 < len(row):
                following[token] = row[t + 1]
    return answers


def test_only_zoology_filler_has_false_pairs():
    length, pairs, vocab = 64, 4, 64
    score, collided = {}, 0.0
    for filler in ("disjoint", "zero", "zoology"):
        batch = MQAR.single(length=length, num_kv_pairs=pairs, vocab_size=vocab, filler=filler).batch(
            0, "test", 0, 2000
        )
        score[filler] = accuracy(nearest_pair(np.asarray(batch.tokens)), batch)
        if filler == "zoology":
            collided = np.mean([any(np.isin(r[8:][w[8:] == 0], r[0:8:2])) for r, w in zip(*batch[0:3:2], strict=True)])
    assert score["disjoint"] == score["zero"] == 1.0
    # Rows of 52 filler ids contain one of 4 keys among 64 ids with probability 1 - (60/64)^52; the answer to a query is
    # wrong if its key occurs in the filler before it.
    assert collided == pytest.approx(1 - (1 - pairs / vocab) ** (length - 4 * pairs + pairs), abs=0.03)
    assert 1 - (length - 2 * pairs) / vocab < score["zoology"] < 0.95


def test_slice_frequencies():
    task = CASES["mqar"]
    samples = Counter(task.groups[task.batch(0, "train", i, 1).group[0, 0]] for i in range(1000))
    assert set(samples) == {"L32_K2", "L32_K6", "L48_K4"}
    assert samples["L32_K2"] == pytest.approx(600, abs=60) and samples["L32_K6"] == pytest.approx(200, abs=50)
    for split in ("valid", "test"):
        groups = [task.groups[task.batch(0, split, i, 1).group[0, 0]] for i in range(6)]
        assert groups == ["L32_K6", "L48_K4", "L64_K16"] * 2


def test_window_reach_matches_published_sliding_window_curve():
    """The accuracy of sliding windows in Based's figure 2 is the fraction of queries whose value is in the window."""
    published = {8: 0.060, 16: 0.144, 32: 0.315, 64: 0.514, 128: 0.655, 256: 0.796, 512: 0.936, 1024: 1.0}
    task, reach = MQAR(), {w: [] for w in published}
    for index in range(7):
        batch = task.batch(0, "test", index, 24)
        for tokens, weights in zip(batch.tokens, batch.weights, strict=True):
            queries = np.flatnonzero(weights)
            key_positions = {key: t for t, key in enumerate(tokens[: 2 * len(queries)].tolist())}
            distance = np.array(
                [t - key_positions[k] - 1 for t, k in zip(queries, tokens[queries].tolist(), strict=True)]
            )
            for window, hits in reach.items():
                hits.append(np.mean(distance < window))
    assert {w: np.mean(hits) for w, hits in reach.items()} == pytest.approx(published, abs=0.02)


# ---- overwrites


def test_overwrite_rows_match_definition():
    task = CASES["overwrites"]
    for batch in batches(task, "test", count=6, size=40):
        for tokens, targets, weights, group in zip(*batch[:3], batch.group, strict=True):
            name = task.groups[group[weights > 0][0]]
            keys, writes = (int(part[1:]) for part in name.split("_")[1:3])
            context = len(tokens) - 2 * keys
            known: dict[int, int] = {}
            times: Counter[int] = Counter()
            t = 0
            while t < context:
                if tokens[t] >= 32:  # noise
                    t += 1
                    continue
                key, value = int(tokens[t]), int(tokens[t + 1])
                assert key < 16 <= value < 32 and known.get(key) != value
                known[key], times[key] = value, times[key] + 1
                t += 2
            assert t == context and len(known) == keys == len(set(known.values())) and times.total() == writes
            queries = np.flatnonzero(weights)
            assert queries.tolist() == list(range(context, len(tokens), 2)) and np.all(tokens[queries + 1] >= 32)
            assert sorted(tokens[queries].tolist()) == sorted(known)
            assert targets[queries].tolist() == [known[key] for key in tokens[queries].tolist()]
            bucket = ["once", "twice", "more", "more"]
            expected = [bucket[min(times[key], 4) - 1] for key in tokens[queries].tolist()]
            assert [task.groups[g].split("_")[3] for g in group[queries]] == expected
            assert np.allclose(weights[queries], 1 / keys)


def test_overwrites_are_uniform():
    task = tasks.OverwriteRecall.length_extrapolation(
        length=40, num_keys=4, num_writes=8, vocab_size=24, noise_vocab_size=8
    )
    tokens = task.batch(0, "train", 0, 4000).tokens[:, :32]
    is_key, is_value = tokens < 8, (tokens >= 8) & (tokens < 16)
    assert np.allclose(np.bincount(tokens[is_key], minlength=8) / 32_000, 1 / 8, atol=0.01)
    assert np.allclose(np.bincount(tokens[is_value] - 8, minlength=8) / 32_000, 1 / 8, atol=0.01)
    assert np.allclose(np.bincount(tokens[tokens >= 16] - 16, minlength=8) / 64_000, 1 / 8, atol=0.01)
    # Rows contain eight writes of two tokens and sixteen noise tokens: a position has a key with probability 1/4.
    assert np.allclose(is_key[:, 2:-2].mean(axis=0), 1 / 4, atol=0.03)
    # A key with n writes has the first two of eight writes with probability n (n - 1) / 56; n - 1 is from B(4, 1/4).
    keys = tokens[is_key].reshape(4000, 8)
    assert np.mean(keys[:, 0] == keys[:, 1]) == pytest.approx(11 / 56, abs=0.02)
    # The other four writes have random keys: a key is written once with probability (3/4)^4.
    batch = task.batch(0, "train", 0, 4000)
    share = np.bincount(batch.group[batch.weights > 0], minlength=9)[:3] / 16_000
    assert share == pytest.approx([81 / 256, 108 / 256, 67 / 256], abs=0.015)


def test_overwritten_values_are_not_targets():
    task = CASES["overwrites"]
    score: dict[str, list[bool]] = {"once": [], "twice": [], "more": []}
    for batch in batches(task, "test", count=8, size=40):
        for tokens, targets, weights, group in zip(*batch[:3], batch.group, strict=True):
            for t in np.flatnonzero(weights):
                first = tokens.tolist().index(tokens[t])
                score[task.groups[group[t]].split("_")[3]].append(bool(tokens[first + 1] == targets[t]))
    # The second value of a key differs from the first; a later value equals the first with probability near 1/16.
    assert np.mean(score["once"]) == 1 and not any(score["twice"])
    assert np.mean(score["more"]) == pytest.approx(1 / 16, abs=0.03)


# ---- MAD


@pytest.mark.parametrize("name", ["in_context_recall", "noisy_recall", "fuzzy_recall"])
def test_mad_recall_labels_next_tokens_in_train_and_answers_in_test(name):
    task = CASES[name]
    train = task.batch(0, "train", 0, 16)
    real = train.seq.segment_ids == 1
    assert np.array_equal(train.weights[:, :-1] > 0, real[:, 1:]) and not train.weights[:, -1].any()
    assert np.array_equal(train.targets[:, :-1][real[:, 1:]], train.tokens[:, 1:][real[:, 1:]])
    test = task.batch(0, "test", 0, 16)
    assert 0 < (test.weights > 0).sum() < 0.6 * (train.weights > 0).sum()
    # The last answer is the last token of the row that is not padding.
    last = test.seq.segment_ids.sum(axis=1) - 2
    assert np.all(test.weights[np.arange(16), last] == 1)


def test_mad_recall_targets_are_repeated_keys():
    for name in ("in_context_recall", "noisy_recall"):
        for batch in batches(CASES[name], "test"):
            for row, weights in zip(batch.tokens.tolist(), batch.weights, strict=True):
                keys = row[::2]
                repeats = [2 * i for i, k in enumerate(keys) if k in keys[:i] and k < 8]
                assert np.flatnonzero(weights).tolist() == repeats


def test_noise_rate_and_ids():
    task = tasks.NoisyRecall(length=256, frac_noise=0.4)
    tokens = task.batch(0, "train", 0, 100).tokens.reshape(100, -1, 2)
    noisy = tokens >= 16
    assert np.array_equal(noisy[..., 0], noisy[..., 1]) and tokens[noisy].max() == 31
    assert noisy.mean() == pytest.approx(0.4 * 126.6 / 128, abs=0.02)


def test_noise_keeps_at_least_one_pair():
    tokens = tasks.NoisyRecall(length=6, frac_noise=0.99).batch(0, "test", 0, 200).tokens
    assert np.all((tokens[:, :4] < 16).any(axis=1)) and (tokens[:, :4] < 16).all(axis=1).mean() < 0.1


def test_fuzzy_recall_test_keys_have_full_width():
    task = tasks.FuzzyRecall()
    widths: dict[Split, Counter] = {"train": Counter(), "test": Counter()}
    for split, count in widths.items():
        for batch in batches(task, split):
            for row, real in zip(batch.tokens, batch.seq.segment_ids, strict=True):
                runs = [
                    (is_key, list(run)) for is_key, run in itertools.groupby(row[real == 1].tolist(), lambda x: x < 7)
                ]
                assert all(len(run) == len(set(run)) for _, run in runs) and max(row[real == 1]) < 15
                count.update((is_key, len(run)) for is_key, run in runs)
    assert (
        {n for is_key, n in widths["train"] if is_key}
        == {n for is_key, n in widths["train"] if not is_key}
        == {1, 2, 3}
    )
    assert {n for is_key, n in widths["test"] if is_key} == {3}
    assert {n for is_key, n in widths["test"] if not is_key} == {1, 2, 3}


def test_selective_copying_has_blanks_in_every_gap():
    task = tasks.SelectiveCopying(length=64, num_tokens_to_copy=8)
    tokens = task.batch(0, "train", 0, 500).tokens
    body, tail = tokens[:, :55], tokens[:, 55:]
    assert np.all(tail[:, 0] == 15) and np.all(tail[:, 1:] == 14)
    filled = body < 14
    assert np.all(filled.sum(axis=1) == 8)
    before, after = filled.argmax(axis=1), filled[:, ::-1].argmax(axis=1)
    assert before.mean() == pytest.approx(47 / 9, abs=0.5) and after.mean() == pytest.approx(47 / 9, abs=0.5)


def test_memorization_table_is_one_to_one_and_fixed():
    task = tasks.Memorization()
    assert len(set(task.table.tolist())) == len(task.table) == 127
    assert task.table.min() >= 127 and task.table.max() < 255
    assert not np.array_equal(task.table, tasks.Memorization(table_seed=1).table)


# ---- other tasks


def test_key_retrieval_facts_and_queries():
    task = tasks.KeyRetrieval(train_slices=((30, 2),), queries_per_fact=1)
    fact_positions, orders = Counter(), Counter()
    for row, targets, weights in zip(*task.batch(0, "train", 0, 4000)[:3], strict=True):
        facts = np.flatnonzero(row == task.num_words + task.num_names)
        known = {row[i + 1]: row[i + 2] for i in facts}
        queries = np.flatnonzero(row == task.num_words + task.num_names + 1) + 1
        assert len(known) == 2 and facts[1] - facts[0] >= 3 and queries.tolist() == [27, 29]
        assert np.flatnonzero(weights).tolist() == queries.tolist() and row[queries].tolist() != [row[queries[0]]] * 2
        assert [known[name] for name in row[queries]] == targets[queries].tolist()
        fact_positions.update(facts.tolist())
        orders[bool(row[facts[0] + 1] == row[27])] += 1
    assert min(fact_positions) == 0 and max(fact_positions) == 23 and orders[True] == pytest.approx(2000, abs=130)
    assert max(fact_positions.values()) < 3 * min(fact_positions.values())


def test_set_disjointness_shares_one_token_and_balances_orders():
    task = tasks.SetDisjointness(vocab_size=64, set_sizes=((3, 9),), test_set_sizes=((3, 9), (4, 4)))
    shared_positions, orders = Counter(), Counter()
    for batch in batches(task, "test", count=8, size=101):
        for row, target, group in zip(batch.tokens.tolist(), batch.targets[:, -1], batch.group[:, -1], strict=True):
            cut = row.index(2)
            first, second = row[1:cut], row[cut + 1 : -1]
            assert row[0] == 1 and row[-1] == 3 and min(first + second) >= 4
            assert len(set(first)) == len(first) and len(set(second)) == len(second)
            assert set(first) & set(second) == {int(target)}
            short, long = min(len(first), len(second)), max(len(first), len(second))
            name = task.groups[group]
            assert name.endswith(f"{short}_{long}")
            assert short == long or name.startswith("short_first" if len(first) < len(second) else "long_first")
            orders[name] += 1
            if name == "short_first_3_9":
                shared_positions[first.index(target), second.index(target)] += 1
    assert orders["short_first_3_9"] == orders["long_first_3_9"] == 202
    assert len(shared_positions) == 27 and max(shared_positions.values()) < 25


def test_copying_mixes_lengths_in_train_only():
    task = tasks.Copying()
    train = task.batch(0, "train", 0, 400)
    n = (train.weights > 0).sum(axis=1) - 1
    assert np.array_equal(train.seq.segment_ids.sum(axis=1), 2 * n + 2)
    assert set(n.tolist()) == set(range(5, 21)) and np.allclose(train.weights.sum(axis=1), 1)
    assert [set(b.seq.segment_ids.sum(axis=1).tolist()) for b in batches(task, "test", 4)] == [{42}, {82}, {162}, {322}]


def test_induction_cue_positions():
    batch = tasks.InductionHeads(length=8).batch(0, "train", 0, 2000)
    assert np.all((batch.tokens == 16).sum(axis=1) == 2) and np.all(batch.tokens[:, -1] == 16)
    cues = Counter((batch.tokens == 16).argmax(axis=1).tolist())
    assert set(cues) == set(range(6)) and min(cues.values()) > 250


@pytest.mark.parametrize(("group", "size", "abelian"), [("S3", 6, False), ("A5", 60, False), ("Z60", 60, True)])
def test_state_tracking_groups_are_groups(group, size, abelian):
    table = cayley_table(group)
    everything = set(range(size))
    assert all(set(row) == everything for row in table.tolist()) and all(set(c) == everything for c in table.T.tolist())
    assert np.array_equal(table[0], np.arange(size)) and np.array_equal(table[:, 0], np.arange(size))
    assert np.array_equal(table[table], table[np.arange(size)[:, None, None], table])  # (ab)c = a(bc)
    assert np.array_equal(table, table.T) is abelian


def test_state_tracking_groups_are_ranges_of_positions():
    task = tasks.StateTracking(length=3, test_lengths=(5, 8))
    assert task.groups == ("t1_3", "t4_5", "t6_8")
    assert task.batch(0, "test", 1, 1).group.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]


def test_state_tracking_products():
    """In S3 in lexicographic order, 1 swaps the points 1 and 2, and 2 swaps 0 and 1, and both are a cycle."""
    assert cayley_table("S3")[1, 2] == 3 and cayley_table("S3")[2, 1] == 4
    parity = tasks.StateTracking(group="parity").batch(0, "train", 0, 8)
    assert np.array_equal(parity.targets, np.cumsum(parity.tokens, axis=1) % 2)
    cyclic = tasks.StateTracking(group="Z60").batch(0, "train", 0, 8)
    assert np.array_equal(cyclic.targets, np.cumsum(cyclic.tokens, axis=1) % 60)


# ---- transforms


def test_jrt_prompt_repeats_only_the_context():
    """The repetition of a context `a b c`, by its new length."""
    task = tasks.Copying(alphabet_size=4, train_lengths=(2, 2), test_lengths=(2,))
    batch = task.batch(0, "test", 0, 1)
    a, b, c = batch.tokens[0, :3].tolist()
    rest = batch.tokens[0, 3:].tolist()
    for expected, context in ((3, [a, b, c]), (6, [a, b, c] * 2), (5, [b, c, a, b, c]), (7, [c, *[a, b, c] * 2])):
        long = repeat_batch_context(batch, np.array([expected]))
        assert long.tokens[0].tolist() == context + rest
        assert long.seq.prefix[0].tolist() == [True] * expected + [False] * len(rest)
        assert long.seq.positions[0].tolist() == list(range(expected + len(rest)))
        for before, after in ((batch.targets, long.targets), (batch.weights, long.weights)):
            assert np.array_equal(before[0, 3:], after[0, expected:]) and not after[0, : expected - 3].any()


def test_repeated_contexts_are_padded_to_one_length():
    task = tasks.JRTPrompt(task=tasks.Copying(train_lengths=(2, 9), test_lengths=(4,)), num_repeats=3)
    batch = task.batch(0, "train", 0, 16)
    sizes = batch.seq.prefix.sum(axis=1)
    assert len(set(sizes.tolist())) > 3 and batch.tokens.shape[1] == 2 * 9 + 2 + 2 * sizes.max() // 3
    assert np.array_equal(batch.seq.segment_ids.sum(axis=1), sizes // 3 + sizes)
    assert np.allclose(batch.weights.sum(axis=1), 1) and not batch.weights[batch.seq.segment_ids == 0].any()


@pytest.mark.parametrize(
    ("strategy", "read"), [("left_pad", (3, 7, 12)), ("twice", (6, 10, 12)), ("iterate", (10, 10, 12))]
)
def test_prefix_fill_strategies(strategy: FillStrategy, read):
    task = tasks.PrefixFill(task=CASES["mqar"], prefix_length=10, strategy=strategy)
    assert tuple(map(task.repeated_length, (3, 7, 12))) == read and task.repeated_length(0) == 0


def test_context_of_packed_rows_cannot_be_repeated():
    batch = CASES["mqar"].batch(0, "test", 0, 2)
    packed = batch._replace(seq=batch.seq._replace(segment_ids=np.full_like(batch.seq.segment_ids, 2)))
    with pytest.raises(ValueError, match="one document each"):
        repeat_batch_context(packed, np.array([8, 8]))


def test_masked_prefix_targets():
    task = tasks.MaskedPrefix(task=tasks.InContextRecall(length=64), prefix_length=24, mlm_probability=0.3)
    assert task.terms == ("next_token", "masked_token") and task.vocab_size == task.task.vocab_size + 1
    plain, batch = (t.batch(0, "train", 0, 200) for t in (task.task, task))
    masked = batch.tokens == task.task.vocab_size
    assert np.array_equal(masked, batch.term == 1) and not masked[:, 24:].any()
    assert abs(masked[:, :24].mean() - 0.3) < 0.02
    assert np.array_equal(batch.targets[masked], plain.tokens[masked])
    assert np.array_equal(batch.weights[:, :24] > 0, masked[:, :24])
    assert np.array_equal(batch.weights[:, 24:], plain.weights[:, 24:])
    known = task.batch(0, "valid", 0, 8)
    assert np.array_equal(known.tokens, task.task.batch(0, "valid", 0, 8).tokens) and not known.weights[:, :24].any()
    assert np.array_equal(known.seq.prefix, np.broadcast_to(np.arange(64) < 24, (8, 64)))


def test_masked_prefix_loss_weights():
    paper, code = masked_prefix_loss_weights("paper"), masked_prefix_loss_weights("code")
    assert paper == {"next_token": 0.8, "masked_token": 0.2} and code == {"next_token": 1.0, "masked_token": 0.25}


def test_window_reach_on_standard_mixture_matches_published_figure():
    """A sliding window recalls what it covers, so the figure of Zoology's README (windows of 8 to 1024 tokens at width
    128, mean over seven lengths) depends on the positions of the queries only."""
    task = importlib.import_module("recallax.configs.mqar_window").get_config().task
    assert fraction_within_window(task, 8, rows=256) == pytest.approx(0.081, abs=0.025)
    published = {16: 0.145, 32: 0.310, 64: 0.514, 128: 0.658, 256: 0.797, 512: 0.936, 1024: 1.0}
    for window, accuracy in published.items():
        assert fraction_within_window(task, window, rows=256) == pytest.approx(accuracy, abs=0.006), window
