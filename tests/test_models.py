"""Language models: patterns, stacks of layers, output layers, and counts of parameters, FLOPs and state bytes."""

import importlib
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recallax.cli.config_files import config_names
from recallax.config import ConfigError
from recallax.layers import (
    HGRN2,
    Attention,
    BaseConv,
    Based,
    Identity,
    LayerInfo,
    Mamba,
    Mamba2,
    MixerConfig,
    MoM,
    NeuralMemory,
    NoChannelMixer,
    Parallel,
    PrefixLinear,
    ReLUSquared,
    RetNet,
    SlidingWindow,
    SwiGLU,
)
from recallax.layers.base import Statistic
from recallax.layers.kda import BoundedDecayGate
from recallax.layers.norm import RMSNorm
from recallax.layers.recurrence_gates import DecayGate
from recallax.layers.stateless import StatelessMixer
from recallax.models import (
    Autoencoder,
    Block,
    LMConfig,
    Tied,
    Untied,
    accounting,
    based_lm,
    hydra_lm,
    jrt_rnn_lm,
    landmark_lm,
    mom_lm,
    titans_lm,
)
from recallax.models.block import BlockModule
from recallax.models.pattern import flatten_pattern, parse_pattern
from recallax.pallas_kernels.neural_memory import InnerOptimizer
from recallax.types import Mean, Precision, SeqInfo, unpacked_seq_info

pytestmark = pytest.mark.usefixtures("strict")

BLOCKS = {
    "a": Block(mixer=Based(feature_dim=4), channel=SwiGLU(expand=2.0)),
    "b": Block(mixer=SlidingWindow(window=3)),
    "c": Block(mixer=BaseConv(), channel=Identity()),
}
TOKENS = jax.random.randint(jax.random.key(0), (2, 9), 0, 20)


def logits(built, seq, positions=None) -> jax.Array:
    """Return logits of `TOKENS` from one compiled program; compiling each op separately would take a minute."""
    graph, weights = nnx.split(built)
    return jax.jit(lambda w: nnx.merge(graph, w)(TOKENS, seq, positions)[0])(weights)


def model(pattern: str, blocks=BLOCKS, **changes):
    return LMConfig(d_model=8, vocab_size=20, pattern=pattern, blocks=blocks, **changes)


def test_patterns_expand_groups_and_repeats():
    names = ["conv", "based", "window"]
    layers = flatten_pattern(parse_pattern("conv (based window conv*3)*5 conv", names))
    assert len(layers) == 27 and layers[1::5][:5] == ["based"] * 5
    assert flatten_pattern(parse_pattern("((conv*2 based)*2)*2", names)) == ["conv", "conv", "based"] * 4


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "empty part"),
        ("conv ()", "empty part"),
        ("conv bsed", "'bsed'.*did you mean 'based'"),
        ("(conv", "'\\(' without"),
        ("conv)", "unexpected '\\)'"),
        ("conv*0", "count of at least 1"),
        ("conv*", "count of at least 1"),
        ("3", "unexpected '3'"),
    ],
)
def test_invalid_patterns_are_rejected(pattern, message):
    with pytest.raises(ConfigError, match=message):
        parse_pattern(pattern, ["conv", "based"])


