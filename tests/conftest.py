"""Shape checking is on in tests: every jaxtyping annotation of recallax is checked at every call."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

install_import_hook("recallax", "beartype.beartype")


def pytest_configure(config: pytest.Config) -> None:
    """What a process has compiled it finds again, also in the next module.

    No two processes share a folder: one would read what another is about to write.
    """
    found = tempfile.TemporaryDirectory(prefix="recallax-compiled-")
    config.add_cleanup(found.cleanup)
    text = tempfile.TemporaryDirectory(prefix="recallax-text-")
    config.add_cleanup(text.cleanup)
    os.environ["RECALLAX_CACHE"] = text.name
    jax.config.update("jax_compilation_cache_dir", found.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def strict():
    """No silent promotion of dtypes or ranks, as in the code that computes: ops, layers, models.

    Compiled without optimisation, since these tests compile far longer than they run.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def chunks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and blocks of 4, so that a row of 11 tokens crosses their boundaries at odd places."""
    for op in ("linear_attention", "taylor_attention", "delta_rule", "selective_scan", "landmark_attention"):
        monkeypatch.setattr(f"recallax.pallas_kernels.{op}.xla.CHUNK", 4)
    monkeypatch.setattr("recallax.pallas_kernels.window_attention.xla.BLOCK", 4)
    monkeypatch.setattr("recallax.pallas_kernels.landmark_attention.xla.KEY_CHUNK", 4)
    monkeypatch.setattr("recallax.pallas_kernels.landmark_attention.block_retrieval.CHUNK", 4)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """A process may map only so many programs: beyond some thousands the compiler crashes."""
    yield
    jax.clear_caches()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """The type checker of the tests takes no number of rows that is still open."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What one process of a test compiles the next one finds; for tests whose processes compile one after another."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
