# pyright: reportMissingImports=false
# (torch is installed in a separate environment with another version of Python.)
"""Write `fixtures/based.npz`: a tiny BASED with random weights under HazyResearch's names, and its outputs.

    OMP_NUM_THREADS=1 ENV/bin/python tests/parity/make_based_fixture.py            # --check compares with the file

The environment is that of `make_fixtures.py`. Importing HazyResearch's package needs CUDA extensions, so this script
implements the model again in plain torch, with the names, shapes and equations of `based/models` at 32c1bd4. The file
therefore proves that recallax agrees with this reading of their code, not with their code.
"""

from types import SimpleNamespace

import numpy as np
import torch
from make_fixtures import ROWS, VERSIONS, least_sensitive_weight, logits_of, randomize, to_numpy, write
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH = 13
MIXERS = "based.models.mixers."
CONFIG = {
    "architectures": ["GPTLMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 29,
    "pad_vocab_size_multiple": 8,
    "n_embd": 8,
    "n_layer": 3,
    "n_head": 2,
    "n_inner": 16,  # rounded up to 256
    "n_positions": 0,
    "activation_function": "swiglu",
    "rms_norm": True,
    "layer_norm_epsilon": 1e-5,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "qkv_proj_bias": False,
    "out_proj_bias": False,
    "residual_in_fp32": True,
    "fixed_decay": True,
    "decay_const": -3,
    "decay_denom": False,
    "rotary_emb_fraction": 1,
    "attn_pdrop": 0,
    "embd_pdrop": 0,
    "resid_pdrop": 0,
    "alt_mixer_layers": [1],
    "alt_mixer_2_layers": [2],
    "mixer": {
        "_target_": f"{MIXERS}convolution.BaseConv",
        "l_max": 2048,
        "use_bias": True,
        "expand_proj": 4,
        "kernel_sizes": 3,
    },
    "alt_mixer": {
        "_target_": f"{MIXERS}linear_attention.LinearAttention",
        "l_max": 2048,
        "feature_map": {"_target_": f"{MIXERS}linear_attention.TaylorExp", "input_dim": 4},
        "feature_dim": 4,
        "num_heads": 2,
    },
    "alt_mixer_2": {
        "_target_": f"{MIXERS}slide_attention.SlidingAttention",
        "window_size": 8,
        "num_heads": 2,
        "causal": True,
    },
}
WIDTH, HEADS, INNER, FEATURES, ROUNDED, VOCAB = 8, 2, 16, 4, 256, 32


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class ShortConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(INNER, INNER, 3, groups=INNER, padding=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mT)[..., : x.shape[1]].mT


class BaseConv(nn.Module):
    """Gated convolution: silu of the convolved first half of the projection, times the second half."""

    def __init__(self):
        super().__init__()
        self.in_proj = nn.Linear(WIDTH, 2 * INNER)
        self.out_proj = nn.Linear(INNER, WIDTH)
        self.conv = ShortConvolution()
        for part in (self.in_proj, self.out_proj):
            nn.init.zeros_(part.bias)

    def forward(self, x: Tensor) -> Tensor:
        convolved, gate = self.in_proj(x).split(INNER, dim=-1)
        return self.out_proj(F.silu(self.conv(convolved)) * gate)


class LinearAttention(nn.Module):
    """Attention with scores 1 + s + s^2 / 2, computed from features and divided by their sum."""

    def __init__(self):
        super().__init__()
        self.proj_q = nn.Linear(WIDTH, HEADS * FEATURES, bias=False)
        self.proj_k = nn.Linear(WIDTH, HEADS * FEATURES, bias=False)
        self.proj_v = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(proj(x)) for proj in (self.proj_q, self.proj_k, self.proj_v))
        scores = torch.tril(taylor_features(q) @ taylor_features(k).mT)
        return self.out_proj(merge_heads(scores @ v / (scores.sum(-1, keepdim=True) + 1e-12)))


class SlidingAttention(nn.Module):
    """Rotary softmax attention over the token itself and the `window_size / 2` tokens before it."""

    def __init__(self):
        super().__init__()
        self.Wqkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part) for part in self.Wqkv(x).split(WIDTH, dim=-1))
        scores = rotate(q) @ rotate(k).mT / q.shape[-1] ** 0.5
        positions = torch.arange(x.shape[1])
        distances = positions[:, None] - positions[None]
        visible = (distances >= 0) & (distances <= CONFIG["alt_mixer_2"]["window_size"] // 2)
        return self.out_proj(merge_heads(scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v))


class GatedMlp(nn.Module):
    """Gated MLP whose gate is the second half of the first projection."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 2 * ROUNDED, bias=False)
        self.fc2 = nn.Linear(ROUNDED, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(up * F.silu(gate))


class Block(nn.Module):
    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.mixer, self.norm1, self.mlp, self.norm2 = mixer, RMSNorm(), GatedMlp(), RMSNorm()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UnusedDecay(nn.Module):
    """Module with a buffer that no mixer reads."""

    def __init__(self):
        super().__init__()
        self.register_buffer("decay", torch.log(1 - 2 ** (-3 - torch.arange(HEADS, dtype=torch.float))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([Block(BaseConv()), Block(LinearAttention()), Block(SlidingAttention())])
        self.ln_f, self.decay = RMSNorm(), UnusedDecay()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embeddings.word_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.ln_f(x)


class GPTLMHeadModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = Transformer()
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.transformer.embeddings.word_embeddings.weight

    def forward(self, tokens: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.lm_head(self.transformer(tokens)))


def split_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(-2)


def taylor_features(x: Tensor) -> Tensor:
    """Return 1, x and all products of two elements of x, scaled so that features have products 1 + s + s^2 / 2."""
    width = x.shape[-1] ** 0.5
    pairs = (x[..., :, None] * x[..., None, :]).flatten(-2) / (2**0.5 * width)
    return torch.cat([torch.ones_like(x[..., :1]), x / width**0.5, pairs], dim=-1)


def rotate(x: Tensor) -> Tensor:
    """Apply rotary positions, which pair the first half of the channels with the second half."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


def make_arrays(name: str) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    model = GPTLMHeadModel().eval()
    for key, parameter in model.named_parameters():
        randomize(key, parameter)
        parameter.copy_(parameter.bfloat16())  # compresses to half the size
    tokens = torch.randint(CONFIG["vocab_size"], (ROWS, LENGTH))
    logits = logits_of(model, tokens)
    effect, weight = least_sensitive_weight(model, tokens, logits)
    print(f"{name:16} logits to {float(logits.abs().max()):4.1f}  smallest effect {effect:.0e} ({weight})")
    arrays = {f"weights/{key}": value for key, value in model.state_dict().items()}
    arrays |= {"tokens": tokens.to(torch.int32), "logits": logits}
    return to_numpy(arrays, CONFIG, VERSIONS)


if __name__ == "__main__":
    write(__doc__ or "", ["based"], make_arrays)
