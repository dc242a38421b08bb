"""MedMNIST v2 and MedMNIST+: all two-dimensional sets, from their .npz files, 28 to 224 pixels."""

import functools
import inspect
import io
import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any

import numpy as np

from dapt_jax.data import limits
from dapt_jax.data.dataset import Dataset, with_classes
from dapt_jax.data.decode import ImageStore
from dapt_jax.data.framing import Framing
from dapt_jax.data.sets.registry import CLASSIFICATION, SETS, Entry
from dapt_jax.errors import UserError, nearest
from dapt_jax.runtime import safe_paths

SPLITS = ("train", "val", "test")
SIZES = (28, 64, 128, 224)
_HEADER_BYTES = 1 << 16
_CHUNK = 512


@dataclass(frozen=True)
class _Set:
    """One of the sets, as described in medmnist.json of medmnist 3.0.2."""

    title: str
    kind: str
    licence: str
    counts: list[int]
    classes: list[str]
    md5: dict[str, str]

    @property
    def multi_label(self) -> bool:
        return self.kind == "multi-label"


_FACTS = json.loads(
    resources.files("dapt_jax").joinpath("data/sets/medmnist.json").read_text(encoding="utf-8")
)
MEDMNIST = {flag: _Set(**facts) for flag, facts in _FACTS.items()}


def load_medmnist(
    path: str | Path,
    *,
    flag: str,
    image_size: int,
    pixels: int = 28,
    where: str = "",
    classes: Sequence[str] = (),
    drop_classes: Sequence[str] = (),
    crop: int | None = None,
    name: str = "",
) -> Dataset:
    """Read one .npz file; images are held in memory at `image_size`.

    The images in their original size are never all in memory at once.

    Args:
        path: The file, or the folder that contains it under its published name.
        flag: The set, such as "pathmnist".
        image_size: Side of the images in pixels.
        pixels: Side of the images in the file to look for in a folder: 28, 64, 128 or 224.
        where: Condition that selects images, such as "split=train", see `Dataset.where`.
        classes: The classes in the wanted order, with the dropped ones all that images have; by default those of the
            set.
        drop_classes: Classes whose images (in a multi-label set, whose labels) are left out.
        crop: Side in pixels of a centre crop before resizing, see `dapt_jax.data.decode.decode`.
        name: Name of the data set; by default the flag.

    Returns:
        The data set; the split is in `columns["split"]`. ChestMNIST is multi-label, RetinaMNIST ordinal.
        Patients are not identified: each image is its own group.

    Raises:
        UserError: The file does not exist or contains pickled objects, an array is missing or has the wrong
            shape, or the set does not have a label.
    """
    known = MEDMNIST[flag]
    file = Path(path)
    if file.is_dir():
        if pixels not in SIZES:
            raise UserError(f"pixels={pixels}; expected one of {', '.join(map(str, SIZES))}")
        wanted = f"{flag}.npz" if pixels == 28 else f"{flag}_{pixels}.npz"
        there = sorted(other.name for other in file.glob("*.npz"))
        if wanted not in there:
            hint = nearest(wanted, there) if there else "it holds no .npz file"
            raise UserError(f"{file}: no {wanted}; {hint}")
        file = file / wanted
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected {flag}.npz or a folder that holds it")
    with limits.border(file, "a whole .npz file"), zipfile.ZipFile(file) as archive:
        _check_names(archive, file)
        labels = [_labels(archive, file, split, known) for split in SPLITS]
        for split, found in zip(SPLITS, labels, strict=True):
            _check_images(archive, file, split, len(found))
        shape = (sum(map(len, labels)), image_size, image_size, 3)
        what = f"{shape[0]:,} images of {image_size} x {image_size} pixels"
        limits.check_memory(file, math.prod(shape), what, "fewer images, or a smaller model.image_size")
        images = np.empty(shape, np.uint8)
        start = 0
        for split, found in zip(SPLITS, labels, strict=True):
            _read_images(archive, file, split, images[start : start + len(found)], crop)
            start += len(found)
    splits = np.repeat(SPLITS, [len(found) for found in labels])
    title = name or flag
    names = [f"{title}/{split}/{row:06d}" for row, split in enumerate(splits)]
    dataset = Dataset(
        name=title,
        images=ImageStore.from_arrays(images, image_size, names),
        labels=np.concatenate(labels),
        classes=tuple(known.classes),
        groups=np.array(names, dtype=str),
        columns={"split": splits},
        ordinal=known.kind == "ordinal",
    ).where(where)
    return with_classes(dataset, classes, drop_classes, str(file))


def _check_names(archive: zipfile.ZipFile, file: Path) -> None:
    """Refuse member names that would leave a folder when unpacked.

    Nothing is unpacked here, but only malicious files have such names.
    """
    for member in archive.namelist():
        safe_paths.check(member.removesuffix("/"), file)


