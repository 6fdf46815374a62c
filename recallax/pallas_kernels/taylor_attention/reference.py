"""Definition of the Taylor kernel's sums: features, then linear attention token by token."""

from collections.abc import Callable

from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds, accumulator_dtype, to_segment_ids
from recallax.pallas_kernels.linear_attention import linear_attention


def taylor_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    state: Float[Array, "B H F V"] | None,
    document_ids: DocumentIds | None,
    feature_map: Callable[[Array], Array],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """Unnormalised sums phi(q_i) . sum_{j<=i} phi(k_j) v_j^T and the final state, in float32 or wider."""
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
