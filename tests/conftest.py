"""What every test shares."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# The shapes and dtypes in the signatures of the numeric core are checked at every call that a test makes. Not those of
# what takes a user's settings: these check themselves, and say more.
_CHECKED = (
    "dapt_jax.data.augment",
    "dapt_jax.data.pipeline",
    "dapt_jax.metrics",
    "dapt_jax.models.classifier",
    "dapt_jax.objectives",
    "dapt_jax.ops.convolution",
    "dapt_jax.ops.depthwise",
    "dapt_jax.ops.pooling",
    *(f"dapt_jax.training.{room}" for room in ("evaluate", "features", "feeds", "freezing", "heads", "steps")),
)
install_import_hook(_CHECKED, "beartype.beartype")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are kept beside pytest's own cache: the second run of the tests is the quicker one."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("xla")))  # before jax is imported
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


@pytest.fixture
def shared_data() -> Path:
    """The folder of real images beside the checkout; the test is skipped where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no folder of real images at {SHARED_DATA}")
    return SHARED_DATA
