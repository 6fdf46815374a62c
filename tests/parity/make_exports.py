"""Make runs of models that transformers and fla have, export them, and keep what they compute beside the weights.

    python -m tests.parity.make_exports FOLDER            # with recallax's own Python
    OMP_NUM_THREADS=1 ENV/bin/python tests/parity/load_exports.py FOLDER

The second line is for the environment of `make_fla_fixtures.py`: transformers and fla load what was exported and must
give the same logits. Models are wider than the fixtures, none of them was imported, and every weight is away from where
it starts.
"""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recallax.cli.config_files import load_config
from recallax.cli.main import main
from recallax.config import to_json
from recallax.convert import read_run_state
from recallax.convert.layouts.fla_linear_mixers import HGRN2_NORM_EPS
from recallax.layers import (
    GLA,
    HGRN2,
    KDA,
    Attention,
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaProduct,
    LinearAttention,
    Mamba,
    Mamba2,
    MixerConfig,
    NoChannelMixer,
    ReLUSquared,
    RetNet,
    SlidingWindow,
    SwiGLU,
)
from recallax.models import Block, LMConfig, Tied, Untied
from recallax.models.lm_head import LMHead
from recallax.train.checkpoint import Checkpoints
from recallax.train.program import Program
from recallax.train.run_config import RunConfig
from recallax.train.run_folder import RunFolder
from recallax.types import unpacked_seq_info

ROWS, LENGTH = 2, 150
UNTIED = Untied()


def model(pattern: str, readout: LMHead = UNTIED, norm_eps: float = 1e-5, **mixers: MixerConfig) -> LMConfig:
    """Layers of one sublayer, but for those named with a capital letter, which have a perceptron too."""
    channels = {name: NoChannelMixer() if name.islower() else SwiGLU() for name in mixers}
    blocks = {name: Block(mixer=mixer, channel=channels[name]) for name, mixer in mixers.items()}
    return LMConfig(d_model=96, pattern=pattern, blocks=blocks, lm_head=readout, norm_eps=norm_eps)


MAMBA2 = Mamba2(state_dim=24, head_dim=16)
DELTA = GatedDeltaNet(num_heads=2, num_v_heads=4, head_k_dim=16, head_v_dim=24, norm_eps=1e-6)
MODELS: dict[str, tuple[str, LMConfig]] = {
    "mamba": ("mamba", model("a*3", a=Mamba(), readout=Tied())),
    "mamba2": ("mamba2", model("a*3", a=MAMBA2)),
    "mamba2_groups_tied": ("mamba2", model("a*3", a=replace(MAMBA2, num_groups=3), readout=Tied())),
    "llama": ("llama", model("A*3", A=Attention(num_heads=6, num_kv_heads=2))),
    "mistral": ("mistral", model("A*3", A=SlidingWindow(window=20, num_heads=6, num_kv_heads=3))),
    "qwen3_next": ("qwen3_next", model("A*3", A=DELTA, norm_eps=1e-6)),
    "kimi_linear": ("kimi_linear", model("A*3", A=KDA(num_heads=3, decay_gate="softplus"))),
    "nemotron_h": (
        "nemotron_h",
        model(
            "(m p)*2 a p",
            m=replace(MAMBA2, num_groups=2),
            p=ReLUSquared(intermediate_size=128),
            a=Attention(num_heads=6, num_kv_heads=2, rope_theta=None),
        ),
    ),
    "fla_gla": ("gla", model("A*3", A=GLA(num_heads=3))),
    "fla_gla_conv": ("gla", model("A*3", A=GLA(num_heads=3, conv_size=4))),
    "fla_delta_net": ("delta_net", model("A*3", A=DeltaNet(num_heads=3, allow_neg_eigval=True))),
    "fla_gated_deltanet": ("gated_deltanet", model("A*3", A=DELTA, norm_eps=1e-6)),
    "fla_gated_deltaproduct": ("gated_deltaproduct", model("A*3", A=GatedDeltaProduct(num_heads=3, num_householder=3))),
    "fla_kda": ("kda", model("A*3", A=KDA(num_heads=3, decay_gate="softplus", output_gate_bias=True))),
    "fla_kda_bounded": ("kda", model("A*3", A=KDA(num_heads=3, output_gate_bias=True))),
    "fla_hgrn2": ("hgrn2", model("A*3", A=HGRN2(num_heads=4, norm_eps=HGRN2_NORM_EPS * 24))),
    "fla_retnet": ("retnet", model("A*3", A=RetNet(num_heads=3))),
    "fla_linear_attn": ("linear_attn", model("A*3", A=LinearAttention(num_heads=3, feature_map="identity"))),
    "fla_mamba2": ("fla_mamba2", model("a*3", a=MAMBA2)),
}
"""By name: the layout, and the model."""
SHARDED = ("llama", "fla_gated_deltanet")
"""Written in several files."""


def run_of(config: RunConfig, folder: Path, seed: int) -> None:
    """A run whose weights are moved from where they start."""
    program = Program(config)
    rng = np.random.default_rng(seed)

    def moved(leaf: jax.Array) -> np.ndarray:
        x = np.asarray(leaf)
        return (x + rng.normal(scale=0.3 if x.ndim < 3 else x.shape[-2] ** -0.5, size=x.shape)).astype(x.dtype)

    state = program.init_state()
    state = program.init_state_from(jax.tree.map(moved, state.params), state.statistics)
    with RunFolder(folder, config) as run, Checkpoints(run.checkpoints) as checkpoints:
        checkpoints.save(0, state, {"config": to_json(config)})


def logits_of(folder: Path, tokens: np.ndarray) -> np.ndarray:
    _, graph, _, params, statistics = read_run_state(folder)
    seq = jax.tree.map(jnp.asarray, unpacked_seq_info(*tokens.shape))
    return np.asarray(jax.jit(lambda p, s, t: nnx.merge(graph, p, s)(t, seq)[0])(params, statistics, tokens))


def write(out: Path) -> None:
    base = load_config("mqar_micro")
    for seed, (name, (layout, lm)) in enumerate(MODELS.items()):
        run, folder = out / "runs" / name, out / name
        config = replace(base, model=lm)
        run_of(config, run, seed)
        files = ["--shard-gb", "0.0005"] if name in SHARDED else []
        if main(["export", str(run), "--to", "safetensors", "--out", str(folder), "--layout", layout, *files]):
            sys.exit(1)
        tokens = np.random.default_rng(seed).integers(base.task.vocab_size, size=(ROWS, LENGTH)).astype(np.int32)
        np.savez(folder / "expected.npz", allow_pickle=False, tokens=tokens, logits=logits_of(run, tokens))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
