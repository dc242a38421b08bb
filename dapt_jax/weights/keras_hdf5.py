"""Reading of Keras' weight files: HDF5 of Keras 1 and 2, `.weights.h5` and `.keras` of Keras 3.

Keys have the form `layer/variable`. Keras 1 and 2 (and `.h5` of Keras 3) store both names. Keras 3's
`.weights.h5` names the layers and numbers their variables in order of creation; a `.keras` file is a zip of
that file and the model's config (keras-team/keras, `saving/saving_lib.py`, Apache-2.0).

The HDF5 library itself is not safe: some damaged files cause infinite loops or crashes
(`benchmarks/fuzz_readers.py` finds such files). A separate process with a time limit therefore reads each
file completely first; only files that pass are read.
"""

import functools
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dapt_jax.data import hdf5
from dapt_jax.errors import EXIT_CODE, UserError
from dapt_jax.weights.archive import Archive
from dapt_jax.weights.source import SPARE, Stored, Weights, check_unpacked

MAGIC = b"\x89HDF\r\n\x1a\n"
_INSIDE = "model.weights.h5"
_CONFIG_BYTES = 16 << 20
# Names in Keras 1, as in the ResNet50 file of 2016: res2a_branch2a_W_1:0.
_KERAS1 = {
    "W": "kernel",
    "b": "bias",
    "gamma": "gamma",
    "beta": "beta",
    "running_mean": "moving_mean",
    "running_std": "moving_variance",
}
# Variables of Keras 3's layers in the order of their numbers, by class and count.
_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
_KERAS3 = {
    **{(kind, n): ("kernel", "bias")[:n] for kind in ("conv2d", "depthwise_conv2d", "dense") for n in (1, 2)},
    ("batch_normalization", 4): _NORM,
    ("batch_normalization", 2): _NORM[2:],
    ("layer_normalization", 2): _NORM[:2],
}
_DEPTH = 32
_SECONDS = 5
_BYTES_PER_SECOND = 20 << 20


def read(path: Path) -> Weights:
    """Read an HDF5 file of any Keras version.

    Raises:
        UserError: The file is damaged or truncated, links to other files, or is not from Keras.
    """
    _try_out(path)
    return read_here(path)


def read_here(path: Path) -> Weights:
    """Read an HDF5 or a `.keras` file without testing it first; reading a damaged file may never end."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            return _read(path, path, {})
    return _read_zip(Archive(path))


def is_keras(archive: Archive) -> bool:
    """Return whether a zip file is the result of Keras 3's `model.save`."""
    return _INSIDE in archive


def read_zip(archive: Archive) -> Weights:
    """Read a `.keras` file.

    Raises:
        UserError: The file is damaged, or the weights in it are not from Keras.
    """
    _try_out(archive.path)
    return _read_zip(archive)


def _try_out(path: Path) -> None:
    """Read a file completely in another process, which may hang or crash; an unchanged file only once.

    Raises:
        UserError: The process hung or crashed; or the file is damaged, or not from Keras.
    """
    about = path.stat()
    _try(path, sys.executable, (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino))


@functools.lru_cache(maxsize=64)
def _try(path: Path, python: str, about: tuple[int, ...]) -> None:
    root = str(Path(__file__).parents[2])
    known = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{known}" if known else root}
    seconds = _SECONDS + path.stat().st_size // _BYTES_PER_SECOND
    command = [python, "-m", __name__, str(path), str(seconds)]
    try:
        # Ten times the CPU limit, for machines without such a limit and for busy machines.
        tried = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10 * seconds)
    except subprocess.TimeoutExpired:
        raise UserError(f"{path}: damaged: the HDF5 library does not come to an end with it") from None
    if tried.returncode == EXIT_CODE:
        raise UserError(tried.stdout.strip())
    if tried.returncode:
        raise UserError(f"{path}: damaged: the HDF5 library fails on it (exit code {tried.returncode})")


def _main(path: Path, seconds: int) -> int:
    """Run the check in the other process."""
    hdf5.limit_process(seconds, 2 * (2 * path.stat().st_size + SPARE))
    try:
        for array in read_here(path).values():
            del array
    except UserError as error:
        print(error)
        return EXIT_CODE
    return 0


def _read_zip(archive: Archive) -> Weights:
    config: Any = {}
    if "config.json" in archive and archive.size("config.json") < _CONFIG_BYTES:
        try:
            config = json.loads(bytes(archive.read("config.json")))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{archive.path}: config.json is not JSON ({error})") from None
    flags = dict(_norms(config, _DEPTH))
    return _read(archive.path, _Bytes(archive.read(_INSIDE)), flags)


