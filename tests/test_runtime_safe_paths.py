"""Names that others chose: no file is written, removed or read outside the folder that they belong to."""

import json
import zipfile

import fsspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dapt_jax.data.paths import Finder
from dapt_jax.errors import UserError
from dapt_jax.records import predictions
from dapt_jax.runtime import safe_paths, storage, user_cache
from dapt_jax.weights import download, sharded

PARTS = st.sampled_from(
    [
        "..",
        ".",
        "",
        "a",
        "b.png",
        "C:",
        "c:x",
        "..\\up",
        "\\\\host",
        "a\0b",
        "\x1b[2J",
        "x\n",
        "~",
        "é",
        "con",
    ]
) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NAMES = st.lists(PARTS, min_size=1, max_size=5).map("/".join)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    storage.data.cache_clear()


def line_of(act, *arguments):
    """The line with which something is refused; empty where it is done."""
    try:
        act(*arguments)
    except UserError as error:
        return str(error)
    return ""


def files_of(folder):
    return {path for path in folder.rglob("*") if not path.is_dir()}


@settings(max_examples=200, deadline=None)
@given(name=NAMES)
@example(name="../up.png")
@example(name="/etc/up.png")
@example(name="a/../../up.png")
@example(name="x" * 256)
@example(name="/".join(["d" * 200] * 30))
def test_a_name_is_refused_in_one_line_or_stays_in_its_folder(name, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    if line := line_of(safe_paths.below, folder, name, "a.zip"):
        assert line.startswith("a.zip: holds ")
        assert "\n" not in line
        assert len(line) < 500
        return
    path = safe_paths.below(folder, name, "a.zip")
    assert path.resolve().is_relative_to(folder.resolve())
    assert path.relative_to(folder).as_posix() == name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@settings(max_examples=60, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=4, unique=True))
