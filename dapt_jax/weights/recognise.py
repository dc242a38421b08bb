"""Identification of published weights in a file, and hence of the normalisation that they expect.

Sources, in this order: the record in a file of ours; the zoo entry of the name or URL; the entry with the
checksum of the file; its file name; the files beside it, in a folder of the Hugging Face hub; array names
that only one library uses. If none of these identifies the weights, nothing is guessed: the default of the
architecture is used, and reports say so.
"""

import functools
import json
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dapt_jax.errors import UserError
from dapt_jax.models.preprocess import IMAGENET, Preprocess
from dapt_jax.weights import identity, normalisation, readers, zoo
from dapt_jax.weights.export import MODEL
from dapt_jax.weights.source import Weights


class Expected(NamedTuple):
    """Normalisation that weights expect.

    Attributes:
        preprocess: For three channels, or as many as the file defines; None if unknown.
        why: Source of this information, in words.
        is_certain: Whether the name or the URL is sufficient, so that the file does not have to be read.
        model: Architecture of the weights, as the file records it or its zoo entry says; empty if unknown.
    """

    preprocess: Preprocess | None
    why: str
    is_certain: bool = False
    model: str = ""


_NOTHING = Expected(None, "nothing tells what these weights expect: model.preprocess can")
_PUBLISHED = (
    (r"radimagenet", normalisation.NAMED["half"], "RadImageNet"),
    (
        r"(^|/|-)densenet121-d121-tw-lr001|resnet50-test512-e400",
        normalisation.TORCHXRAYVISION,
        "TorchXRayVision",
    ),
    (r"(^|/)resnet50-[124]x\.", normalisation.UNIT, "SimCLR, converted"),
    (r"(^|/)r(50|101|152)_[123]x_sk[01]", normalisation.UNIT, "SimCLR-v2, converted"),
    (r"/vit_\w+\.(dino|mae)/", IMAGENET, "timm"),
    (r"(^|/)dino_(vit|deit|resnet50)|(^|/)dinov2_vit", IMAGENET, "DINO"),
    (r"(^|/)mae_(pretrain|finetuned)_vit", IMAGENET, "MAE"),
    (r"(^|/)deit3?_(tiny|small|base|large)(_distilled)?_(patch|\d)", IMAGENET, "DeiT"),
    (r"(^|/)vit-[sbl]-300ep", IMAGENET, "MoCo v3"),
    (
        r"(^|/)resnet50_advanced_pretraining_checkpoint_epoch_\d+",
        normalisation.UNIT,
        "arXiv 2410.18677, residual branches to be scaled by 1 - their stochastic depth",
    ),
    (r"_(simple|advanced)_pretraining_checkpoint_epoch_\d+", normalisation.UNIT, "arXiv 2410.18677"),
)
"""Expected normalisation by the publisher's file name, with the folder or repository before it."""
_LIBRARIES = {
    ("op_threshs",): Expected(normalisation.TORCHXRAYVISION, "TorchXRayVision, by its names"),
    ("conv_proj.weight", "encoder.layers.encoder_layer_0.ln_1.weight"): Expected(
        IMAGENET, "torchvision, by its names"
    ),
    ("net.0.0.weight", "net.1.blocks.0.net.0.weight"): Expected(
        normalisation.UNIT, "SimCLR-v2, by its names"
    ),
}
"""Expected normalisation by array names that only one library uses."""
_PLAIN = (
    "model.safetensors",
    "pytorch_model.bin",
    "checkpoint.pth",
    "model.pth",
    "weights",
    "resnet50.pth",
    "resnet50.pt",
)
"""File names that carry no information."""


def expected(spec: str, path: Path | None = None) -> Expected:
    """Return the normalisation expected by the weights that a config names.

    Args:
        spec: Weights as in the config, without a `#` and the part after it.
        path: The file, if it is available locally.

    Raises:
        UserError: The file is damaged.
    """
    if zoo.is_name(spec):
        return _entry(spec)._replace(is_certain=True)
    if path is not None and (found := _remembered(path)):
        return found
    if "://" in spec and (name := _addresses().get(_canonical(spec))):
        return _entry(name)._replace(is_certain=True)
    if path is not None and (name := _by_checksum(path)):
        return _entry(name)
    if found := _by_name(spec, path):
        return found
    if path is not None and (found := _from_content(path)):
        return found
    return _NOTHING


def _entry(name: str) -> Expected:
    entry = zoo.entry(name)
    return Expected(entry.preprocess, name, model=entry.model)


# ---- the file itself
# ------------------------------------------------------------------------------------------------


def _remembered(path: Path) -> Expected | None:
    metadata = _keys(path).metadata
    found = normalisation.from_metadata(metadata, str(path))
    return Expected(found, "as the file remembers", model=metadata.get(MODEL, "")) if found else None


def _by_checksum(path: Path) -> str | None:
    if path.is_dir():
        return None
    digest = identity.digest(path)
    return next((name for digits, name in _checksums().items() if digest.startswith(digits)), None)