@pytest.mark.parametrize(
    ("config", "millions", "layers"),
    [
        (based_lm.based_360m, 362.6, 27),
        (based_lm.based_1b3, 1349.5, 36),
        (jrt_rnn_lm.jrt_rnn_360m, 356.6, 26),
        (jrt_rnn_lm.jrt_rnn_1b3, 1375.1, 36),
    ],
)
def test_based_and_jrt_rnn_have_the_published_sizes(config, millions, layers):
    assert accounting.count_parameters(config()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert len(config().layer_names) == layers
    assert [i for i, name in enumerate(config().layer_names) if name == "based"][:3] == [1, 6, 11]


def test_state_of_jrt_rnn_is_as_large_as_that_of_based():
    once, twice = (replace(c, pattern="based") for c in (based_lm.based_360m(), jrt_rnn_lm.jrt_rnn_360m()))
    assert accounting.state_bytes(once, 2048) == accounting.state_bytes(twice, 2048)


def test_logits_do_not_depend_on_repeats_in_the_pattern():
    nested = model("c (a b)*2 a*2").build(nnx.Rngs(0))
    flat = model("c a b a b a a").build(nnx.Rngs(0))
    seq = unpacked_seq_info(2, 9)._replace(key=jax.random.key(5))
    np.testing.assert_allclose(logits(nested, seq), logits(flat, seq), atol=1e-6)


def test_dropout_does_not_depend_on_repeats_and_needs_a_key():
    seq = unpacked_seq_info(2, 9)
    keyed = seq._replace(key=jax.random.key(5))
    nested, flat = (model(p, dropout=0.3, embed_dropout=0.2).build(nnx.Rngs(0)) for p in ("(a b)*2", "a b a b"))
    np.testing.assert_allclose(logits(nested, keyed), logits(flat, keyed), atol=1e-6)
    assert np.abs(logits(nested, keyed) - logits(nested, seq)).max() > 1e-3
    plain = model("(a b)*2").build(nnx.Rngs(0))
    np.testing.assert_array_equal(logits(nested, seq), logits(plain, seq))


def test_remat_does_not_change_loss_and_gradients():
    def loss_and_gradients(remat):
        graph, params = nnx.split(model("c (a b)*2", remat=remat).build(nnx.Rngs(0)))
        loss = jax.jit(jax.value_and_grad(lambda p: nnx.merge(graph, p)(TOKENS, unpacked_seq_info(2, 9))[0].var()))
        return loss(params)

    for a, b in zip(*(jax.tree.leaves(loss_and_gradients(r)) for r in ("none", "block")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_program_size_does_not_grow_with_the_repeat_count():
    """Compile time depends on the size of the program, which must not grow with the number of layers."""

    def size(pattern):
        graph, params = nnx.split(accounting.abstract_model(model(pattern)))
        run = jax.make_jaxpr(lambda p: nnx.merge(graph, p)(TOKENS, unpacked_seq_info(2, 9))[0])
        return len(str(run(params)).splitlines())

    assert size("(a b)*40") <= size("(a b)*2") + 2


@dataclass(frozen=True, kw_only=True)
class Counter(MixerConfig):
    """Config of a mixer that counts its calls in a statistic and reports an auxiliary mean."""

    def build(self, d_model, layer, *, precision, rngs):
        return CounterMixer()


class CounterMixer(StatelessMixer):
    """Mixer that counts its calls in a statistic and reports an auxiliary mean."""

    def __init__(self):
        self.calls = Statistic(jnp.zeros(()))

    def apply(self, x):
        return x

    def __call__(self, x, seq: SeqInfo):
        self.calls[...] = self.calls[...] + 1
        return x, {"size": Mean((x**2).sum(), jnp.asarray(float(x.size)))}


@pytest.mark.parametrize("remat", ["none", "block"])
def test_scan_returns_statistics_and_auxiliary_means(remat):
    built = model("n*3", {"n": Block(mixer=Counter(), channel=Identity())}, remat=remat).build(nnx.Rngs(0))
    _, aux = built(TOKENS, unpacked_seq_info(2, 9))
    assert float(aux["size"].weight) == 3 * 2 * 9 * 8
    (calls,) = jax.tree.leaves(nnx.state(built, Statistic))
    np.testing.assert_array_equal(calls, [1, 1, 1])


def test_stateless_sequence_mixer_cannot_decode():
    from experiments.set_disjointness.noncausal import NonCausalBased

    built = model("n", {"n": Block(mixer=NonCausalBased(feature_dim=4))}).build(nnx.Rngs(0))
    with pytest.raises(TypeError, match="NonCausalBasedMixer has no state"):
        built.init_state(1, 4)


def test_norm_eps_applies_to_every_norm():
    built = model("a b*2", norm_eps=0.25).build(nnx.Rngs(0))
    norms = [node for _, node in nnx.iter_graph(built) if isinstance(node, RMSNorm)]
    assert [norm.eps for norm in norms] == [0.25] * 5


def test_block_without_channel_mixer_has_one_sublayer():
    built = model("n", {"n": Block(mixer=ReLUSquared(intermediate_size=6), channel=NoChannelMixer())}).build(
        nnx.Rngs(0)
    )
    (block,) = built.stack.parts
    assert isinstance(block, BlockModule)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(nnx.state(block, nnx.Param)))
    assert shapes == [(6, 8), (8,), (8, 6)]  # the MLP and one norm
    r, seq = jax.random.normal(jax.random.key(0), (2, 9, 8)), unpacked_seq_info(2, 9)
    np.testing.assert_array_equal(block(r, seq)[0], r + block.mixer(block.mixer_norm(r), seq)[0])


def test_explicit_widths_are_used():
    def shapes(mixer):
        parts = model("m", {"m": Block(mixer=mixer, channel=NoChannelMixer())}).build(nnx.Rngs(0)).stack.parts
        return {leaf.shape for leaf in jax.tree.leaves(nnx.state(parts, nnx.Param))} - {(8,)}

    assert shapes(Attention(num_heads=2, num_kv_heads=1, head_dim=6)) == {(8, 12), (8, 6), (12, 8)}
    assert shapes(SlidingWindow(num_heads=2, head_dim=6)) == {(8, 12), (12, 8)}
    assert shapes(SwiGLU(intermediate_size=5)) == {(8, 10), (5, 8)}


def test_logits_at_positions_equal_those_of_the_whole_row():
    for lm_head in (Untied(), Autoencoder(hidden_size=8)):
        built = model("c a", lm_head=lm_head).build(nnx.Rngs(0))
        whole = logits(built, unpacked_seq_info(2, 9))
        positions = jnp.array([[1, 8], [0, 5]])
        np.testing.assert_allclose(
            logits(built, unpacked_seq_info(2, 9), positions),
            jnp.take_along_axis(whole, positions[..., None], axis=1),
            atol=1e-6,
        )


def test_flops_equal_those_of_the_matrix_products():
    config = model("w", {"w": Block(mixer=Attention(), channel=Identity())})
    length, width, vocab = 9, 8, 20
    projections, scores, lm_head = 4 * width * width, 2 * length * width, width * vocab
    assert accounting.forward_flops(config, length) == 2 * length * (projections + scores + lm_head)
    repeated = model("w*7", {"w": Block(mixer=Attention(), channel=Identity())})
    assert accounting.forward_flops(repeated, length) == 2 * length * (7 * (projections + scores) + lm_head)
    two_targets = accounting.forward_flops(config, length, num_targets=2)
    assert two_targets == 2 * length * (projections + scores) + 2 * 2 * lm_head


def test_state_bytes_follow_the_definition():
    def bytes_of(mixer, context):
        return accounting.state_bytes(model("m", {"m": Block(mixer=mixer, channel=Identity())}), context)

    assert bytes_of(Attention(num_heads=2, num_kv_heads=1), 100) == 2 * 100 * 4 * 4
    assert bytes_of(SlidingWindow(window=16), 100) == bytes_of(SlidingWindow(window=16), 10_000) == 2 * 16 * 8 * 4
    assert bytes_of(SlidingWindow(window=16), 5) == 2 * 5 * 8 * 4
    assert bytes_of(Based(feature_dim=16), 100) == 153 * (8 + 1) * 4
    assert bytes_of(Based(feature_dim=16, features="full"), 100) == 273 * (8 + 1) * 4
    assert bytes_of(BaseConv(conv_size=3), 100) == 2 * 8 * 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Attention(num_heads=3), "8 channels cannot be split into 3 heads; use one of 1, 2, 4, 8"),
        (Based(num_heads=5), "cannot be split into 5 heads"),
        (Attention(num_heads=8), "even width"),
        (Attention(num_heads=2, head_dim=3), "even width"),
        (Attention(head_dim=0), "head_dim is 0"),
        (Attention(rope_theta=0.0), "rope_theta is 0.0; it must be above 0"),
        (RetNet(num_heads=1, rope_theta=-1.0), "rope_theta is -1.0; it must be above 0"),
        (Attention(num_heads=4, num_kv_heads=3), "cannot be split into 3"),
    ],
)
def test_incompatible_sizes_are_rejected(config, message):
    with pytest.raises(ConfigError, match=message):
        model("m", {"m": Block(mixer=config)}).build(nnx.Rngs(0))


