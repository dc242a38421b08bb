"""Workdirs and data that are elsewhere: the same files there as here, whatever fails in between."""

import contextlib
import functools
import os
import random
import tempfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

import dapt_jax as dj
from dapt_jax.errors import UserError
from dapt_jax.inference import target_model
from dapt_jax.models import registry
from dapt_jax.report import compare
from dapt_jax.runtime import storage
from dapt_jax.study import checkpoints, evidence, pace, power
from dapt_jax.study.checkpoints import Checkpoint
from dapt_jax.weights import locate
from dapt_jax.weights.run_reference import RunReference
from tests.command import ROOT, run, small, write_config


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    storage.data.cache_clear()


@pytest.fixture
def bucket():
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def there(files):
    return {path: files.cat_file(path).decode(errors="replace") for path in files.find("/bucket/study")}


def test_a_workdir_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for place, folder in (("~/runs", tmp_path / "runs"), ("~noone/runs", Path("~noone/runs")), (None, None)):
        with storage.workdir(place, "run") as found:
            assert found == folder


def test_a_path_under_the_home_of_a_user_who_is_not_there_is_one_line_everywhere():
    place = "~no-such-user/file"
    for of_path in (
        locate.find,
        lambda path: RunReference.of(f"run:{path}").path(),
        lambda path: target_model.find([path]),
        compare.Part.read,
        lambda path: evidence.of_folders([path]),
        lambda path: pace.line(path, "resnet18", 1.0),
        lambda path: power.lines(path, None, [], 0.01, "auc", 2),
    ):
        with pytest.raises(UserError, match="no-such-user"):
            of_path(place)


def test_what_is_written_and_read_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    dj.load_encoder("efficientnet_lite0", cut_after="stage1/block1", weights="random").save(
        "~/own.safetensors"
    )
    assert (tmp_path / "own.safetensors").is_file()
    (tmp_path / "study").symlink_to(ROOT / "docs" / "wbc")
    task = dj.read_study("~/study").tasks[0]
    arm = Checkpoint("full", "", registry.build("resnet18"), workdir="~/study", arm="full", arm_seed=0)
    assert checkpoints.downstream(dj.StudySettings(), [arm], [task])
    assert not (tmp_path / "~").exists()


def test_what_is_new_changed_or_gone_here_is_so_there_too(tmp_path, bucket):
    mirror = storage.Mirror("memory://bucket/study", tmp_path)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "checkpoints" / "2" / "state").write_text("two")
    (tmp_path / "results.jsonl").write_text("{}\n")
    (tmp_path / ".results.jsonl.partial").write_text("{")
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp-1").mkdir()
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp-1" / "state").write_text("thr")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "prefix").write_text("activations")
    mirror.push()
    assert there(bucket) == {
        "/bucket/study/checkpoints/2/state": "two",
        "/bucket/study/results.jsonl": "{}\n",
    }
    (tmp_path / "checkpoints" / "4").mkdir()
    (tmp_path / "checkpoints" / "4" / "state").write_text("four")
    (tmp_path / "checkpoints" / "2" / "state").unlink()
    (tmp_path / "results.jsonl").write_text("{}\n{}\n")
    mirror.push()
    assert there(bucket) == {
        "/bucket/study/checkpoints/4/state": "four",
        "/bucket/study/results.jsonl": "{}\n{}\n",
    }


def test_the_older_checkpoint_stays_until_the_newer_one_is_there(tmp_path, bucket, monkeypatch):
    mirror = storage.Mirror("memory://bucket/study", tmp_path)
    (tmp_path / "2").write_text("two")
    mirror.push()
    (tmp_path / "2").unlink()
    (tmp_path / "4").write_text("four")

    def lost(*_, **__):
        raise OSError("connection lost")

    with monkeypatch.context() as patched:
        patched.setattr(type(bucket), "put_file", lost)
        with pytest.raises(OSError, match="connection lost"):
            mirror.push()
    assert there(bucket) == {"/bucket/study/2": "two"}
    mirror.push()
    assert there(bucket) == {"/bucket/study/4": "four"}


