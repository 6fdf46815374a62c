"""Element-wise gated recurrence: diagonal state-space models, Mamba-1, RG-LRU, HGRN.

    h_t[d, n] = exp(r_t[d] A[d, n]) h_{t-1}[d, n] + x_t[d] B_t[n]        y_t[d] = sum_n C_t[n] h_t[d, n]

A, B and C are optional: without them N is 1, the factor is exp(r_t) and y is h. Mamba-1 passes x = dt * u and r = dt.
State: D x N float32. Source: Gu & Dao 2023 (Mamba, arXiv 2312.00752), section 3; De et al. 2024 (Griffin, arXiv
2402.19427), equation 4.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import index_documents
from recallax.pallas_kernels.dispatch import call_implementation, lazy_kernels, require
from recallax.pallas_kernels.selective_scan import reference, xla
from recallax.pallas_kernels.selective_scan.reference import SelectiveScanArgs

__all__ = ["IMPLEMENTATIONS", "selective_scan", "selective_scan_step"]

IMPLEMENTATIONS = {
    "reference": reference.selective_scan,
    "xla": xla.selective_scan,
    **lazy_kernels("selective_scan", "mosaic_gpu", "mosaic_tpu"),
}


def selective_scan(
    x: Float[Array, "B T D"],
    rate: Float[Array, "B T D"],
    *,
    a: Float[Array, "D N"] | None = None,
    b: Float[Array, "B T N"] | None = None,
    c: Float[Array, "B T N"] | None = None,
    state: Float[Array, "B D N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """Compute the recurrence over whole rows.

    Args:
        x: Inputs.
        rate: Rate r. The natural log of the factor is rate * a with `a`, else rate itself, which is at most 0.
        a: Matrix A, negative. a, b and c are given together or not at all.
        b: Input projection B of each token.
        c: Output projection C of each token.
        state: State before the row, which belongs to its first document; None: zeros.
        segment_ids: Document ids; 0 is padding. None: one document per row.
        implementation: Name of the implementation; None selects one for the device.

    Returns:
        Output in x's dtype and final state in float32.

    Raises:
        ValueError: Shapes do not match, or only some of a, b and c are given.

    Examples:
        >>> x = jnp.ones((1, 3, 1))
        >>> out, state = selective_scan(x, jnp.log(jnp.full((1, 3, 1), 0.5)))
        >>> out.ravel().tolist()
        [1.0, 1.5, 1.75]
    """
    op = "selective_scan"
    rows, t, d = x.shape
    require(op, t >= 1, f"x has {t} tokens; it needs at least 1")
    require(op, rate.shape == x.shape, f"rate has shape {rate.shape}; it must be x's {x.shape}")
    given = [name for name, part in (("a", a), ("b", b), ("c", c)) if part is not None]
    require(op, len(given) in (0, 3), f"only {', '.join(given)} given; pass all of a, b and c or none of them")
    if a is None or b is None or c is None:
        a, b = jnp.ones((d, 1), jnp.float32), jnp.ones((rows, t, 1), x.dtype)
        c = b
    n = a.shape[-1]
    require(op, a.shape == (d, n), f"a has shape {a.shape}; it must be [{d}, N]")
    for name, part in (("b", b), ("c", c)):
        require(op, part.shape == (rows, t, n), f"{name} has shape {part.shape}; it must be {(rows, t, n)}")
    state_shape = (rows, d, n)
    if state is None:
        state = jnp.zeros(state_shape, jnp.float32)
    require(op, state.shape == state_shape, f"state has shape {state.shape}; it must be {state_shape}")
    docs = None if segment_ids is None else index_documents(segment_ids)
    return call_implementation(op, IMPLEMENTATIONS, implementation, SelectiveScanArgs(x, rate, a, b, c, state, docs))


def selective_scan_step(
    x: Float[Array, "B D"],
    rate: Float[Array, "B D"],
    state: Float[Array, "B D N"],
    active: Bool[Array, " B"],
    *,
    a: Float[Array, "D N"] | None = None,
    b: Float[Array, "B N"] | None = None,
    c: Float[Array, "B N"] | None = None,
) -> tuple[Float[Array, "B D"], Float[Array, "B D N"]]:
    """Compute one token of `selective_scan`.

    Args:
        x: Input of each row.
        rate: Rate r of each row.
        state: State before the token.
        active: Rows that have a token; the others keep their state and output 0.
        a: Matrix A, negative. a, b and c are given together or not at all.
        b: Input projection B.
        c: Output projection C.

    Returns:
        Output in x's dtype and state after the token.
    """
    dtype = state.dtype
    log_factor = rate[..., None].astype(dtype) * (jnp.ones((1, 1, 1), dtype) if a is None else a[None].astype(dtype))
    written = x[..., None].astype(dtype)
    written = written if b is None else written * b[:, None].astype(dtype)
    state = jnp.where(active[:, None, None], jnp.exp(log_factor) * state + written, state)
    out = state[..., 0] if c is None else jnp.sum(state * c[:, None].astype(dtype), axis=-1)
    return jnp.where(active[:, None], out, 0).astype(x.dtype), state
