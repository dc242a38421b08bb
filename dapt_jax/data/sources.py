"""Loading of every kind of data: from the description of a set in a config to a `Dataset`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dapt_jax.data import identity
from dapt_jax.data.concatenate import concatenate
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.folders import load_folder
from dapt_jax.data.manifest import load_manifest
from dapt_jax.data.phantoms import load_phantoms
from dapt_jax.data.prepared_tfds import load_tfds
from dapt_jax.data.sets import SETS
from dapt_jax.data.textures import load_textures
from dapt_jax.data.tiles import Tiles
from dapt_jax.data.unlabelled import load_images
from dapt_jax.errors import UserError, nearest
from dapt_jax.runtime import home

KINDS: dict[str, Callable[..., Dataset]] = {
    "manifest": load_manifest,
    "folder": load_folder,
    "images": load_images,
    "phantoms": load_phantoms,
    "textures": load_textures,
    "tfds": load_tfds,
    **{kind: entry.load for kind, entry in SETS.items()},
}
SEGMENTS = "segments"
_OF_ANY: dict[str, Any] = {SEGMENTS: (), "ordinal": False, "merge_look_alikes": True, "cohort": ""}
"""Keys that every kind accepts, whatever its reader, with their defaults."""
_OF_TILES: dict[str, Any] = {
    "tile_size": 0,
    "tile_stride": 0,
    "tile_picture": "",
    "tile_margin": "",
    "tile_min_brightness": 0.0,
}
"""Keys of every kind that reads files, see `Tiles.parse`, with their defaults."""
# Set by the study for all of its data, not in the description of one set.
_SHARED = ("on_bad_image", "cache_bytes", "workers", "tiles", "reads_labels")


def load(
    spec: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    data_dir: str | Path | None,
    image_size: int,
    on_bad_image: str = "error",
    labels: bool = True,
    **shared: Any,
) -> Dataset:
    """Read the set that a config describes.

    Args:
        spec: `kind` ("manifest", "folder", "images", "phantoms", "textures", "tfds", or a public set of
            `SETS`, such as "chexpert") and the arguments of that reader, such as `{"kind": "manifest", "path":
            "wbc/manifest.csv", "where": "source=dataset1", "classes": ("monocyte",)}`. None, "" and () stand
            for the reader's default; several names in one string are separated by commas. For any kind with
            masks, `segments=("background", "nucleus")` names their values and makes the set a segmentation
            set; values with the same name become one segment. `ordinal=True` means that the classes are
            ordered grades: numbers, or names in the order given by `classes`. `merge_look_alikes=False` lets
            splits divide near-duplicate images. `cohort="hospital A"` identifies the cohort in which patient
            names are unique: sets of two cohorts share no patient, even if names coincide. Sets of files can be
            cut into tiles, which become the images of the set: see `dapt_jax.data.tiles.Tiles.parse`. The readers are
            `load_manifest`, `load_folder`, `load_images`, `load_phantoms`, `load_textures` and `load_tfds`.
            Several descriptions are one set, see `dapt_jax.data.concatenate`.
        data_dir: Folder that `path` is relative to; not needed for absolute paths and for phantoms.
        image_size: Side of the images in pixels, unless `spec` defines another (for large images, which a
            network processes in windows).
        on_bad_image: "error" or "skip"; for readers of image files.
        labels: Whether labels are read. Without, a folder needs no class folders, a manifest no label column
            and a TFDS set no label, unless `spec` selects images by class or split.
        **shared: Other arguments for every reader that accepts them: `cache_bytes`, `workers`, `seed`.

    Raises:
        UserError: The kind or a key is unknown, the path or data_dir is missing, or the reader finds an
            error.
    """
    if not isinstance(spec, Mapping):
        options = {"data_dir": data_dir, "image_size": image_size, "on_bad_image": on_bad_image, **shared}
        options["labels"] = labels
        return concatenate([load(each, **options) for each in spec])
    kind = str(spec.get("kind", ""))
    if kind not in KINDS:
        raise UserError(f"no kind {kind!r}; {nearest(kind, KINDS)}")
    if not labels:
        selects = any(spec.get(key) for key in ("classes", "drop_classes", "where"))
        read = load(
            spec if selects else _unlabelled(spec),
            data_dir=data_dir,
            image_size=image_size,
            on_bad_image=on_bad_image,
            reads_labels=selects,
            **shared,
        )
        return read.without_labels()
    reader = KINDS[kind]
    known = inspect.signature(reader).parameters
    of_any = _OF_ANY | (_OF_TILES if "tiles" in known else {})
    keys = [key for key in known if key not in _SHARED]
    for key in spec:
        if key not in ("kind", *of_any) and key not in keys:
            raise UserError(f"kind {kind!r} has no key {key!r}; {nearest(str(key), [*keys, *of_any])}")
    arguments = {"image_size": image_size, "on_bad_image": on_bad_image, **shared}
    arguments = {key: value for key, value in arguments.items() if key in known}
    given = {key: _plain(key, spec[key], known[key].default) for key in spec if key in keys}
    arguments |= {key: value for key, value in given.items() if value not in (None, "", ())}
    if "path" in known:
        arguments["path"] = _resolve(arguments.get("path", ""), kind, data_dir)
    elif "name" not in arguments:
        raise UserError(f"kind {kind!r} needs a name")
    of_any = {key: _plain(key, spec.get(key, default), default) for key, default in of_any.items()}
    if "tiles" in known:
        arguments["tiles"] = Tiles.parse(**{key: of_any[key] or _OF_TILES[key] for key in _OF_TILES})
    dataset = reader(**arguments)
    if of_any[SEGMENTS] and SEGMENTS not in known:
        dataset = dataset.segmented(of_any[SEGMENTS])
    if of_any["ordinal"]:
        dataset = ordered(dataset, spec)
    cohort = of_any["cohort"] or (kind if kind in SETS else "")
    return replace(dataset, merge_look_alikes=of_any["merge_look_alikes"], cohort=cohort)


def _unlabelled(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of the same images without their labels, which select none of them."""
    if spec.get("kind") not in ("folder", "manifest"):
        return dict(spec)
    of_labels = ("label", SEGMENTS, "mask_orientation", "ordinal", "classes", "drop_classes", "where")
    return {**{key: value for key, value in spec.items() if key not in of_labels}, "kind": "images"}