def test_what_is_there_counts_and_is_all_that_is_here_afterwards(tmp_path, bucket):
    bucket.pipe_file("/bucket/study/results.jsonl", b"theirs")
    bucket.pipe_file("/bucket/study/checkpoints/a/1", b"one")
    (tmp_path / "results.jsonl").write_text("mine")
    (tmp_path / "stale").write_text("mine")
    storage.Mirror("memory://bucket/study", tmp_path).pull()
    assert {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {
        "results.jsonl": "theirs",
        "1": "one",
    }


def test_nothing_there_leaves_what_is_here(tmp_path, bucket):
    (tmp_path / "results.jsonl").write_text("mine")
    storage.Mirror("memory://bucket/study", tmp_path).pull()
    assert (tmp_path / "results.jsonl").read_text() == "mine"


def test_a_place_that_cannot_be_written_for_a_while_is_a_line_and_then_caught_up_with(
    tmp_path, bucket, monkeypatch
):
    said, failing = [], [True]
    put = type(bucket).put_file

    def sometimes(self, *arguments, **more):
        if failing[0]:
            raise OSError("no route to host")
        return put(self, *arguments, **more)

    monkeypatch.setattr(type(bucket), "put_file", sometimes)
    monkeypatch.setattr(storage, "PUSH_S", 0.01)
    with storage.workdir("memory://bucket/study", "run", said.append) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ledger.jsonl").write_text("{}\n")
        while not said:
            pass
        failing[0] = False
    assert said == [
        "memory://bucket/study: cannot be written now (no route to host); tried again every 0.01 s"
    ]
    assert there(bucket) == {"/bucket/study/ledger.jsonl": "{}\n"}


def test_what_could_not_be_sent_is_one_line_and_sent_by_the_next_start_unless_another_machine_went_on(
    bucket, monkeypatch
):
    place, said = "memory://bucket/study", []

    def lost(*_, **__):
        raise OSError("no route to host")

    def end(rows, patched):
        with storage.workdir(place, "run", said.append) as folder:
            (folder / "results.jsonl").write_text(rows)
            (folder / "old").unlink(missing_ok=True)
            patched.setattr(type(bucket), "pipe_file", lost)

    def ends_unsent(rows):
        told = r"no route to host.* and the same command sends them"
        with monkeypatch.context() as patched, pytest.raises(UserError, match=told):
            end(rows, patched)

    with storage.workdir(place, "run", said.append) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "old").write_text("old")
        (folder / "results.jsonl").write_text("1\n")
    ends_unsent("1\n2\n")
    assert there(bucket)["/bucket/study/results.jsonl"] == "1\n"
    with storage.workdir(place, "run", said.append) as folder:
        assert (folder / "results.jsonl").read_text() == "1\n2\n"
        assert not (folder / "old").exists()
    assert there(bucket) == {"/bucket/study/results.jsonl": "1\n2\n"}
    assert said == [f"{place}: what could not be sent before is sent now"]
    ends_unsent("1\n2\n3\n")
    bucket.pipe_file("/bucket/study/results.jsonl", b"another machine\n")
    with storage.workdir(place, "run", said.append) as folder:
        assert (folder / "results.jsonl").read_text() == "another machine\n"
    assert there(bucket) == {"/bucket/study/results.jsonl": "another machine\n"}