class _Bytes(io.RawIOBase):
    """A file over bytes in memory, which HDF5 reads without a full copy."""

    def __init__(self, data: memoryview):
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._data[self._at : self._at + len(buffer)]
        memoryview(buffer)[: len(part)] = part
        self._at += len(part)
        return len(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        self._at = max(0, start + offset)
        return self._at


def _norms(config: object, depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the variables of every batch norm in a model's config."""
    if isinstance(config, dict) and depth:
        settings = config.get("config")
        if config.get("class_name") == "BatchNormalization" and isinstance(settings, dict):
            has = {"beta": settings.get("center", True), "gamma": settings.get("scale", True)}
            yield str(settings.get("name")), tuple(name for name in _NORM if has.get(name, True))
        for value in config.values():
            yield from _norms(value, depth - 1)
    elif isinstance(config, list) and depth:
        for value in config:
            yield from _norms(value, depth - 1)


def _read(path: Path, file: Path | io.RawIOBase, norms: dict[str, tuple[str, ...]]) -> Weights:
    try:
        opened = h5py.File(file, "r")
        root: Any = opened.get("model_weights", opened)
        pairs = (
            _named(root) if _attribute(root, "layer_names") is not None else _numbered(opened, norms, _DEPTH)
        )
        arrays: dict[str, Stored] = {}
        size = 0
        for key, dataset in pairs:
            if key in arrays:
                raise UserError(f"{path}: {key[:80]!r} is there twice")
            arrays[key] = _stored(path, key, dataset)
            size += hdf5.check(dataset, path)
            check_unpacked(size, path, path.stat().st_size)
    except _ERRORS as error:
        raise _damaged(path, error) from None
    if not arrays:
        raise UserError(
            f"{path}: an HDF5 file without named layers (the first .weights.h5 of Keras 3 number them); "
            "expected what model.save('model.keras'), model.save('model.h5') or "
            "model.save_weights('x.weights.h5') writes"
        )
    return Weights(arrays, str(path), path=path)


_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError, OverflowError, MemoryError)
"""Exceptions into which h5py converts the errors of HDF5."""


def _damaged(path: Path, error: Exception) -> UserError:
    told = " ".join(str(error).split())[:160]
    return UserError(f"{path}: damaged or cut short, or not a Keras weight file ({told})")


def _stored(path: Path, key: str, dataset: object) -> Stored:
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "fiub":
        raise UserError(f"{path}: {key[:80]!r} is not an array of numbers")

    def build() -> np.ndarray:
        try:
            return np.asarray(dataset[()])
        except _ERRORS as error:
            raise _damaged(path, error) from None

    return Stored(dataset.shape, dataset.dtype, build)


def _named(root: h5py.Group | h5py.Dataset) -> Iterator[tuple[str, Any]]:
    """Yield the arrays of Keras' legacy HDF5 layout: weights only, or `model_weights` of a saved model."""
    for layer in _attribute(root, "layer_names") or []:
        group = hdf5.follow(root, layer)
        for weight in _attribute(group, "weight_names") or []:
            yield _key(layer, weight), hdf5.follow(group, weight)


def _numbered(group: h5py.Group, norms: dict[str, tuple[str, ...]], depth: int) -> Iterator[tuple[str, Any]]:
    """Yield the arrays of the Keras 3 layout: nested groups, each layer with `vars` and its name."""
    if not depth:
        raise UserError(
            f"{group.file.filename}: groups within groups, {_DEPTH} deep; expected a model's layers"
        )
    for name in group:
        found = hdf5.follow(group, name)
        if not isinstance(found, h5py.Group) or name == "optimizer":
            continue
        if name != "vars":
            yield from _numbered(found, norms, depth - 1)
        elif (layer := found.attrs.get("name")) is not None and len(found):
            kind = re.sub(r"_\d+$", "", group.name.rpartition("/")[2])
            names = norms.get(str(layer)) or _KERAS3.get((kind, len(found)))
            for number in sorted(found, key=lambda each: (len(each), each)):
                position = int(number) if number.isdigit() else len(found)
                known = names and len(names) == len(found) and position < len(names)
                yield (
                    f"{layer}/{names[position] if known and names else f'vars/{number}'}",
                    hdf5.follow(found, number),
                )


def _attribute(group: h5py.Group | h5py.Dataset, name: str) -> list[str] | None:
    """Return a list of names; Keras splits a list of more than 64 kB into `name0`, `name1` and so on."""
    if name in group.attrs:
        return _strings(group.attrs[name])
    if f"{name}0" not in group.attrs:
        return None
    found: list[str] = []
    for number in range(len(group.attrs)):
        if f"{name}{number}" in group.attrs:
            found += _strings(group.attrs[f"{name}{number}"])
    return found


def _strings(values: Iterable[bytes | str]) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _key(layer: str, weight: str) -> str:
    """Return `layer/kernel` for the name of a weight.

    Names have the forms `conv1_conv/kernel:0`, `kernel`, `model/conv1_conv/kernel` or `conv1_W_1:0`.
    """
    name = weight.split(":")[0]
    # In Keras 2, the names of two layers in DenseNet's stem contain a /; Keras 3 has a _ instead.
    name = re.sub(r"(^|/)conv1/(conv|bn)/(\w+)$", r"\1conv1_\2/\3", name)
    if "/" in name:
        return "/".join(name.split("/")[-2:])
    if old := re.fullmatch(rf"{re.escape(layer)}_({'|'.join(_KERAS1)})(_\d+)?", name):
        name = _KERAS1[old[1]]
    return f"{layer}/{name}"


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), int(sys.argv[2])))