def ordered(dataset: Dataset, spec: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Dataset:
    """Return a set whose classes are ordered grades.

    Args:
        dataset: The set, with classes in the order of its reader.
        spec: Description of the set in the config, or of each of its sources; `classes` gives names an order.

    Raises:
        UserError: The classes are names without an order, or an image has several classes.
    """
    if dataset.ordinal or dataset.segments:
        return dataset
    if dataset.multi_label:
        raise UserError(
            "grades are one per image, but an image has several labels here; expected ordinal=False"
        )
    first = spec if isinstance(spec, Mapping) else spec[0]
    given = _plain("classes", first.get("classes", ()), ())
    _, are_numbers = identity.in_order(dataset.classes)
    if not given and not are_numbers:
        listed = ", ".join(dataset.classes)
        raise UserError(
            f"{dataset.name}: grades need an order, but these are names: {listed}; "
            "expected classes='LOWEST,...,HIGHEST' with all of them"
        )
    return replace(dataset, ordinal=True)


def _plain(key: str, value: object, standard: object) -> Any:
    """Return a value in the type of the reader's default; a round trip through JSON makes lists of tuples."""
    if value in (None, "", (), []):
        return value
    if key == "image_size" and (type(value) is not int or value < 1):
        raise UserError(f"image_size is {value!r}; expected a side in pixels")
    if standard is inspect.Parameter.empty:
        return value
    if isinstance(standard, bool):
        found = {"true": True, "false": False}.get(str(value).lower())
        if found is None:
            raise UserError(f"{key} is {value!r}; expected true or false")
        return found
    if isinstance(standard, tuple):
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{key} is {value!r}; expected names, such as ('benign', 'malignant')")
        return tuple(name.strip() for name in names)
    if isinstance(standard, str) and not isinstance(value, str):
        raise UserError(f"{key} is {value!r}; expected text")
    if isinstance(standard, float):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{key} is {value!r}; expected a number")
        return float(value)
    if not isinstance(standard, str) and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise UserError(f"{key} is {value!r}; expected a whole number from 0")
    return value


def _resolve(path: str, kind: str, data_dir: str | Path | None) -> Path:
    if not path:
        raise UserError(f"kind {kind!r} needs a path")
    if (place := home.expanded(path)).is_absolute():
        return place
    if data_dir is None or not str(data_dir):
        raise UserError(
            f"{path} is relative to a data folder that was not given; pass --config.data_dir=FOLDER"
        )
    if not (folder := home.expanded(data_dir)).is_dir():
        raise UserError(f"no folder {folder}; pass the folder that holds {path} as --config.data_dir=FOLDER")
    return folder / path
