"""Shape checking is on in tests: every jaxtyping annotation of recallax is checked at every call.

What one process of a test run compiles, the others find: workers, and the commands that tests start. Nothing stays.
"""

import os
import tempfile
from collections.abc import Iterator

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

install_import_hook("recallax", "beartype.beartype")
FOLDER = "JAX_COMPILATION_CACHE_DIR"


def pytest_configure(config: pytest.Config) -> None:
    if FOLDER not in os.environ:  # a worker has it from the process that started it
        found = tempfile.TemporaryDirectory(prefix="recallax-compiled-")
        config.add_cleanup(found.cleanup)
        os.environ[FOLDER] = found.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    jax.config.update("jax_compilation_cache_dir", os.environ[FOLDER])
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