@example(names=["../up.png"])
@example(names=["a", "a/b"])
@example(names=["a//b", "a/b"])
@pytest.mark.parametrize("kind", ["zip", "memory"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_pull_writes_below_the_copy_alone(kind, names, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    if kind == "zip":
        with zipfile.ZipFile(root / "data.zip", "w") as archive:
            for name in names:
                if name.partition("\0")[0]:  # zip files have no empty names, and end names at a NUL
                    archive.writestr(name, b"theirs")
        url = f"zip://::{root}/data.zip"
    else:
        store = fsspec.filesystem("memory").store
        store.clear()
        fsspec.filesystem("memory").pipe_file("/bucket/data/whole.png", b"theirs")
        stored = store["/bucket/data/whole.png"]
        store.update({f"/bucket/data/{name}": stored for name in names})
        url = "memory://bucket/data"
    before = files_of(root)
    copy = root / "deep" / "down" / "copy"
    assert "\n" not in line_of(storage.Mirror(url, copy).pull)
    assert all(path.is_relative_to(copy) for path in files_of(root) - before)
    assert not [path for path in files_of(copy) if path.name.endswith(".partial")]


@pytest.mark.parametrize("name", ["../up.png", "/etc/up.png", "a\\..\\up.png", "C:/up.png", "a/../../up.png"])
@pytest.mark.parametrize("use", ["data", "workdir"])
def test_remote_data_and_workdirs_with_such_a_name_are_one_line(use, name, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("manifest.csv", "image,label\n")
        archive.writestr(name, b"theirs")
    url, before = f"zip://::{tmp_path}/a.zip", files_of(tmp_path)
    place = storage.data if use == "data" else lambda url: storage.workdir(url, "status").__enter__()
    with pytest.raises(UserError, match=r"a\.zip: holds .*, a name that leads out of its folder"):
        place(url)
    assert files_of(tmp_path) == before


def test_pull_and_push_follow_no_link_out_of_the_copy(tmp_path):
    outside, copy = tmp_path / "outside", tmp_path / "copy"
    outside.mkdir()
    copy.mkdir()
    (outside / "secret").write_text("mine")
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pipe_file("/bucket/study/linked/secret", b"theirs")
    (copy / "linked").symlink_to(outside)
    mirror = storage.Mirror("memory://bucket/study", copy)
    with pytest.raises(UserError, match="led elsewhere by the link"):
        mirror.pull()
    (copy / "linked").unlink()
    (copy / "secret").symlink_to(outside / "secret")
    with pytest.raises(UserError, match="led elsewhere by the link"):
        mirror.push()
    assert (outside / "secret").read_text() == "mine"
    assert files.find("/bucket") == ["/bucket/study/linked/secret"]


def test_pull_removes_a_link_and_not_what_it_leads_to(tmp_path):
    outside, copy = tmp_path / "outside", tmp_path / "copy"
    for folder in (outside, copy):
        folder.mkdir()
        (folder / "results").write_text("mine")
    (copy / "stale").symlink_to(outside / "results")
    (copy / "folder").symlink_to(outside)
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pipe_file("/bucket/study/results", b"theirs")
    storage.Mirror("memory://bucket/study", copy).pull()
    assert (outside / "results").read_text() == "mine"
    assert (copy / "results").read_text() == "theirs"
    assert not (copy / "stale").exists()


def test_spellings_of_one_file_are_refused_where_the_disk_takes_them_for_one(tmp_path, monkeypatch):
    safe_paths.check_together(["a/IM1", "a/im1"], tmp_path, "a.zip")
    monkeypatch.setattr(safe_paths, "_is_one_file", lambda *_: True)
    with pytest.raises(UserError, match="the same file as 'a/IM1' on this disk"):
        safe_paths.check_together(["a/IM1", "a/im1"], tmp_path, "a.zip")
    assert not list(tmp_path.iterdir())


def test_a_name_of_the_longest_length_is_pulled(tmp_path):
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pipe_file(f"/bucket/data/{'n' * 255}", b"theirs")
    storage.Mirror("memory://bucket/data", tmp_path / "copy").pull()
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["n" * 255]


def test_more_than_the_disk_holds_is_one_line_before_anything_is_copied(tmp_path, monkeypatch):
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pipe_file("/bucket/data/a", b"theirs")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: Room)
    with pytest.raises(UserError, match="6 bytes, and 5 are free"):
        storage.Mirror("memory://bucket/data", tmp_path / "copy").pull()
    assert not files_of(tmp_path)


class Room:
    free = 5


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06", b"no zip at all"])
def test_a_damaged_archive_is_one_line(tmp_path, content):
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.zip: cannot be opened"):
        storage.data(f"zip://::{tmp_path}/a.zip")


def test_a_copied_manifest_names_no_file_outside_its_copy(tmp_path):
    copy = user_cache.folder(user_cache.DATA) / "bucket-1"
    (copy / "tables").mkdir(parents=True)
    Image.new("L", (4, 4)).save(copy / "1.png")
    Image.new("L", (4, 4)).save(copy.parent / "2.png")
    find = Finder(copy / "tables")
    assert find("../1.png").samefile(copy / "1.png")
    for name in ("../../2.png", "/etc/hosts", "..\\..\\2.png", str(copy.parent / "2.png")):
        with pytest.raises(UserError, match="leads out of its folder"):
            find(name)
    assert Finder(tmp_path)(str(copy.parent / "2.png")).is_file()  # a table of the user's own may


@settings(max_examples=100, deadline=None)
@given(name=NAMES)
def test_no_url_index_or_record_makes_a_path_outside(name, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    assert safe_paths.below(folder, download.file_name(name), "url").parent == folder
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    if line := line_of(sharded.shards, index):
        assert str(folder) in line
    else:
        assert "/" not in sharded.shards(index)["a"]
    if not line_of(predictions.path_of, folder, "full", 0, name, "external"):
        path = predictions.path_of(folder, "full", 0, name, "external")
        assert path.is_relative_to(folder)
        assert ".." not in path.parts