def test_a_study_runs_with_its_workdir_and_its_data_in_a_bucket(tmp_path, bucket, capsys):
    rng = np.random.default_rng(0)
    lines = ["image,label,patient,source"]
    for number in range(72):
        source, label = ("corpus", "development", "external")[number % 3], ("a", "b")[number // 3 % 2]
        image = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        image[..., 0] //= 1 + (label == "a")
        Image.fromarray(image).save(tmp_path / "image.png")
        bucket.put_file(str(tmp_path / "image.png"), f"/bucket/data/images/{number}.png")
        lines.append(f"images/{number}.png,{label},p{number},{source}")
    bucket.pipe_file("/bucket/data/manifest.csv", "\n".join(lines).encode())
    config, place = write_config(tmp_path, 'config.strategies = ("none",)'), "memory://bucket/study"
    flags = (f"--config={config}", "--config.data_dir=memory://bucket/data", f"--workdir={place}")
    assert run(*flags) == 0, capsys.readouterr().err
    assert "copying 73 of 73 files" in capsys.readouterr().out
    names = set(there(bucket))
    assert {"/bucket/study/results.jsonl", "/bucket/study/report.html", "/bucket/study/config.json"} <= names
    before = there(bucket)["/bucket/study/results.jsonl"]
    assert run("--config.mode=status", f"--workdir={place}") == 0
    assert "1 done, 0 begun, 0 left" in capsys.readouterr().out
    storage.data.cache_clear()
    assert run(*flags) == 0  # nothing is left to do, and nothing to copy
    assert "copying" not in capsys.readouterr().out
    assert there(bucket)["/bucket/study/results.jsonl"] == before


def test_data_that_have_changed_in_a_bucket_are_copied_again_and_what_was_removed_is_gone(
    bucket, monkeypatch, capsys
):
    def content():
        storage.data.cache_clear()
        folder = Path(storage.data("memory://bucket/labels"))
        said = capsys.readouterr().out
        return {path.name: path.read_text() for path in folder.iterdir()}, said

    bucket.pipe_file("/bucket/labels/manifest.csv", b"image,label\na.png,0\n")
    bucket.pipe_file("/bucket/labels/a.png", b"a")
    bucket.pipe_file("/bucket/labels/b.png", b"b")
    first, _ = content()
    assert content() == (first, "")
    bucket.pipe_file("/bucket/labels/manifest.csv", b"image,label\na.png,1\n")  # as long as before
    bucket.rm_file("/bucket/labels/b.png")
    second, said = content()
    assert second == {"manifest.csv": "image,label\na.png,1\n", "a.png": "a"}
    assert "copying 1 of 2 files" in said
    # A copy that is interrupted goes on, and is not begun again.
    bucket.pipe_file("/bucket/labels/c.png", b"c")
    bucket.pipe_file("/bucket/labels/d.png", b"d")
    get = type(bucket).get_file

    def lost(self, place, *arguments, **more):
        if place.endswith("d.png"):
            raise OSError("connection lost")
        return get(self, place, *arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(type(bucket), "get_file", lost)
        with pytest.raises(UserError, match="connection lost"):
            content()
    capsys.readouterr()
    third, said = content()
    assert third == {**second, "c.png": "c", "d.png": "d"}
    assert "copying 1 of 4 files" in said


def test_a_place_of_an_unknown_kind_or_without_its_package_is_one_line(tmp_path, capsys, monkeypatch):
    assert run(*small(), "--workdir=gopher://bucket/study") == 2
    assert "gopher" in capsys.readouterr().err

    def missing(url):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(storage.fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"gs://bucket/study needs .* pip install 'dapt_jax\[gcs\]'"):
        storage.Mirror("gs://bucket/study", tmp_path)


def test_data_that_are_not_there_are_one_line(bucket):
    with pytest.raises(UserError, match="nothing is there; expected a folder with the manifest"):
        storage.data("memory://bucket/nowhere")


ARMS = ("a", "b")


def life(folder, clock):
    """Yields after each file that a study of two arms writes or removes, in the order in which it does so.

    Where a clock is given, each file has been written when it says.
    """

    def put(name, text):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text)
        if clock:
            os.utime(partial, ns=(time := clock(), time))
        partial.replace(path)

    def append(name, text):
        put(name, ((folder / name).read_text() if (folder / name).exists() else "") + text + "\n")

    yield put("config.json", "{}")
    for arm in ARMS:
        home = f"checkpoints/{arm}"
        yield put(f"{home}/state/2", "two")
        yield append("ledger.jsonl", f"{arm}/first phase")
        yield put(f"{home}/state/4", "four")
        yield (folder / home / "state/2").unlink()
        yield append("ledger.jsonl", f"{arm}/last phase")
        yield put(f"{home}/adapted.json", "{}")
        yield put(f"{home}/adapted.safetensors", arm)
        yield (folder / home / "state/4").unlink()
        yield append("ledger.jsonl", f"{arm}/transfer")
        yield put(f"predictions/{arm}", arm)
        yield append("results.jsonl", arm)
    yield put("report.html", "report")


def assert_resumable(files, begun):
    """What a start finds in a bucket: nothing is finished without what it stands for, and nothing is lost."""
    text = {path.removeprefix("/bucket/study/"): content for path, content in there(files).items()}
    assert not text or "config.json" in text
    ledger = text.get("ledger.jsonl", "").split("\n")
    for arm in ARMS:
        finished = f"checkpoints/{arm}/adapted.safetensors" in text
        if arm in text.get("results.jsonl", "").split("\n"):
            assert finished
            assert f"predictions/{arm}" in text
            assert f"{arm}/transfer" in ledger
        if finished:
            assert f"checkpoints/{arm}/adapted.json" in text
            assert f"{arm}/last phase" in ledger
        states = [name for name in text if name.startswith(f"checkpoints/{arm}/state/")]
        if f"checkpoints/{arm}/state/4" in states:
            assert f"{arm}/first phase" in ledger
        if states:
            begun.add(arm)
        assert finished or states or arm not in begun
    if "report.html" in text:
        assert text["results.jsonl"].split() == list(ARMS)


class Killed(BaseException):
    """The end of the process."""


@pytest.mark.parametrize("seed", [*range(30), 132, 158, 222])
def test_killed_between_any_two_files_of_a_push_a_bucket_holds_a_study_to_resume(seed):
    """The study goes on writing while files are listed and sent, by a clock that may be set at any time."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patched:
        folder, begun = Path(name), set()
        draw = random.Random(seed)
        steps = life(folder, (lambda: draw.randrange(10**18)) if seed % 2 else None)
        mirror = storage.Mirror("memory://bucket/study", folder)
        left = draw.randrange(60)  # uploads until the kill

        def go_on():
            for _ in range(draw.choice((0, 0, 1, 1, 2, 5))):
                next(steps, None)

        def during(function):
            def called(*arguments, **more):
                nonlocal left
                go_on()
                if function.__name__ != "_files_of":
                    assert_resumable(files, begun)
                    left -= 1
                    if left < 0:
                        raise Killed
                return function(*arguments, **more)

            return called

        for method in ("put_file", "pipe_file", "rm_file"):
            original = getattr(type(files), method)
            original = functools.wraps(original)(functools.partial(original, files))
            patched.setattr(files, method, during(original))
        patched.setattr(storage, "_files_of", during(storage._files_of))
        with contextlib.suppress(Killed):
            for _ in range(12):
                go_on()
                mirror.push()
        assert_resumable(files, begun)
        left = 1000
        for _ in steps:
            pass
        mirror.push()
        assert_resumable(files, begun)
        sent = {path.removeprefix("/bucket/study/") for path in there(files)}
        assert sent == {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    files.store.clear()
