"""MedMNIST files in their true layout."""

import tracemalloc
import zipfile

import numpy as np
import pytest

from dapt_jax.data import limits
from dapt_jax.data.sets.medmnist import MEDMNIST
from dapt_jax.data.sources import load
from dapt_jax.errors import UserError

COUNTS = {"train": 9, "val": 4, "test": 5}


def arrays(flag: str, side: int = 28) -> dict[str, np.ndarray]:
    """What a file holds: uint8 images, grey [n, h, w] or colour [n, h, w, 3], and uint8 labels [n, 1] or [n, classes]."""
    rng = np.random.default_rng(0)
    known = MEDMNIST[flag]
    colour = flag in ("pathmnist", "dermamnist", "retinamnist", "bloodmnist")
    found = {}
    for split, count in COUNTS.items():
        found[f"{split}_images"] = rng.integers(
            0, 256, (count, side, side, *([3] if colour else [])), dtype=np.uint8
        )
        if known.multi_label:
            found[f"{split}_labels"] = rng.integers(0, 2, (count, len(known.classes)), dtype=np.uint8)
        else:
            found[f"{split}_labels"] = rng.integers(0, len(known.classes), (count, 1), dtype=np.uint8)
    return found


def read(folder, flag, image_size=28, **options):
    return load({"kind": flag, "path": str(folder), **options}, data_dir=None, image_size=image_size)


@pytest.mark.parametrize("flag", MEDMNIST)
def test_every_set_is_read_with_its_labels_and_splits(tmp_path, flag):
    held = arrays(flag)
    np.savez_compressed(tmp_path / f"{flag}.npz", **held)
    data = read(tmp_path, flag)
    assert data.columns["split"].tolist() == [split for split, count in COUNTS.items() for _ in range(count)]
    images = np.concatenate([held[f"{split}_images"] for split in COUNTS])
    labels = np.concatenate([held[f"{split}_labels"] for split in COUNTS])
    expected = images if images.ndim == 4 else np.repeat(images[..., None], 3, axis=3)
    np.testing.assert_array_equal(data.images.batch(range(len(data))), expected)
    np.testing.assert_array_equal(data.labels, labels if data.multi_label else labels[:, 0])
    assert data.multi_label == (flag == "chestmnist")
    assert data.ordinal == (flag == "retinamnist")
    assert len(set(data.groups)) == len(data)
    assert len(read(tmp_path / f"{flag}.npz", flag, where="split=val")) == 4


def test_the_published_counts_and_classes_are_those_of_the_papers():
    """Sizes of 12 two-dimensional sets in Sci Data 10, 41 (2023), with the organ sets as corrected in version 3."""
    assert len(MEDMNIST) == 12
    totals = {flag: sum(known.counts) for flag, known in MEDMNIST.items()}
    assert totals["pathmnist"] == 107_180
    assert totals["chestmnist"] == 112_120
    assert totals["tissuemnist"] == 236_386
    assert {flag: len(known.classes) for flag, known in MEDMNIST.items() if len(known.classes) > 9} == {
        "chestmnist": 14, "organamnist": 11, "organcmnist": 11, "organsmnist": 11,
    }  # fmt: skip


def test_a_folder_holds_a_file_per_size_and_images_are_resized(tmp_path):
    np.savez(tmp_path / "breastmnist_64.npz", **arrays("breastmnist", 64))
    data = read(tmp_path, "breastmnist", image_size=16, pixels=64, drop_classes=["malignant"])
    assert data.images.batch([0]).shape == (1, 16, 16, 3)
    assert data.classes == ("normal, benign",)
    with pytest.raises(UserError, match=r"no breastmnist_128\.npz; did you mean 'breastmnist_64\.npz'\?"):
        read(tmp_path, "breastmnist", pixels=128)
    with pytest.raises(UserError, match="pixels=32; expected one of 28, 64, 128, 224"):
        read(tmp_path, "breastmnist", pixels=32)
    with pytest.raises(
        UserError, match=r"label 'malignant' \(\d+ images\) is not in classes; .* drop_classes"
    ):
        read(tmp_path, "breastmnist", pixels=64, classes=["normal, benign"])
    with pytest.raises(UserError, match="no class 'benign'"):
        read(tmp_path, "breastmnist", pixels=64, drop_classes=["benign"])