@pytest.mark.usefixtures("strict")
def test_decay_gates_are_finite_where_the_rate_overflows():
    options = {"precision": Precision(), "rngs": nnx.Rngs(0)}
    gate, bounded = DecayGate(2, 2, **options), BoundedDecayGate(2, 2, -5.0, **options)
    for module in (gate, bounded):
        module.a_log[...] = jnp.asarray([1.5, 200.0])
    dt = jnp.asarray([0.3, 0.0])[None, None]
    assert gate(dt).tolist() == [[[float(-jnp.exp(jnp.float32(1.5)) * jnp.float32(0.3)), 0.0]]]
    assert jnp.isfinite(jax.grad(lambda dt: gate(dt).sum())(dt)).all()
    assert jnp.isfinite(bounded(-bounded.dt_bias[...][None, None])).all()
    mamba = Mamba(state_dim=4).build(8, LayerInfo(0, 1), **options)
    mamba.a_log[...] = jnp.full_like(mamba.a_log[...], 200.0)
    mamba.dt_bias[...] = jnp.full_like(mamba.dt_bias[...], -200.0)  # softplus is 0
    y, _ = jax.jit(lambda x: mamba(x, unpacked_seq_info(1, 2)))(jnp.ones((1, 2, 8)))
    assert jnp.isfinite(y).all()


