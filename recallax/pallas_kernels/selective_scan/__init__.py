"""The element-wise gated recurrence: diagonal state-space models, Mamba-1, RG-LRU, HGRN.

    h_t[d, n] = exp(r_t[d] A[d, n]) h_{t-1}[d, n] + x_t[d] B_t[n]        y_t[d] = sum_n C_t[n] h_t[d, n]

A, B and C are optional: without them N is 1, the factor is exp(r_t) and y is h. Mamba-1 feeds x = dt * u and r = dt.
State: D x N float32. Source: Gu & Dao 2023 (Mamba, arXiv 2312.00752), section 3; De et al. 2024 (Griffin, arXiv
2402.19427), equation 4.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import index_documents
from recallax.pallas_kernels.dispatch import call_implementation, lazy_kernel, require
from recallax.pallas_kernels.selective_scan import reference, xla

IMPLEMENTATIONS = {
    "reference": reference.selective_scan,
    "xla": xla.selective_scan,
    "mosaic_gpu": lazy_kernel("recallax.pallas_kernels.selective_scan.mosaic_gpu", "selective_scan"),
    "mosaic_tpu": lazy_kernel("recallax.pallas_kernels.selective_scan.mosaic_tpu", "selective_scan"),
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
    """Output in x's dtype and final state in float32.

    rate: r; with `a` (negative) the factor's logarithm is rate * a, without it is rate itself, at most 0.
    a, b, c: given all or none. state: belongs to the row's first document; None starts at zero.
    segments: document ids, 0 is padding. Raises ValueError where shapes disagree.
    """
    op = "selective_scan"
    rows, t, d = x.shape
    require(op, t >= 1, f"x has {t} tokens; it needs at least 1")
    require(op, rate.shape == x.shape, f"rate has shape {rate.shape}; it must be x's {x.shape}")
    given = [name for name, part in (("a", a), ("b", b), ("c", c)) if part is not None]
    require(op, len(given) in (0, 3), f"only {', '.join(given)} given; a, b and c come together or not at all")
    if a is None or b is None or c is None:
        a, b = jnp.ones((d, 1), jnp.float32), jnp.ones((rows, t, 1), x.dtype)
        c = b
    n = a.shape[-1]
    require(op, a.shape == (d, n), f"a has shape {a.shape}; it must be [{d}, N]")
    for name, part in (("b", b), ("c", c)):
        require(op, part.shape == (rows, t, n), f"{name} has shape {part.shape}; it must be {(rows, t, n)}")
    wanted = (rows, d, n)
    if state is None:
        state = jnp.zeros(wanted, jnp.float32)
    require(op, state.shape == wanted, f"state has shape {state.shape}; it must be {wanted}")
    docs = None if segment_ids is None else index_documents(segment_ids)
    return call_implementation(op, IMPLEMENTATIONS, implementation, x, rate, a, b, c, state, docs)


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
    """One token of the same recurrence; inactive rows keep their state and output 0."""
    wide = state.dtype
    log = rate[..., None].astype(wide) * (jnp.ones((1, 1, 1), wide) if a is None else a[None].astype(wide))
    wrote = x[..., None].astype(wide)
    wrote = wrote if b is None else wrote * b[:, None].astype(wide)
    state = jnp.where(active[:, None, None], jnp.exp(log) * state + wrote, state)
    out = state[..., 0] if c is None else jnp.sum(state * c[:, None].astype(wide), axis=-1)
    return jnp.where(active[:, None], out, 0).astype(x.dtype), state
