"""Damaged files of a workdir: whatever is wrong with them, one line says where, or the report's tables are made."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_jax.errors import UserError
from dapt_jax.records import Records, intensities, overlays, predictions
from dapt_jax.report import claims, main_table, narrative, selection, tables
from dapt_jax.report import predictions as report_predictions
from dapt_jax.runtime import atomic_files
from tests import test_report_example as report_example

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[1]
TASK = "tumour type"
FILES = ("config.json", "results.jsonl", "ledger.jsonl", "leaks.json", "intensities.json")
DELETED = object()
ODD = (
    DELETED,
    None,
    True,
    -1,
    0,
    2**70,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "$x_{$",
    [],
    [1],
    {},
    {"a": []},
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    workdir = report_example.write(tmp_path_factory.mktemp("good"), seeds=(0, 1), strategies=("none", "full"))
    (workdir / "leaks.json").write_text(json.dumps({TASK: {"external": "3 images"}}))
    row = {"origin": "8 bits", "images": 3, "low": [0.0, 0.0], "high": [255.0, 255.0], "example": "a.png"}
    (workdir / "intensities.json").write_text(json.dumps({"corpus": [row]}))
    ledger = atomic_files.read(workdir / "ledger.jsonl")
    point = {
        "epoch": 0,
        "share": 0.5,
        "scores": {"knn": 0.5},
        "higher_is_better": {"knn": True},
        "chosen": True,
    }
    ledger.append({"strategy": "full", "seed": 0, "stage": "score", "phase": "scores", "curve": [point] * 3})
    atomic_files.write(workdir / "ledger.jsonl", ledger)
    rng = np.random.default_rng(0)
    for name in ("none", "full"):
        probabilities = {"linear": rng.dirichlet(np.ones(3), 12)}
        path = predictions.path_of(workdir, name, 0, TASK, "external")
        predictions.write(path, np.arange(12) % 3, np.arange(12), np.arange(12).astype(str), probabilities)
    samples = overlays.SegmentationSamples(
        TASK, "external", "full", "frozen", ("a", "b"), ("no", "yes"), False,
        np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 4), np.uint8), np.ones((2, 4, 4), np.uint8),
    )  # fmt: skip
    overlays.write(workdir, samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_predictions, "RESAMPLES", 20)
        yield workdir


def show(workdir):
    """Makes every table and sentence, and no picture."""
    records = Records.read(workdir)
    overlays.read(workdir)
    for task in records.tasks:
        for make in (
            main_table.table,
            tables.everything,
            tables.per_class,
            claims.table,
            selection.agreement,
        ):
            make(records, task)
        narrative.summary(records, task)
        report_predictions.table(workdir, records, task)
    tables.totals(records)
    tables.intensity_ranges(intensities.read(workdir))
    claims.over_tasks(records)


def line_of(workdir):
    """The line with which a workdir is refused; empty where its tables are made."""
    try:
        show(workdir)
    except UserError as error:
        return str(error)
    return ""


def refused_or_shown(workdir):
    """Whether a workdir is refused, in one line that names a file of it."""
    line = line_of(workdir)
    assert "\n" not in line
    assert not line or str(workdir) in line
    return bool(line)


@pytest.fixture
def damaged(good, tmp_path):
    workdir = tmp_path / "damaged"

    def damage(name, content):
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(good, workdir)
        (workdir / name).write_bytes(content)
        return workdir

    return damage


def paths_of(value, path=()):
    yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from paths_of(child, (*path, key))


def changed(value, path, new):
    found = copy.deepcopy(value)
    place = found
    for key in path[:-1]:
        place = place[key]
    if new is DELETED:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return found


def test_a_good_workdir_is_shown(good):
    assert not refused_or_shown(good)


@settings(max_examples=60, deadline=None)
@given(drawn=st.data())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # sums of numbers near the largest that there is
def test_a_value_of_another_type_is_refused_in_one_line_or_does_no_harm(good, drawn, tmp_path_factory):
    name = drawn.draw(st.sampled_from(FILES))
    text = (good / name).read_text()
    rows = [json.loads(text)] if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    number = drawn.draw(st.integers(0, len(rows) - 1))
    path = drawn.draw(st.sampled_from(list(paths_of(rows[number]))))
    new = drawn.draw(st.sampled_from(ODD))
    rows[number] = changed(rows[number], path, new) if path else None if new is DELETED else new
    workdir = tmp_path_factory.mktemp("damaged") / "study"
    shutil.copytree(good, workdir)
    (workdir / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
    refused_or_shown(workdir)


@settings(max_examples=40, deadline=None)
@given(drawn=st.data())
def test_damaged_bytes_are_refused_in_one_line_or_do_no_harm(good, drawn, tmp_path_factory):
    names = [path.relative_to(good) for path in sorted(good.rglob("*")) if path.is_file()]
    name = drawn.draw(st.sampled_from(names))
    content = bytearray((good / name).read_bytes())
    start = drawn.draw(st.integers(0, len(content)))
    if drawn.draw(st.booleans()):
        del content[start:]
    else:
        content[start : start + 8] = drawn.draw(st.binary(min_size=1, max_size=8))
    workdir = tmp_path_factory.mktemp("damaged") / "study"
    shutil.copytree(good, workdir)
    (workdir / name).write_bytes(content)
    refused_or_shown(workdir)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", b"[" * 100_000, "config.json: not JSON"),
        ("config.json", b"\xff\xfe", "config.json: not JSON"),
        ("config.json", b'{"seeds": "0,1"}', "config.json: seeds is '0,1'; expected a list, each member a whole number"),
        ("config.json", b'{"report": {"margin": "1"}}', "config.json: report: margin is '1'; expected a number from 0"),
        ("results.jsonl", b"\n", "results.jsonl:1: not a line of JSON"),
        ("results.jsonl", b"1" * 5000, "results.jsonl:1: not a line of JSON"),
        ("results.jsonl", b"\x80\n", "results.jsonl:1: not a line of JSON"),
        ("ledger.jsonl", b'{"strategy": "a", "seed": 0, "stage": "dapt", "phase": 3}\n', ":1: ledger row: phase is 3"),
        (
            "ledger.jsonl",
            b'{"strategy": "a", "seed": 0, "stage": "score", "phase": "s", "curve": [{"scores": {"knn": "x"}}]}\n',
            "ledger.jsonl:1: ledger row: curve[0]: no key 'epoch'",
        ),
        ("predictions/full-seed0/tumour type-external.npz", b"PK", "npz: not an .npz of arrays"),
        ("overlays/tumour type-external-full-frozen.npz", b"", "npz: not an .npz of arrays"),
        ("leaks.json", b"[]", "leaks.json: expected a JSON object, found list"),
        (
            "intensities.json",
            b'{"corpus": [{"origin": "x", "images": 1, "low": [0], "high": [1, 1], "example": "a"}]}',
            "intensities.json: corpus: low is [0]; expected two numbers",
        ),
    ],
)  # fmt: skip
def test_the_line_names_file_and_place(damaged, name, content, words):
    with pytest.raises(UserError) as error:
        show(damaged(name, content))
    assert words in str(error.value)


@pytest.mark.parametrize("what", ["folder", "huge"])
def test_files_that_are_none_and_files_that_claim_too_much(good, tmp_path, what):
    workdir = tmp_path / "study"
    shutil.copytree(good, workdir)
    if what == "folder":
        (workdir / "results.jsonl").unlink()
        (workdir / "results.jsonl").mkdir()
    else:
        (path,) = (workdir / "overlays").glob("*.npz")
        content = path.read_bytes().replace(b"(2, 4, 4)", b"(2, 4, 9999999999)")
        path.write_bytes(content)
    assert refused_or_shown(workdir) or what == "huge"


def test_predictions_and_overlays_are_written_beside_and_renamed(good, tmp_path, monkeypatch):
    path = predictions.path_of(tmp_path, "full", 0, TASK, "external")
    arguments = np.arange(4) % 2, np.arange(4), np.arange(4).astype(str)
    predictions.write(path, *arguments, {"linear": np.full((4, 2), 0.5)})
    before = path.read_bytes()

    def cut(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", cut)
    with pytest.raises(OSError, match="No space"):
        predictions.write(path, *arguments, {"linear": np.full((4, 2), 0.25)})
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_reports_records_metrics_and_statistics_import_neither_jax_nor_settings():
    blocker = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('jax', 'jaxlib', 'flax', 'optax') or name == 'dapt_jax.settings':\n"
        "            raise ImportError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    rooms = ("report", "records", "metrics", "statistics")
    modules = [
        f"{room}.{path.stem}" for room in rooms for path in sorted((ROOT / "dapt_jax" / room).glob("*.py"))
    ]
    imports = "\n".join(f"import dapt_jax.{module}" for module in modules)
    subprocess.run([sys.executable, "-c", f"{blocker}{imports}"], check=True, cwd=ROOT)