def _from_content(path: Path) -> Expected | None:
    """Return the normalisation of the files beside the weights, or by array names.

    The former applies to a folder that is one model, the latter to names that only one library uses.
    """
    if path.is_dir() or path.name.endswith(".index.json"):
        folder = path if path.is_dir() else path.parent
        if found := _sidecar(folder):
            return found
    keys = _keys(path).marks
    return next((found for marks, found in _LIBRARIES.items() if keys.issuperset(marks)), None)


def _sidecar(folder: Path) -> Expected | None:
    """Return the normalisation in timm's `config.json` or in transformers' `preprocessor_config.json`."""
    for name, mean, std in (
        ("config.json", "mean", "std"),
        ("preprocessor_config.json", "image_mean", "image_std"),
    ):
        found = _json(folder / name)
        values = found.get("pretrained_cfg") if name == "config.json" else found
        if isinstance(values, dict) and mean in values and std in values:
            try:
                parsed = _of_processor(values, values[mean], values[std])
            except (UserError, TypeError, ValueError, ArithmeticError):
                continue
            return Expected(parsed, f"{name} beside it")
    return None


def _of_processor(values: Mapping[str, Any], mean: Any, std: Any) -> Preprocess | None:
    """Return the normalisation (x factor - mean) / std of x from 0 to 255, as transformers' image processors have it.

    Args:
        values: Settings of the processor: `do_normalize`, `do_rescale` and `rescale_factor`, if there are any.
        mean: Means of the channels.
        std: Their standard deviations.
    """
    means, deviations = ([float(f"{float(each):.10g}") for each in numbers] for numbers in (mean, std))
    if values.get("do_normalize") is False:
        means, deviations = [0.0] * len(means), [1.0] * len(means)
    factor = values.get("rescale_factor") if values.get("do_rescale") is not False else None
    # Without a factor, numbers up to 1 are of values from 0 to 1.
    side = 255.0 if max(map(abs, means + deviations)) <= 1 else 1.0
    scale = round(1 / float(factor), 6) if factor else side
    numbers = {
        "mean": [scale * each for each in means],
        "std": [scale * each for each in deviations],
        "bgr": False,
    }
    return normalisation.from_metadata({normalisation.KEY: json.dumps(numbers)}, "")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes()) if path.is_file() and path.stat().st_size < 1 << 20 else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class _Keys(NamedTuple):
    """Names of `_LIBRARIES` in a file, after any prefix, and the file's metadata."""

    marks: frozenset[str]
    metadata: dict[str, str]


def _keys(path: Path) -> _Keys:
    about = path.stat()
    return _read(path, (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino))


@functools.lru_cache(maxsize=64)
def _read(path: Path, about: tuple[int, ...]) -> _Keys:
    weights: Weights = readers.read(path)
    marks = {mark for each in _LIBRARIES for mark in each}
    found = {mark for mark in marks for key in weights if key == mark or key.endswith(f".{mark}")}
    return _Keys(frozenset(found), weights.metadata)


# ---- names and addresses
# --------------------------------------------------------------------------------------------


def _by_name(spec: str, path: Path | None) -> Expected | None:
    address = spec.partition("?")[0]
    file = urllib.parse.unquote(address).rstrip("/").rpartition("/")[2]
    if file.lower() not in _PLAIN and (name := _files().get(file)):
        # A name is not certain enough to tell the architecture: another may have been trained from this one.
        return Expected(zoo.entry(name).preprocess, f"{name}, by its file name")
    place = urllib.parse.unquote(address).lower()
    if path is not None and "://" not in spec:
        place = f"{path.resolve().parent.name}/{path.name}".lower()
    for pattern, preprocess, publisher in _PUBLISHED:
        if re.search(pattern, place):
            return Expected(preprocess, f"{publisher}, by its file name")
    return None


@functools.cache
def _checksums() -> dict[str, str]:
    return {entry.sha256: name for name in reversed(zoo.names()) if (entry := zoo.entry(name)).sha256}


@functools.cache
def _addresses() -> dict[str, str]:
    found = {_canonical(zoo.entry(name).url): name for name in reversed(zoo.names()) if zoo.entry(name).url}
    # timm also serves all its weights from the hub, in repositories with the names of its models.
    tags = [name for name in zoo.names() if name.startswith("timm:")]
    hub = ("model.safetensors", "pytorch_model.bin")
    return found | {f"hf://timm/{name.removeprefix('timm:')}/{file}": name for name in tags for file in hub}


@functools.cache
def _files() -> dict[str, str]:
    """Return zoo entries by file name, without names whose entries differ in normalisation."""
    found: dict[str, str] = {}
    for name in zoo.names():
        entry = zoo.entry(name)
        for file in (urllib.parse.urlsplit(entry.url).path.rpartition("/")[2], entry.file):
            if (other := found.setdefault(file, name)) and zoo.entry(other).preprocess != entry.preprocess:
                found[file] = ""
    return {file: name for file, name in found.items() if file and name}


def _canonical(address: str) -> str:
    """Return the canonical form of a URL: `hf://timm/TAG/FILE` for files of the hub."""
    address = urllib.parse.unquote(address.partition("?")[0]).rstrip("/")
    if found := re.fullmatch(r"https://huggingface\.co/([^/]+)/([^/]+)/(?:resolve|blob)/main/(.+)", address):
        return f"hf://{found[1]}/{found[2]}/{found[3]}"
    return address.removesuffix("@main")
