"""Export runs of models that transformers and fla implement, and store their logits beside the weights.

    python -m tests.parity.make_exports FOLDER            # in the environment of recallax
    OMP_NUM_THREADS=1 ENV/bin/python tests/parity/load_exports.py FOLDER

The second command runs in the environments of `make_fixtures.py` and `make_fla_fixtures.py`: transformers and fla must
compute the same logits from the exports. The models are wider than the fixtures and were never imported, and no weight
keeps its initial value.
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
from recallax.train.program import Program
from recallax.train.run_config import RunConfig
from recallax.train.training_run import initialize_run
from recallax.types import unpacked_seq_info

ROWS, LENGTH = 2, 150
UNTIED = Untied()


def lm_config(pattern: str, lm_head: LMHead = UNTIED, norm_eps: float = 1e-5, **mixers: MixerConfig) -> LMConfig:
    """Return a config whose blocks have no channel mixer, except SwiGLU for names in capital letters."""
    channels = {name: NoChannelMixer() if name.islower() else SwiGLU() for name in mixers}
    blocks = {name: Block(mixer=mixer, channel=channels[name]) for name, mixer in mixers.items()}
    return LMConfig(d_model=96, pattern=pattern, blocks=blocks, lm_head=lm_head, norm_eps=norm_eps)


MAMBA2 = Mamba2(state_dim=24, head_dim=16)
DELTA = GatedDeltaNet(num_heads=2, num_v_heads=4, head_k_dim=16, head_v_dim=24, norm_eps=1e-6)
MODELS: dict[str, tuple[str, LMConfig]] = {
    "mamba": ("mamba", lm_config("a*3", a=Mamba(), lm_head=Tied())),
    "mamba2": ("mamba2", lm_config("a*3", a=MAMBA2)),
    "mamba2_groups_tied": ("mamba2", lm_config("a*3", a=replace(MAMBA2, num_groups=3), lm_head=Tied())),
    "llama": ("llama", lm_config("A*3", A=Attention(num_heads=6, num_kv_heads=2))),
    "mistral": ("mistral", lm_config("A*3", A=SlidingWindow(window=20, num_heads=6, num_kv_heads=3))),
    "qwen3_next": ("qwen3_next", lm_config("A*3", A=DELTA, norm_eps=1e-6)),
    "kimi_linear": ("kimi_linear", lm_config("A*3", A=KDA(num_heads=3, decay_gate="softplus"))),
    "nemotron_h": (
        "nemotron_h",
        lm_config(
            "(m p)*2 a p",
            m=replace(MAMBA2, num_groups=2),
            p=ReLUSquared(intermediate_size=128),
            a=Attention(num_heads=6, num_kv_heads=2, rope_theta=None),
        ),
    ),
    "fla_gla": ("gla", lm_config("A*3", A=GLA(num_heads=3))),
    "fla_gla_conv": ("gla", lm_config("A*3", A=GLA(num_heads=3, conv_size=4))),
    "fla_delta_net": ("delta_net", lm_config("A*3", A=DeltaNet(num_heads=3, allow_neg_eigval=True))),
    "fla_gated_deltanet": ("gated_deltanet", lm_config("A*3", A=DELTA, norm_eps=1e-6)),
    "fla_gated_deltaproduct": (
        "gated_deltaproduct",
        lm_config("A*3", A=GatedDeltaProduct(num_heads=3, num_householder=3)),
    ),
    "fla_kda": ("kda", lm_config("A*3", A=KDA(num_heads=3, decay_gate="softplus", output_gate_bias=True))),
    "fla_kda_bounded": ("kda", lm_config("A*3", A=KDA(num_heads=3, output_gate_bias=True))),
    "fla_hgrn2": ("hgrn2", lm_config("A*3", A=HGRN2(num_heads=4, norm_eps=HGRN2_NORM_EPS * 24))),
    "fla_retnet": ("retnet", lm_config("A*3", A=RetNet(num_heads=3))),
    "fla_linear_attn": ("linear_attn", lm_config("A*3", A=LinearAttention(num_heads=3, feature_map="identity"))),
    "fla_mamba2": ("fla_mamba2", lm_config("a*3", a=MAMBA2)),
}
"""Layout and model by name."""
SHARDED = ("llama", "fla_gated_deltanet")
"""Models whose weights are exported in several files."""


def make_run(config: RunConfig, folder: Path, seed: int) -> None:
    """Write a run whose weights have random offsets from their initial values."""
    program = Program(config)
    rng = np.random.default_rng(seed)

    def perturb(leaf: jax.Array) -> np.ndarray:
        x = np.asarray(leaf)
        return (x + rng.normal(scale=0.3 if x.ndim < 3 else x.shape[-2] ** -0.5, size=x.shape)).astype(x.dtype)

    state = program.init_state()
    initialize_run(folder, program, jax.tree.map(perturb, state.params), state.statistics)


def logits_of(folder: Path, tokens: np.ndarray) -> np.ndarray:
    _, graph, _, params, statistics = read_run_state(folder)
    seq = jax.tree.map(jnp.asarray, unpacked_seq_info(*tokens.shape))
    return np.asarray(jax.jit(lambda p, s, t: nnx.merge(graph, p, s)(t, seq)[0])(params, statistics, tokens))


def write(out: Path) -> None:
    base = load_config("mqar_micro")
    for seed, (name, (layout, lm)) in enumerate(MODELS.items()):
        run, folder = out / "runs" / name, out / name
        config = replace(base, model=lm)
        make_run(config, run, seed)
        files = ["--shard-gb", "0.0005"] if name in SHARDED else []
        if main(["export", str(run), "--to", "safetensors", "--out", str(folder), "--layout", layout, *files]):
            sys.exit(1)
        tokens = np.random.default_rng(seed).integers(base.task.vocab_size, size=(ROWS, LENGTH)).astype(np.int32)
        np.savez(folder / "expected.npz", allow_pickle=False, tokens=tokens, logits=logits_of(run, tokens))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