def changed(**new):
    held = arrays("pneumoniamnist")
    for key, value in new.items():
        held.pop(key)
        if value is not None:
            held[key] = value
    return held


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (changed(val_labels=None), r"pneumoniamnist\.npz: no array 'val_labels'; did you mean"),
        (
            changed(train_labels=np.array([[{"run": "me"}]] * 9, object)),
            "train_labels holds pickled objects, which can run code; expected an array of numbers",
        ),
        (
            changed(test_images=np.zeros((5, 28, 28), np.float32)),
            r"test_images is float32 \[5, 28, 28\], expected uint8 \[5, h, w\]",
        ),
        (
            changed(test_images=np.zeros((6, 28, 28), np.uint8)),
            r"test_images is uint8 \[6, 28, 28\], expected uint8 \[5",
        ),
        (
            changed(val_labels=np.zeros((4, 2), np.uint8)),
            r"val_labels is uint8 \[4, 2\], expected whole numbers \[n, 1\]",
        ),
        (
            changed(val_labels=np.array([[0], [1], [2], [0]], np.uint8)),
            r"val_labels\[2\] is 2, expected 0 to 1",
        ),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_array(tmp_path, held, message):
    np.savez(tmp_path / "pneumoniamnist.npz", **held)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, "pneumoniamnist")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../up.npy", "/etc/up.npy", "C:\\up.npy"])
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    path = tmp_path / "pneumoniamnist.npz"
    np.savez(path, **arrays("pneumoniamnist"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"")
    with pytest.raises(
        UserError, match=r"pneumoniamnist\.npz: holds '.*', a name that leads out of its folder"
    ):
        read(path, "pneumoniamnist")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_one_line(tmp_path, kept):
    path = tmp_path / "octmnist.npz"
    np.savez_compressed(path, **arrays("octmnist"))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match=r"octmnist\.npz: cannot be read .*expected a whole \.npz file"):
        read(path, "octmnist")


def npy(shape, version=1, claimed=None):
    """A .npy file's magic and header, without values."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    length = len(text) if claimed is None else claimed
    return b"\x93NUMPY" + bytes([version, 0]) + length.to_bytes(2 if version == 1 else 4, "little") + text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"train_labels": npy((10**6, 1)) + bytes(10**6), "train_images": npy((10**6, 1, 1))},
            r"1,000,009 images of 28 x 28 pixels take 2\.19 GiB, and 1 GiB of memory are free; expected fewer",
        ),
        ({"train_images": npy((9, 0, 28))}, "has no pixels; expected images"),
        ({"train_images": npy((9, -28, -28))}, r"has the shape \[9, -28, -28\]; expected sides of 0 or more"),
        ({"train_labels": npy((9, 1), 2, 1 << 30) + bytes(1 << 20)}, "a header of 1,073,741,824 bytes"),
        ({"train_labels": npy((1 << 28, 1))}, r"takes 2\.25 GiB to read"),
    ],
)  # fmt: skip
def test_a_small_file_does_not_take_the_memory(tmp_path, monkeypatch, changed, said):
    """Deflated, ten million images of one pixel are 40 kB; at 28 pixels a side they take 22 GiB."""
    monkeypatch.setattr(limits.hardware, "free_memory_bytes", lambda: 1 << 30)
    with zipfile.ZipFile(tmp_path / "bloodmnist.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays("bloodmnist").items():
            archive.writestr(f"{name}.npy", changed.get(name, npy(array.shape) + array.tobytes()))
    tracemalloc.start()
    with pytest.raises(UserError, match=said):
        read(tmp_path, "bloodmnist")
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