def test_out_of_range_fields_are_rejected():
    for make, message in (
        (lambda: SwiGLU(intermediate_size=0), "intermediate_size is 0"),
        (lambda: ReLUSquared(intermediate_size=0), "must be at least 1"),
        (lambda: Mamba2(dt_limit=(0.5, 0.5)), "dt_limit is"),
        (lambda: model("a", norm_eps=0.0), "norm_eps is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


def test_too_small_vocabulary_is_rejected():
    with pytest.raises(ConfigError, match="the task has 30 token ids"):
        model("a").build(nnx.Rngs(0), vocab_size=30)
    with pytest.raises(ConfigError, match=r"set model\.vocab_size"):
        LMConfig(d_model=8, pattern="a", blocks=BLOCKS).build(nnx.Rngs(0))


def test_mom_has_the_published_sizes():
    """The paper states 545M total and 444M active parameters untied, 512M and 411M tied, and 1.55B and 1.35B tied."""
    for config, total, active, tied in (
        (mom_lm.mom_380m(), 545.12, 444.01, 512.35),
        (mom_lm.mom_1b3(), 1618.42, 1416.21, 1552.88),
    ):
        assert round(accounting.count_parameters(config) / 1e6, 2) == total
        assert round(accounting.count_active_parameters(config) / 1e6, 2) == active
        assert round(accounting.count_parameters(replace(config, lm_head=Tied())) / 1e6, 2) == tied
        assert sum(accounting.parameter_table(config).values()) == accounting.count_parameters(config)
        # Each of 24 layers has five memories of 4 x 256 x 256 float32 and three bfloat16 inputs of their convolutions.
        assert accounting.state_bytes(config, 2048) == 24 * 5 * (4 * 4 * 256 * 256 + 2 * 3 * 3 * 1024)


def test_hgrn2_lower_bounds_increase_with_depth_and_have_gradients():
    """This does not depend on repeats in the pattern, and layers of other kinds are not counted."""
    blocks = {"h": Block(mixer=HGRN2(num_heads=2)), "w": Block(mixer=SlidingWindow(window=3))}
    gradients = {}
    for pattern in ("h w h h w h", "(h w h)*2", "h w h*2 w h"):
        built = model(pattern, blocks).build(nnx.Rngs(0))
        graph, params, rest = nnx.split(built, nnx.Param, ...)
        logits = jax.random.normal(jax.random.key(1), (4, 8))
        params["floors"]["logits"][...] = logits

        def loss(params, graph=graph, rest=rest):
            whole = nnx.merge(graph, params, rest)
            y, _ = whole(TOKENS, unpacked_seq_info(2, 9))
            return jnp.sum(y * jnp.cos(jnp.arange(20.0))[None, None]), nnx.state(whole, Statistic)

        grads, statistics = jax.jit(jax.grad(loss, has_aux=True))(params)
        gradients[pattern] = np.asarray(grads["floors"]["logits"][...])
        floors = np.concatenate([np.asarray(leaf).reshape(-1, 8) for leaf in jax.tree.leaves(statistics)])
        shares = np.asarray(jax.nn.softmax(logits, axis=0))
        np.testing.assert_allclose(np.sort(floors, axis=0), np.cumsum(shares, axis=0) - shares[:1], atol=1e-6)
    for other in gradients.values():
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(other, gradients["h w h h w h"], atol=1e-5)


def test_nested_hgrn2_mixers_receive_lower_bounds():
    """HGRN2 occurs in a path of `Parallel`, in `MoM`, in `PrefixLinear`, and in two paths that share a lower bound."""
    memory = HGRN2(num_heads=2)
    mixers = {
        "alone": memory,
        "beside": Parallel(ssm=memory, attention=SlidingWindow(window=3)),
        "mixed": MoM(memory=memory, num_memories=2, top_k=1),
        "read": PrefixLinear(memory=memory),
        "twice": Parallel(ssm=memory, attention=memory),
    }
    blocks = {name: Block(mixer=mixer, channel=Identity()) for name, mixer in mixers.items()}
    built = model("alone (beside mixed)*2 read twice", blocks).build(nnx.Rngs(0))
    assert built.floors is not None
    logits = jax.random.normal(jax.random.key(1), built.floors.logits.shape)
    built.floors.logits[...] = logits
    shares = jax.nn.softmax(logits, axis=0)
    floors = np.asarray(jnp.cumsum(shares, axis=0) - shares[:1])
    assert floors.shape == (7, 8)
    graph, state = nnx.split(built)

    def run(state):
        whole = nnx.merge(graph, state)
        whole(TOKENS, unpacked_seq_info(2, 9))
        return nnx.state(whole, Statistic)

    statistics = nnx.to_flat_state(jax.jit(run)(state))
    layer_bounds = [(path[2:], np.asarray(leaf[...])) for path, leaf in statistics if path[-1] == "floor"]
    layers = {(0,): [0], (1, "body", "parts", 0): [1, 3], (1, "body", "parts", 1): [2, 4], (2,): [5], (3,): [6]}
    assert len(layer_bounds) == 6
    for path, floor in layer_bounds:
        (rows,) = [rows for start, rows in layers.items() if path[: len(start)] == start]
        np.testing.assert_allclose(floor.reshape(-1, 8), floors[rows], atol=1e-6)


@pytest.mark.parametrize("name", config_names())
def test_full_size_configs_build_for_their_tasks(name):
    """Only shapes are computed; nothing is allocated."""
    run = importlib.import_module(f"recallax.configs.{name}").get_config()
    count = accounting.count_parameters(run.model, run.task.vocab_size)
    assert sum(accounting.parameter_table(run.model, run.task.vocab_size).values()) == count
    assert accounting.state_bytes(run.model, 1024, run.task.vocab_size) > 0


def models_with_spare_attention() -> dict[str, LMConfig]:
    tiny = {n: importlib.import_module(f"recallax.configs.{n}").get_tiny().model for n in config_names()}
    return {name: config for name, config in tiny.items() if "window" in config.blocks and "mixer" in config.blocks}


@pytest.mark.parametrize("config", models_with_spare_attention().values(), ids=models_with_spare_attention())
@pytest.mark.parametrize("pattern", ["conv (mixer*3 window)*2", "conv (mixer*7 attention)*2"])
def test_every_recurrent_mixer_builds_hybrids(config, pattern):
    """The test computes shapes of the outputs and of the state; the laws test their values."""
    hybrid = replace(config, pattern=pattern)

    def forward():
        built = hybrid.build(nnx.Rngs(0), 20)
        return built(TOKENS, unpacked_seq_info(2, 9))[0], built.init_state(2, 9)

    y, state = jax.eval_shape(forward)
    assert y.shape == (2, 9, 20) and jax.tree.leaves(state)
    kinds = {name: hybrid.layer_names.count(name) for name in hybrid.blocks}
    assert kinds["mixer"] == (6 if "window" in pattern else 14) and kinds["window"] + kinds["attention"] == 2


@pytest.mark.parametrize(("size", "layers", "width"), [("170m", 12, 768), ("340m", 24, 1024), ("1b3", 18, 2048)])
def test_titans_has_the_published_shapes_and_parameter_counts(size, layers, width):
    alone, context, gated, layered = (titans_lm.titans(size, join) for join in ("lmm", "mac", "mag", "mal"))
    assert (
        len(alone.layer_names) == len(context.layer_names) == len(gated.layer_names) == layers
        and len(layered.layer_names) == 2 * layers
    )
    assert alone.d_model == width
    heads = titans_lm.MODEL_SIZES[size][2]
    head, inner = width // heads, accounting.count_parameters(alone) - titans_lm.VOCAB_SIZE * width
    # q, k, v, gate, out; two matrices per head; three gates for each of them; three convolutions; persistent tokens
    persistent = titans_lm.NUM_PERSISTENT_TOKENS * width
    memory = 5 * width**2 + 8 * heads * head**2 + 6 * heads * width + 12 * width + persistent
    swiglu = jax.eval_shape(
        lambda: nnx.state(
            SwiGLU().build(width, LayerInfo(0, layers), precision=Precision(), rngs=nnx.Rngs(0)), nnx.Param
        )
    )
    channel = sum(leaf.size for leaf in jax.tree.leaves(swiglu))
    assert inner == pytest.approx(layers * (memory + channel), rel=1e-3)
    attention = 4 * width**2 + persistent
    for other, tokens in ((context, persistent), (gated, 0), (layered, 0)):
        difference = accounting.count_parameters(other) - accounting.count_parameters(alone)
        assert difference == pytest.approx(layers * (attention - tokens), rel=1e-3)


def test_hydra_has_the_published_total_and_documented_parts():
    """The total is 1.61B within 2 %, the parts are those in the docstring of `hydra_lm`, and a token uses 0.94B."""
    config, d = hydra_lm.hydra_1b6(), 2048
    total = accounting.count_parameters(config)
    assert total == pytest.approx(1.61e9, rel=0.02) and total / 1e6 == pytest.approx(1624.2, abs=0.05)
    blocks = [name for name in config.layer_names if name not in ("workspace", "facts")]
    assert len(blocks) == 24 and config.layer_names.count("facts") == 1
    assert [i + 1 for i, name in enumerate(blocks) if name in ("attention", "all")] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert [i + 1 for i, name in enumerate(blocks) if name in ("experts", "all")] == list(range(2, 25, 2))
    parts: dict[str, int] = {}
    for name, count in accounting.parameter_table(config).items():
        part = name.split()[-1] if "paths" in name else name.split()[0]
        parts[part] = parts.get(part, 0) + count
    assert parts["ssm"] == pytest.approx(24 * (5 * d**2 + d), rel=1e-3)  # with convolutions and norms
    assert parts["attention"] == pytest.approx(8 * 4 * d**2, rel=1e-3)
    assert parts["experts"] == pytest.approx(12 * (8 * 3 * d * 1248 + 8 * d), rel=1e-3)
    assert parts["facts"] == pytest.approx(512**2 * 512 + 8 * 512 * 128 + d * 1024 + 512 * d, rel=1e-3)
    inactive = 12 * 6 * 3 * d * 1248 + (512**2 - 4 * 32) * 512
    assert accounting.count_active_parameters(config) == total - inactive
    # FLOPs per token and state bytes do not grow with the context.
    flops = [accounting.forward_flops(config, n) / n for n in (1024, 8192)]
    assert flops[0] == pytest.approx(flops[1], rel=0.01)
    assert accounting.state_bytes(config, 1024) == accounting.state_bytes(config, 100_000)


def test_hydra_toy_and_ablations_build():
    toy = hydra_lm.hydra_toy()
    assert [name for name in toy.layer_names if name not in ("workspace", "facts")][3::4] == ["all", "all"]
    assert accounting.count_parameters(toy) / 1e6 == pytest.approx(8.38, abs=0.01)
    config = importlib.import_module("recallax.configs.mqar_hydra").get_config().model
    counts = {
        name: accounting.count_parameters(replace(config, pattern=p), 64) for name, p in hydra_lm.ABLATIONS.items()
    }
    assert counts["ssm"] == min(counts.values()) and counts["all"] == max(counts.values())
    for name in ("asked", "keys", "landmark", "by_previous", "by_token", "long", "delta"):
        other = replace(config, pattern=f"ssm {name}")
        logits = jax.eval_shape(lambda other=other: other.build(nnx.Rngs(0), 64)(TOKENS, unpacked_seq_info(2, 9))[0])
        assert logits.shape == (2, 9, 64), name


def test_landmark_models_have_the_published_sizes():
    """The model has the 6,738,415,616 parameters of LLaMA-7B and the embedding of the landmark."""
    assert accounting.count_parameters(landmark_lm.landmark_llama()) == 6_738_415_616 + 4096
    assert accounting.count_parameters(landmark_lm.landmark_pg19()) / 1e6 == pytest.approx(202.5, abs=0.1)
    # The state consists of all keys and values, one key per landmark, and one incomplete block.
    per_token = 32 * 2 * 4096 * 2
    num_bytes = accounting.state_bytes(landmark_lm.landmark_llama(), 63 * 1000)
    assert num_bytes == 32 * 2 * 4096 * ((63 * 1000 + 63) * 2 + 1000)
    assert num_bytes / (63 * 1000 * per_token) < 1.01


def test_neural_memory_variants_build_and_report_state_bytes():
    memory = NeuralMemory(num_heads=2, inner_optimizer=InnerOptimizer(chunk_size=4))
    tokens, seq, sizes = jnp.ones((1, 9), jnp.int32), unpacked_seq_info(1, 9), {}
    for name, member in titans_lm.neural_memory_variants(memory).items():
        config = LMConfig(d_model=8, vocab_size=5, pattern="m", blocks={"m": Block(mixer=member)})
        sizes[name] = accounting.state_bytes(config, 9)
        logits, _ = jax.eval_shape(lambda tokens, config=config: config.build(nnx.Rngs(0))(tokens, seq), tokens)
        assert logits.shape == (1, 9, 5), name
    assert sizes["no_momentum"] < sizes["lmm"] == sizes["no_forgetting"]  # the state includes the momentum
    assert sizes["last_layer_only"] < sizes["lmm"]
    assert sizes["linear_sequential"] < sizes["linear"]  # no pending tokens
    assert sizes["ttt_linear"] < sizes["ttt_mlp"]