@contextmanager
def _opened(
    archive: zipfile.ZipFile, file: Path, key: str
) -> Iterator[tuple[Any, tuple[int, ...], np.dtype]]:
    """Yield an array of the archive, opened at its first value, with its shape and dtype.

    Pickled objects are never loaded.
    """
    held = [member.removesuffix(".npy") for member in archive.namelist()]
    if key not in held:
        raise UserError(f"{file}: no array {key!r}; {nearest(key, held)}")
    with archive.open(f"{key}.npy") as stream:
        shape, columns_first, dtype = _header(stream)
        if any(side < 0 for side in shape):
            raise UserError(f"{file}: {key} has the shape {list(shape)}; expected sides of 0 or more")
        if dtype.hasobject:
            raise UserError(
                f"{file}: {key} holds pickled objects, which can run code; expected an array of numbers"
            )
        if columns_first:
            raise UserError(
                f"{file}: {key} is stored columns first; save it again with numpy.ascontiguousarray"
            )
        yield stream, shape, dtype


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read a .npy header; NumPy would read as many bytes as the header claims to have."""
    version = np.lib.format.read_magic(stream)
    length = stream.read(2 if version == (1, 0) else 4)
    if (size := int.from_bytes(length, "little")) > _HEADER_BYTES:
        raise ValueError(f"a header of {size:,} bytes")
    header = io.BytesIO(length + stream.read(size))
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(header)
    return np.lib.format.read_array_header_2_0(header)


def _read(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    wanted = int(np.prod(shape)) * dtype.itemsize
    read = stream.read(wanted)
    if len(read) < wanted:
        raise EOFError("an array ends early")
    return np.frombuffer(read, dtype).reshape(shape)


def _labels(archive: zipfile.ZipFile, file: Path, split: str, known: _Set) -> np.ndarray:
    """Return int64 [n], or float32 [n, classes] for a multi-label set."""
    key, width = f"{split}_labels", len(known.classes) if known.multi_label else 1
    with _opened(archive, file, key) as (stream, shape, dtype):
        if len(shape) != 2 or shape[1] != width or dtype.kind not in "ui":
            raise UserError(f"{file}: {key} is {dtype} {list(shape)}, expected whole numbers [n, {width}]")
        limits.check(file, int(np.prod(shape, dtype=object)) * (dtype.itemsize + 8), f"{key} {list(shape)}")
        labels = _read(stream, shape, dtype)
    highest = 1 if known.multi_label else len(known.classes) - 1
    if wrong := np.argwhere((labels < 0) | (labels > highest)).tolist():
        row, column = wrong[0]
        raise UserError(f"{file}: {key}[{row}] is {labels[row, column]}, expected 0 to {highest}")
    return labels.astype(np.float32) if known.multi_label else labels[:, 0].astype(np.int64)


def _check_images(archive: zipfile.ZipFile, file: Path, split: str, count: int) -> None:
    """Refuse, from the header alone, images whose type or number does not match the labels."""
    key = f"{split}_images"
    with _opened(archive, file, key) as (_, shape, dtype):
        grey = len(shape) == 3
        if dtype != np.uint8 or not (grey or (len(shape) == 4 and shape[3] == 3)) or shape[0] != count:
            raise UserError(
                f"{file}: {key} is {dtype} {list(shape)}, expected uint8 [{count}, h, w] or [{count}, h, "
                f"w, 3], as many as {split}_labels"
            )
        if 0 in shape[1:]:
            raise UserError(f"{file}: {key} {list(shape)} has no pixels; expected images")
        limits.check(file, 4 * _CHUNK * int(np.prod(shape[1:], dtype=object)), f"{key} {list(shape)}")


def _read_images(
    archive: zipfile.ZipFile, file: Path, split: str, into: np.ndarray, crop: int | None
) -> None:
    """Fill uint8 [n, size, size, 3]."""
    count, size = len(into), into.shape[1]
    with _opened(archive, file, f"{split}_images") as (stream, shape, dtype):
        grey = len(shape) == 3
        for start in range(0, count, _CHUNK):
            part = _read(stream, (min(_CHUNK, count - start), *shape[1:]), dtype)
            rgb = np.repeat(part[..., None], 3, axis=3) if grey else part
            into[start : start + len(part)] = Framing(size, crop).images(rgb)


def _register(flag: str, known: _Set) -> None:
    load = functools.partial(load_medmnist, flag=flag)
    options = inspect.signature(load).parameters.values()
    load.__signature__ = inspect.Signature([o for o in options if o.name != "flag"])  # type: ignore[attr-defined]
    SETS[flag] = Entry(
        kind=flag,
        title=known.title,
        recipe=f"{flag}.npz, or {flag}_64.npz, _128, _224, of zenodo.org/records/10519652",
        licence=known.licence,
        size=f"{sum(known.counts):,} images of 28 to 224 pixels, {len(known.classes)} classes, {known.kind}",
        splits="official, in the file: " + " / ".join(f"{count:,}" for count in known.counts),
        tasks=(CLASSIFICATION,),
        load=load,
        options={"pixels": SIZES[0]},
        checksum="MD5 of the file: " + ", ".join(f"{size} px {md5}" for size, md5 in known.md5.items()),
        official={split: f"split={split}" for split in SPLITS},
        classes=tuple(known.classes),
        multi_label=known.multi_label,
    )


for _flag, _known in MEDMNIST.items():
    _register(_flag, _known)
