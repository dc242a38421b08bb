"""The mode `data` shows every set that can be read, and warns and refuses as the study does."""

import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from PIL import Image

from dapt_jax.data import facts, hdf5_trial, limits
from dapt_jax.data.augment import Augment
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.decode import ImageStore
from dapt_jax.report import data_page
from dapt_jax.report.data_page import SetView, Tile
from dapt_jax.study import look, samples
from tests.command import run, write_config

RANDOM = "config.weights = 'random'"
HEADS = "config.strategies = ('none',)"
SETS = ("corpus", "cells development", "cells external")


@pytest.fixture
def looked(tmp_path, data, capsys):
    """Looks at the sets of a study of a manifest; returns exit code, output, error line and page."""

    def look_at(*more):
        flags = [f"--config={write_config(tmp_path, *more)}", f"--config.data_dir={data.folder}"]
        code = run(*flags, "--config.mode=data", f"--workdir={tmp_path / 'looked'}")
        out, err = capsys.readouterr()
        plan_code = run(*flags, "--config.mode=plan")
        planned_out, planned_err = capsys.readouterr()
        assert (code, err) == (plan_code, planned_err)  # refused by the very line of the study, or neither
        page = (tmp_path / "looked" / "data.html").read_text()
        assert [path.name for path in (tmp_path / "looked").iterdir()] == ["data.html"]
        for line in re.findall("^warning: (.*)", planned_out, re.M):
            assert _squeezed(line.rpartition(": ")[2]) in _squeezed(out)
        return code, out, err, page

    return look_at


def _squeezed(text):
    return re.sub(r"[\s│]+", "", text)


def test_every_set_has_a_table_and_a_contact_sheet_and_nothing_is_trained(looked, data):
    augment = "config.adapt.augment.flip = 'horizontal'"
    code, out, _, page = looked(RANDOM, augment)
    assert code == 0
    for name in SETS:
        assert f"\n{name} " in f"\n{out}"
        assert f"<h2>{name}</h2>" in page
    assert page.count("data:image/jpeg") == 12 * 4  # the corpus beside its augmented views
    assert "adapt.augment: flip=horizontal" in page
    assert "no image and no patient is in two sets" in page
    assert "\\n" not in out  # classes are in lines of their own
    assert len(page) < data_page.MOST_BYTES
    assert "<script" not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_a_refused_set_does_not_hide_the_others(looked, data):
    first = next(row for row, line in enumerate(data.lines, 1) if line.endswith(",corpus"))
    data.spoil(first, b"")
    code, out, err, page = looked(RANDOM)
    assert code == 2
    assert err.startswith("error: corpus: 1 of 36 images")
    assert "1 refused sets are not compared" in out
    assert page.count("data:image/jpeg") == 12 * 2
    assert "Refused:</strong> corpus: 1 of 36 images" in page


def test_leaks_between_sets_are_refused_with_the_sets_shown(looked, data):
    rows = [
        next(row for row, line in enumerate(data.lines, 1) if line.endswith(f",{name}"))
        for name in ("corpus", "external")
    ]
    data.spoil(rows[1], data.image(rows[0]).read_bytes())
    code, _, err, page = looked(RANDOM)
    assert code == 2
    assert "1 image is in both cells external and corpus" in err
    assert page.count("data:image/jpeg") == 12 * 3


def test_impossible_folds_are_refused(looked):
    code, out, err, _ = looked(RANDOM, HEADS, "config.transfer.folds = 40")
    assert code == 2
    assert "expected fewer folds (transfer.folds)" in err
    assert "cells external" in out


def test_an_image_above_the_limit_is_refused_by_the_setting_that_would_do(looked, data, monkeypatch):
    monkeypatch.setattr(limits, "_limit", limits.decoded_bytes())  # and put back
    first = next(row for row, line in enumerate(data.lines, 1) if line.endswith(",external"))
    data.change(first, "mask", "")  # which would be smaller
    data.image(first).unlink()  # the folder holds hard links
    Image.new("L", (1200, 1200)).save(data.image(first))
    assert looked(RANDOM, HEADS)[0] == 0
    code, _, err, _ = looked(RANDOM, HEADS, "config.data.max_image_mb = 1")
    assert code == 2
    assert "an image of 1200 x 1200 pixels takes" in err
    assert "data.max_image_mb" in err


