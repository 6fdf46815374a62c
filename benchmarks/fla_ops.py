# pyright: reportMissingImports=false
# (fla lives where the GPU is.)
"""flash-linear-attention's side of `kernels`: its Triton kernels, called with the arrays of `gpu_compare`.

Needs PyTorch and fla-core, and nothing of recallax. fla is imported at the first call.
"""

from collections.abc import Callable
from typing import Any


def linear_attention(q: Any, k: Any, v: Any) -> Any:
    """Linear attention without a decay; q and k are [B, T, H, K], v and the output are [B, T, H, V]."""
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(q, k, v, normalize=False)[0]


def simple_gla(q: Any, k: Any, v: Any, g: Any) -> Any:
    """Linear attention with a log-decay per token, [B, T, H]."""
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, k, v, g=g)[0]


def gla(q: Any, k: Any, v: Any, g: Any) -> Any:
    """Linear attention with a log-decay per token and channel, [B, T, H, K]."""
    from fla.ops.gla import chunk_gla

    return chunk_gla(q, k, v, g=g)[0]


def gated_delta_net(q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
    """The delta rule with a log-decay per token, [B, T, H]; beta is [B, T, H]."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(q, k, v, g=g, beta=beta)[0]


def kda(q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
    """The delta rule with a log-decay per token and channel, [B, T, H, K]; beta is [B, T, H]."""
    from fla.ops.kda import chunk_kda

    return chunk_kda(q, k, v, g=g, beta=beta)[0]


def based(q: Any, k: Any, v: Any) -> Any:
    """BASED's attention, normalized; q and k are [B, T, H, K], v and the output are [B, T, H, V]."""
    from fla.ops.based import parallel_based

    return parallel_based(q, k, v)


OPS: dict[str, Callable[..., Any]] = {
    "linear_attention": linear_attention,
    "simple_gla": simple_gla,
    "gla": gla,
    "gated_delta_net": gated_delta_net,
    "kda": kda,
    "based": based,
}
"""By the name of the comparison."""
