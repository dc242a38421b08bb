"""What every test shares."""

import gc
import os
import re
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# The shapes and dtypes in the signatures of the numeric core are checked at every call that a test makes. Not
# those of what takes a user's settings: these check themselves, and say more.
_CHECKED = (
    "dapt_jax.data.augment",
    "dapt_jax.data.pipeline",
    "dapt_jax.metrics",
    "dapt_jax.models.classifier",
    "dapt_jax.losses",
    "dapt_jax.ops.convolution",
    "dapt_jax.ops.depthwise",
    "dapt_jax.ops.pooling",
    "dapt_jax.ops.product",
    *(
        f"dapt_jax.training.{room}"
        for room in (
            "cache.store",
            "evaluate",
            "freezing",
            "head_sweep",
            "linear_head",
            "step_runners",
            "steps",
        )
    ),
)
install_import_hook(_CHECKED, "beartype.beartype")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SHARED_CASES = SHARED_DATA.with_name("cases")


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are kept beside pytest's own cache: the second run of the tests is the quicker one."""
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("xla"))
    )  # before jax is imported
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


LONGEST = ("test_aot", "test_guide", "test_runtime_sharding", "test_study_processes", "test_study_resume")
"""Files of the tier `long` to start with, so that no process is left with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of several processes the last one to end is the duration: what takes longest comes first."""
    first = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))


def pytest_collection_finish() -> None:
    """What modules hold stays; tracing makes millions of objects that are looked through less often."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def shared_data() -> Path:
    """The folder of real images beside the checkout; the test is skipped where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no folder of real images at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def shared_cases() -> Path:
    """The folder of small inputs that came out wrong, beside the checkout; the test is skipped where there is none."""
    if not SHARED_CASES.is_dir():
        pytest.skip(f"no folder of small inputs at {SHARED_CASES}")
    return SHARED_CASES


# What the fixtures below import, they import themselves: JAX must not be there before its settings are.
TRACES = ("results.jsonl", "ledger.jsonl", "checkpoints", "report.html")


@pytest.fixture
def refused(request, tmp_path, tmp_path_factory, capsys):
    """Runs a command that must be refused, and returns its error line without `error: `."""
    from tests.command import run
    from tests.golden import errors

    def refuse(*flags, workdir=tmp_path / "workdir", words=()):
        before = sorted(workdir.rglob("*")) if workdir.is_dir() else None
        code = run(*flags, f"--workdir={workdir}")
        err = capsys.readouterr().err
        assert code == 2, err
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        assert "Traceback" not in err
        if before is None:
            assert not any((workdir / trace).exists() for trace in (*TRACES, "config.json"))
        else:
            assert sorted(workdir.rglob("*")) == before
        line = err.removeprefix("error: ").rstrip("\n")
        for word in words:
            assert word in line, f"no {word!r} in: {line}"
        errors.hold(request.node.nodeid, line, {"TMP": tmp_path, "TEMPORARY": tmp_path_factory.getbasetemp()})
        return line

    return refuse


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    from dapt_jax.data import phantoms

    folder = tmp_path_factory.mktemp("phantoms")
    phantoms.write(folder, 36, 32)
    return folder


@pytest.fixture
def data(tmp_path, written):
    from tests.manifests import Data

    return Data(tmp_path / "data", written)


@pytest.fixture
def refused_data(refused, tmp_path, data):
    """As `refused`, for the study of a manifest; more lines go into its config."""
    from tests.command import write_config

    def refuse(*more, words=(), flags=()):
        config = write_config(tmp_path, *more)
        return refused(f"--config={config}", f"--config.data_dir={data.folder}", *flags, words=words)

    return refuse
