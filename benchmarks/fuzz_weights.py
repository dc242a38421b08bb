"""The weight formats of `benchmarks.fuzz_readers`: well-formed seeds, written without the frameworks that they belong to.

HDF5 files are read here without the process that the readers try them out in (`weights.keras_hdf5`): one for
each would take hours. Where the HDF5 library hangs or crashes, the file is read once more as users read it,
and counted as *guarded* if that gives one line.
"""

import io
import json
import pickle
import random
import struct
import zipfile
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import safetensors.numpy

from benchmarks.fuzz_damage import damage
from dapt_jax.errors import UserError
from dapt_jax.weights import keras_hdf5, readers
from dapt_jax.weights.source import SPARE
from tests import onnx_files
from tests.torch_files import tensor, write_old, write_zip

SUFFIXES = {
    "torch": ".pth",
    "torch_old": ".pth",
    "safetensors": ".safetensors",
    "npz": ".npz",
    "npz_packed": ".npz",
    "h5": ".h5",
    "weights_h5": ".h5",
    "keras": ".keras",
    "haiku": ".pkl",
    "onnx": ".onnx",
}
GUARDED = ("h5", "weights_h5", "keras")
"""Formats that users' files are tried in another process first."""

LIMIT = SPARE
"""Bytes of memory that reading may take beside twice the file."""


def arrays() -> dict[str, np.ndarray]:
    """What every well-formed file holds."""
    rng = np.random.default_rng(0)
    return {
        "conv/kernel": rng.standard_normal((3, 3, 2, 4)).astype(np.float32),
        "norm/gamma": np.ones(4, np.float16),
        "norm/beta": np.zeros(4, ml_dtypes.bfloat16),
        "head/bias": rng.standard_normal(3),
    }


def write_seeds(folder: Path) -> dict[str, bytes]:
    """A well-formed file of every format."""
    flat = {key: a for key, a in arrays().items() if a.dtype != ml_dtypes.bfloat16}
    runs = {str(number): a for number, a in enumerate(flat.values())}
    content = {"epoch": 3, "state_dict": {key: tensor(a, str(n)) for n, (key, a) in enumerate(flat.items())}}
    write_zip(folder / "torch", content, {key: a.tobytes() for key, a in runs.items()})
    write_old(folder / "torch_old", content, runs)
    safetensors.numpy.save_file(arrays(), folder / "safetensors")
    with (folder / "npz").open("wb") as file:
        np.savez(file, **flat)
    with (folder / "npz_packed").open("wb") as file:
        np.savez_compressed(file, **flat)
    _write_legacy(folder / "h5", flat)
    _write_keras3(folder / "weights_h5", flat)
    with zipfile.ZipFile(folder / "keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Functional", "config": {"layers": []}}))
        archive.writestr("model.weights.h5", (folder / "weights_h5").read_bytes())
    nested = {
        "net/~/conv": {"w": flat["conv/kernel"]},
        "net/~/norm": {"scale": np.ones((1, 1, 1, 4), np.float32)},
    }
    (folder / "haiku").write_bytes(pickle.dumps((nested, {"ema": {"average": np.zeros(4)}}), protocol=4))
    (folder / "onnx").write_bytes(onnx_files.model({"onnx::MatMul_1": np.ones((2, 3), np.float32), **flat}))
    return {name: (folder / name).read_bytes() for name in SUFFIXES}


def _write_legacy(path: Path, flat: dict[str, np.ndarray]) -> None:
    with h5py.File(path, "w") as file:
        layers = sorted({key.partition("/")[0] for key in flat})
        file.attrs["layer_names"] = layers
        for layer in layers:
            names = [key for key in flat if key.startswith(layer)]
            file.create_group(layer).attrs["weight_names"] = names
            for name in names:
                file[layer][name] = flat[name]


def _write_keras3(path: Path, flat: dict[str, np.ndarray]) -> None:
    with h5py.File(path, "w") as file:
        variables = file.create_group("layers/conv2d/vars")
        variables.attrs["name"] = "conv"
        variables["0"] = flat["conv/kernel"]
        # A packed array too: filters are code of HDF5 that damaged files reach.
        variables.create_dataset("1", data=np.zeros(512, np.float32), compression="gzip", shuffle=True)


def damaged(name: str, seed: bytes, rng: random.Random) -> bytes:
    """A damaged file; the pickle inside a PyTorch zip is spoilt before it is packed, else its checksum hides it."""
    if name in ("torch", "npz", "keras") and rng.random() < 0.6:
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(seed)) as old, zipfile.ZipFile(buffer, "w") as new:
            names = old.namelist()
            chosen = rng.choice(
                [each for each in names if each.endswith((".pkl", ".npy", ".h5", ".json"))] or names
            )
            for member in names:
                content = old.read(member)
                new.writestr(member, damage(content, rng) if member == chosen else content)
        return buffer.getvalue()
    if (
        name == "safetensors" and rng.random() < 0.5
    ):  # the header's length kept true, so that its text is reached
        (length,) = struct.unpack("<Q", seed[:8])
        header = damage(seed[8 : 8 + length], rng)
        return struct.pack("<Q", len(header)) + header + seed[8 + length :]
    return damage(seed, rng)


def read_all(path: Path) -> str:
    """What the readers make of a file: `read`, `refused`, or what went wrong."""
    try:
        weights = readers.read(path)
        for key in weights:
            weights.like(key)
            weights[key]
    except UserError as error:
        if "\n" in str(error) or len(str(error)) > 1500:
            return f"a line of {len(str(error))} characters: {str(error)[:80]!r}"
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def prepare() -> None:
    """Read HDF5 files in this process alone."""
    keras_hdf5._try_out = lambda path: None
