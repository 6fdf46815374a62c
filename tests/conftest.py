"""Configuration and fixtures of all tests. Every call checks the jaxtyping annotations of recallax."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

install_import_hook("recallax", "beartype.beartype")

pytest_plugins = ["tests.fault_table"]


def pytest_configure(config: pytest.Config) -> None:
    """Cache compiled programs and tokenized text in temporary folders of this process.

    Processes do not share the folders, because one could read a file that another one is writing.
    """
    compiled = tempfile.TemporaryDirectory(prefix="recallax-compiled-")
    config.add_cleanup(compiled.cleanup)
    text = tempfile.TemporaryDirectory(prefix="recallax-text-")
    config.add_cleanup(text.cleanup)
    os.environ["RECALLAX_CACHE"] = text.name
    jax.config.update("jax_compilation_cache_dir", compiled.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def strict():
    """Raise an error on implicit promotion of dtypes and ranks, for tests of ops, layers and models.

    Programs are compiled without most optimizations, because these tests compile far longer than they run.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def chunks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set chunks and blocks to 4 tokens, so that a row of 11 tokens contains partial ones."""
    for op in ("linear_attention", "taylor_attention", "delta_rule", "selective_scan", "landmark_attention"):
        monkeypatch.setattr(f"recallax.pallas_kernels.{op}.xla.CHUNK", 4)
    monkeypatch.setattr("recallax.pallas_kernels.window_attention.xla.BLOCK", 4)
    monkeypatch.setattr("recallax.pallas_kernels.landmark_attention.xla.KEY_CHUNK", 4)
    monkeypatch.setattr("recallax.pallas_kernels.landmark_attention.block_retrieval.CHUNK", 4)


@pytest.fixture(autouse=True, scope="module")
def clear_compiled_programs():
    """Release compiled programs after each module: the compiler crashes if a process maps some thousands of them."""
    yield
    jax.clear_caches()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Disable the type checker, which rejects a symbolic number of rows."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Share compiled programs between the child processes of a test that run one after another."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
