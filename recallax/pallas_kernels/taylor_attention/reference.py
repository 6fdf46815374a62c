"""Definition of the Taylor kernel's sums: features, then linear attention token by token."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds, accumulator_dtype, to_segment_ids
from recallax.pallas_kernels.linear_attention import linear_attention


class TaylorAttentionArgs(NamedTuple):
    """Checked arguments of an implementation of `taylor_attention`."""

    q: Float[Array, "B T H K"]
    """Queries times K**-0.25."""
    k: Float[Array, "B T H K"]
    """Keys times K**-0.25."""
    v: Float[Array, "B T H V"]
    """Values and, in the last column, ones, whose sums are the denominators."""
    state: Float[Array, "B H F V"] | None
    """None: zeros."""
    document_ids: DocumentIds | None
    """None: one document per row."""
    feature_map: Callable[[Array], Array]


def taylor_attention(args: TaylorAttentionArgs) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """Unnormalised sums phi(q_i) . sum_{j<=i} phi(k_j) v_j^T and the final state, in float32 or wider."""
    q, k, v, state, document_ids, feature_map = args
    dtype = accumulator_dtype(q.dtype)
    return linear_attention(
        feature_map(q.astype(dtype)),
        feature_map(k.astype(dtype)),
        v.astype(dtype),
        state=state,
        segment_ids=None if document_ids is None else to_segment_ids(document_ids),
        scale=1.0,
        implementation="reference",
    )
