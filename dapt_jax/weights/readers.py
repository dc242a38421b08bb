"""Reads a weight file of any of the usual formats into arrays by name."""

import re
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import safetensors
import safetensors.numpy

from dapt_jax.errors import UserError
from dapt_jax.weights import torch_pickle
from dapt_jax.weights.source import Weights

FORMATS = "PyTorch (.pth, .pt, .tar), .safetensors, .npz, Keras (.h5)"
_HDF5 = b"\x89HDF\r\n\x1a\n"
# The names of Keras 1, as in the ResNet50 file of 2016: res2a_branch2a_W_1:0.
_KERAS1 = {
    "W": "kernel",
    "b": "bias",
    "gamma": "gamma",
    "beta": "beta",
    "running_mean": "moving_mean",
    "running_std": "moving_variance",
}


def read(path: str | Path) -> Weights:
    """Reads a weight file; the format is told by content, since suffixes of checkpoints are anyone's guess.

    Raises:
        UserError: no such file, an unknown format, or a damaged file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weight file")
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(_HDF5):
        return _read_keras(path)
    if zipfile.is_zipfile(path) and not torch_pickle.is_torch(path):
        return _read_npz(path)
    if path.suffix == ".safetensors" or head[8:] == b"{":
        return _read_safetensors(path)
    if torch_pickle.is_torch(path) or path.suffix in (".pth", ".pt", ".tar"):
        return torch_pickle.read(path)
    raise UserError(f"{path}: not a weight file that is known here; expected {FORMATS}")


def _read_safetensors(path: Path) -> Weights:
    try:
        return Weights(safetensors.numpy.load_file(path), str(path))
    except (safetensors.SafetensorError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged or cut short, or not a safetensors file ({error})") from None


def _read_npz(path: Path) -> Weights:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not an .npz of plain arrays ({error})") from None
    strays = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if strays or not arrays:
        raise UserError(f"{path}: a zip file without arrays; expected {FORMATS}")
    return Weights(arrays, str(path))


def _read_keras(path: Path) -> Weights:
    """Reads the layout that Keras calls legacy HDF5: weights only, or under `model_weights` of a whole saved model."""
    try:
        with h5py.File(path, "r") as file:
            root: Any = file.get("model_weights", file)
            if "layer_names" not in root.attrs:
                raise UserError(
                    f"{path}: an HDF5 file without Keras' layer_names (Keras 3's .weights.h5 numbers its layers instead of "
                    "naming them); expected what model.save_weights('weights.h5') of Keras 2, or model.save('model.h5'), writes"
                )
            arrays = {
                _keras_key(layer, weight): np.asarray(root[layer][weight])
                for layer in _strings(root.attrs["layer_names"])
                for weight in _strings(root[layer].attrs["weight_names"])
            }
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: damaged or cut short, or not a Keras weight file ({error})") from None
    return Weights(arrays, str(path))


def _strings(values: Any) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _keras_key(layer: str, weight: str) -> str:
    """`layer/kernel` of a weight's name: `conv1_conv/kernel:0`, `kernel`, `model/conv1_conv/kernel` or `conv1_W_1:0`."""
    name = weight.split(":")[0]
    if "/" in name:
        return "/".join(name.split("/")[-2:])
    if old := re.fullmatch(rf"{re.escape(layer)}_({'|'.join(_KERAS1)})(_\d+)?", name):
        name = _KERAS1[old[1]]
    return f"{layer}/{name}"