def test_the_process_that_tries_hdf5_files_has_the_limit_of_this_one(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(limits, "set_decoded_bytes", asked.append)
    monkeypatch.setattr(hdf5_trial, "_walk", asked.append)
    lines = f"{3 << 20} {tmp_path}/a b.h5\n{5 << 20} {tmp_path}/c.h5\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    hdf5_trial.serve()
    assert asked == [3 << 20, tmp_path / "a b.h5", 5 << 20, tmp_path / "c.h5"]


def segmented(n=6, size=16):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    masks = np.zeros((n, size, size), np.uint8)
    masks[:, 2:7, 3:9] = 1
    masks[1:, 10:12, 10:14] = 2
    groups = np.array([f"p{row // 2}" for row in range(n)])
    return Dataset(
        "set",
        ImageStore.from_arrays(images, size),
        np.arange(n) % 2,
        ("a", "b"),
        groups,
        masks=masks,
        segments=("background", "cell", "spot"),
    )


def test_a_contact_sheet_shows_the_pixels_and_masks_of_the_first_training_epoch():
    dataset, augment = segmented(), Augment(flip="dihedral", shift=0.1)
    tiles = look._tiles(dataset, augment, 3)
    assert sorted(tile.name for tile in tiles) == sorted(
        name.rpartition("/")[2] for name in dataset.images.names
    )
    rows = np.arange(len(dataset))
    moved = np.asarray(augment(dataset.images.batch(rows), 3, 0, rows)).round()
    drawn = np.asarray(augment.masks(dataset.masks, 3, 0, rows))
    for tile in tiles:
        row = dataset.images.names.index(f"array/{tile.name}")
        np.testing.assert_array_equal(tile.image, dataset.images[row])
        np.testing.assert_array_equal(tile.augmented, moved[row])
        np.testing.assert_array_equal(tile.augmented_regions["spot"], drawn[row] == 2)


def test_the_share_of_each_segment_is_that_of_its_pixels():
    found = facts.of_set(segmented())["masks"].split("\n")
    assert found[0].startswith(f"cell: {30 / 256:.2%} of all pixels, in 6 of 6 images")
    assert found[1].startswith(f"spot: {5 / 6 * 8 / 256:.2%} of all pixels, in 5 of 6 images")


@given(some.lists(some.sampled_from("abc"), min_size=1, max_size=40), some.integers(1, 9))
def test_the_sheet_has_every_class_before_any_twice_as_often(labels, patients):
    classes = tuple(sorted(set(labels)))
    numbers = np.array([classes.index(label) for label in labels])
    store = ImageStore.from_arrays(np.zeros((len(labels), 2, 2, 3), np.uint8), 2)
    groups = np.array([f"p{row % patients}" for row in range(len(labels))])
    rows = samples.sheet_rows(Dataset("set", store, numbers, classes, groups))
    assert len(rows) == len(set(rows.tolist())) == min(samples.TILES, len(labels))
    counts = np.bincount(numbers[rows], minlength=len(classes))
    whole = np.bincount(numbers, minlength=len(classes))
    assert all(count >= min(of_all, counts.max() - 1) for count, of_all in zip(counts, whole, strict=True))


def test_the_page_stays_below_its_limit_whatever_the_images(tmp_path, monkeypatch):
    monkeypatch.setattr(data_page, "MOST_BYTES", 500_000)
    noise = np.random.default_rng(0).integers(0, 256, (192, 192, 3), dtype=np.uint8)
    tiles = [Tile("name", "label", "", noise, augmented=noise)] * samples.TILES
    counts = facts.luminance_counts([noise])
    views = [
        SetView(f"set {number}", tiles=tiles, by_class={"a": counts}, whole=counts) for number in range(2)
    ]
    data_page.write(tmp_path / "data.html", "<&>", views, "none", [], [])
    page = (tmp_path / "data.html").read_text()
    assert len(page) < data_page.MOST_BYTES
    assert "data:image/jpeg" in page
    assert "<title>&lt;&amp;&gt;" in page
