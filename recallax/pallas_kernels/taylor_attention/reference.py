"""The definition of the Taylor kernel's sums: features, then plain linear attention token by token."""

from collections.abc import Callable

from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds, accumulator_dtype
from recallax.pallas_kernels.linear_attention import reference


def taylor_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    state: Float[Array, "B H F V"] | None,
    document_ids: DocumentIds | None,
    feature_map: Callable[[Array], Array],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """Unnormalised sums phi(q_i) . sum_{j<=i} phi(k_j) v_j^T and the final state, in float32 or wider."""
    wide = accumulator_dtype(q.dtype)
    phi_q, phi_k = feature_map(q.astype(wide)), feature_map(k.astype(wide))
    return reference.linear_attention(phi_q, phi_k, v.astype(wide), None, state, document_ids, 1.0)
