"""Product-key memory: exact top-k search, the gradient of the table, and the effect of its tags on updates."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.product_key_capacity import sweep
from experiments.results import read_rows
from recallax.config import ConfigError
from recallax.layers import Identity, LayerInfo, ProductKeys
from recallax.layers.norm import rms_norm
from recallax.layers.product_keys import ProductKeysMixer, embedding_bag
from recallax.models import Block, LMConfig
from recallax.tasks import MQAR, MixtureSlice
from recallax.train.loop import restore_run, train
from recallax.train.optimizer import make_optimizer
from recallax.train.program import Program
from recallax.train.run_config import AdamW, RunConfig, tiny_run
from recallax.types import Precision, unpacked_seq_info

pytestmark = pytest.mark.usefixtures("strict")

WIDTH = 16
CONFIG = ProductKeys(num_sub_keys=64, num_heads=2, head_k_dim=8, value_dim=6, top_k=8)


def build(config: ProductKeys) -> ProductKeysMixer:
    return config.build(WIDTH, LayerInfo(0, 2), precision=Precision(), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("top_k", [1, 8, 64])
def test_best_slots_match_a_search_over_all_sums(top_k):
    mixer, x = build(replace(CONFIG, top_k=top_k)), jax.random.normal(jax.random.key(1), (50, WIDTH))
    q = rms_norm(mixer.query(x).reshape(50, 2, 8), mixer.scale[...], 1e-5, jnp.float32)
    first, second = (
        np.einsum("thd,hnd->thn", h, k) for h, k in zip(np.split(np.asarray(q), 2, -1), mixer.keys[...], strict=True)
    )
    sums = (first[..., :, None] + second[..., None, :]).reshape(50, 2, -1)
    index, weight = jax.jit(mixer.select_slots)(x)
    np.testing.assert_array_equal(index, np.argsort(-sums, axis=-1, kind="stable")[..., :top_k])
    best = np.exp(-np.sort(-sums, axis=-1)[..., :top_k])
    np.testing.assert_allclose(weight, best / best.sum(axis=-1, keepdims=True), rtol=2e-4)


def test_embedding_bag_and_its_gradients_match_a_gather():
    values, weight = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(9, 5), (20, 7)]))
    index, cotangent = (
        jax.random.randint(jax.random.key(2), (20, 7), 0, 9),
        jax.random.normal(jax.random.key(3), (20, 5)),
    )

    def plain(values, weight):
        return jnp.einsum("ts,tsv->tv", weight, values[index])

    one, other = (
        jax.vjp(form, values, weight) for form in (lambda values, weight: embedding_bag(values, index, weight), plain)
    )
    for a, b in zip(
        jax.tree.leaves((one[0], one[1](cotangent))), jax.tree.leaves((other[0], other[1](cotangent))), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_all_parameters_have_gradients_and_initial_gate_is_small():
    mixer, x = build(CONFIG), jax.random.normal(jax.random.key(4), (2, 30, WIDTH))
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    grads = jax.jit(jax.grad(lambda p: nnx.merge(graph, p, rest)(x, unpacked_seq_info(2, 30))[0].var()))(params)
    assert all(leaf.any() for leaf in jax.tree.leaves(grads))
    gate = np.asarray(jax.nn.sigmoid(mixer.gate(x)))
    assert abs(gate.mean() - 0.119) < 0.01


def test_slot_usage_excludes_padding():
    mixer = build(replace(CONFIG, top_k=1, num_heads=1))
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(5), (WIDTH,)), (1, 9, WIDTH))
    x = x.at[0, 6:].set(jax.random.normal(jax.random.key(6), (3, WIDTH)))
    seq = unpacked_seq_info(1, 9)._replace(segment_ids=jnp.asarray([[1] * 6 + [0] * 3]))
    _, aux = mixer(x, seq)
    assert float(aux["diagnostic/slots_used"].total) == pytest.approx(1 / 64**2)
    assert float(aux["diagnostic/slots_kl"].total) == pytest.approx(np.log(64**2), rel=1e-5)


def test_values_have_their_own_learning_rate_and_unread_rows_do_not_change():
    slices = (MixtureSlice(length=16, num_kv_pairs=2),)
    blocks = {"facts": Block(mixer=replace(CONFIG, value_lr_multiplier=3.0), channel=Identity())}
    config = tiny_run(
        RunConfig(
            task=MQAR(vocab_size=32, mixture=slices, test_mixture=slices),
            model=LMConfig(d_model=WIDTH, pattern="facts*2", blocks=blocks),
            optim=AdamW(warmup_ratio=0.0, weight_decay=0.1),
        )
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        program = Program(config)
        start = program.init_state()
        path = ("stack", "parts", 0, "body", "parts", 0, "mixer", "values")

        def table(tree):
            for name in path:
                tree = tree[name]
            return np.asarray(tree)

        tables, moments = [table(start.params)], []
        state = start
        for index in range(3):
            state, _ = program.step(state, program.batch(index))
            tables.append(table(state.params))
            moments.append(table(optax.tree.get(state.optimizer, "mu")))
        moved = [(a != b).any(axis=-1) for a, b in itertools.pairwise(tables[1:])]
        assert 0 < moved[0].mean() < 0.5 and (moved[0] != moved[1]).any()
        first_only = moved[0] & ~moved[1]
        assert first_only.any()  # plain Adam would still update them, by momentum
        np.testing.assert_array_equal(moments[1][first_only], moments[2][first_only])
        # The first step of Adam changes each element with a gradient by the learning rate.
        _, params, _ = nnx.split(config.model.build(nnx.Rngs(0), 32), nnx.Param, ...)
        optimizer, pure = make_optimizer(config, params), nnx.to_pure_dict(params)
        grads = jax.tree.map(lambda p: jnp.ones_like(p) * 1e-3, pure)

        @jax.jit
        def second(pure):
            _, state = optimizer.update(grads, optimizer.init(pure), pure)
            return optimizer.update(grads, state, pure)[0]

        updates = second(pure)
    other = np.abs(np.asarray(updates["norm"]["scale"])).mean()
    np.testing.assert_allclose(np.abs(table(updates)), 3 * other, rtol=1e-4)


def test_optimizer_without_tags_has_the_plain_state():
    """Checkpoints of older runs must remain readable."""
    model = LMConfig(d_model=8, vocab_size=9, pattern="a", blocks={"a": Block(mixer=Identity())})
    _, params, _ = nnx.split(model.build(nnx.Rngs(0)), nnx.Param, ...)
    slices = (MixtureSlice(length=16, num_kv_pairs=2),)
    run = RunConfig(task=MQAR(vocab_size=9, mixture=slices, test_mixture=slices), model=model)
    state: Any = make_optimizer(run, params).init(nnx.to_pure_dict(params))
    assert len(state) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"top_k": 65}, "num_sub_keys = 64"), ({"head_k_dim": 7}, "be even"), ({"num_heads": 0}, "num_heads is 0")],
)
def test_invalid_configs_are_rejected(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)


def test_recorded_fact_recall_meets_its_thresholds():
    """4,096 facts with k = 8: recall of at least 0.95, with at least half of the slots in use."""
    rows = read_rows(Path(sweep.__file__).parent)
    recall = {name: [row["test"]["accuracy"] for row in rows if row["mixer"] == name] for name in sweep.VARIANTS}
    assert len(recall["product keys"]) == 3 and min(recall["product keys"]) >= 0.95
    assert min(row["slots_used"] for row in rows if row["mixer"] == "product keys") >= 0.5
    assert max(recall["values not trained"]) < 0.5


def test_random_facts_lists_every_fact_and_solves_them():
    task = replace(sweep.TASK, num_facts=12, num_answers=5)
    drawn, listed = task.batch(3, "train", 0, 50), [task.batch(3, "test", index, 4) for index in range(3)]
    assert np.concatenate([batch.tokens for batch in listed]).ravel().tolist() == list(range(12))
    assert set(np.unique(drawn.tokens)) <= set(range(12)) and len(np.unique(drawn.tokens)) > 6
    for batch in (drawn, *listed):
        np.testing.assert_array_equal(task.solve(np.asarray(batch.tokens)), batch.targets)
    assert np.bincount(task.answers).max() / 12 == task.chance()


def test_variants_of_the_capacity_experiment_update_other_rows():
    """The share of the table that a late step changes; the vectors of the facts never change."""
    changed = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for name in ("values not trained", "product keys", "all values updated (plain Adam)"):
            program = Program(sweep.run_config(name, 0, steps=4))
            state = program.init_state()
            vectors = np.array(state.statistics["vectors"])
            for index in range(4):
                before = np.array(state.params["layer"]["values"])
                state, _ = program.step(state, program.batch(index))
            changed[name] = (np.asarray(state.params["layer"]["values"]) != before).any(axis=1).mean()
            np.testing.assert_array_equal(state.statistics["vectors"], vectors)
    none, read, ever_read = changed.values()
    assert none == 0 < read < ever_read


@pytest.mark.full
def test_fact_recall_reproduces_the_record(tmp_path: Path):
    config = sweep.run_config("product keys", 0, steps=200)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert train(config, tmp_path)["accuracy"] >= 0.95
        program, restored = restore_run(tmp_path)
        assert sweep.slot_use(program, restored.state)["slots_used"] >= 0.5
