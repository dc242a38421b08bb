"""Prepared TensorFlow Datasets sets in array_record files, read without TensorFlow.

If TensorFlow is installed, sets can be prepared by name.
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from dapt_jax.data.dataset import Dataset, with_classes
from dapt_jax.data.decode import ImageStore
from dapt_jax.data.framing import Framing
from dapt_jax.data.plane import one_line
from dapt_jax.errors import MissingLabelsError, UserError, nearest

LABEL = "label"
"""Name of the class feature unless another is given."""


def load_tfds(
    path: str | Path,
    *,
    image_size: int,
    dataset: str = "",
    split: str = "",
    label: str = LABEL,
    mask: str = "",
    classes: Sequence[str] = (),
    drop_classes: Sequence[str] = (),
    where: str = "",
    crop: int | None = None,
    resize: str = "squash",
    group: str = "",
    name: str = "",
    reads_labels: bool = True,
) -> Dataset:
    """Read a set prepared by `tfds build --file_format=array_record`; its images are held in memory.

    Args:
        path: Folder of the version (which contains `dataset_info.json`), or a folder above it with only one
            version; with `dataset`, the data folder of TFDS.
        image_size: Side of the images in pixels.
        dataset: Name of a set in the TFDS catalogue, such as "colorectal_histology" or "name/config"; it is
            downloaded and prepared if `path` does not contain it yet, which requires TensorFlow.
        split: Split to read; "" reads all of them. The split is in `columns["split"]` in both cases.
        label: Name of the class feature; a set with masks may lack the default one.
        mask: Name of the feature of masks, whose values are numbers of segments; "" reads none. With
            `segments` in the description the set is one of masks.
        classes: The classes in the wanted order; by default those of the feature.
        drop_classes: Classes whose images are left out.
        where: Condition that selects images, see `Dataset.where`.
        crop: Side in pixels of a centre crop before resizing, see `dapt_jax.data.decode.decode`.
        resize: How an image that is not square becomes one: `squash`, `pad` or `crop`, see `Framing`.
        group: Name of the feature that identifies the patient; "" makes each image its own group.
        name: Name of the data set; by default that of the prepared set.
        reads_labels: Whether labels are read; without, the set need not have any.

    Raises:
        UserError: There is no prepared set and it cannot be prepared, it is not in array_record files, or it
            does not have a feature or split.
        MissingLabelsError: A split has examples without a label, which is -1 in TFDS.
    """
    # Importing it takes seconds, which readers of other kinds avoid.
    import tensorflow_datasets as tfds

    folder = _prepared(tfds, Path(path), dataset) if dataset else _version_folder(Path(path))
    builder = tfds.builder_from_directory(folder)
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        found = builder.info.file_format.value
        raise UserError(
            f"{folder}: its files are {found}; prepare the set again with --file_format=array_record"
        )
    features = builder.info.features
    is_labelled = reads_labels and (not mask or label in features or label != LABEL)
    for feature in ("image", *([label] if is_labelled else []), *filter(None, [group, mask])):
        if feature not in features:
            raise UserError(f"{folder}: no feature {feature!r}; {nearest(feature, features)}")
    if is_labelled and not isinstance(features[label], tfds.features.ClassLabel):
        raise UserError(
            f"{folder}: feature {label!r} is {type(features[label]).__name__}, expected ClassLabel"
        )
    if split and split not in builder.info.splits:
        raise UserError(f"{folder}: no split {split!r}; {nearest(split, builder.info.splits)}")

    framing = Framing(image_size, crop, resize)
    images, labels, groups, splits, masks = [], [], [], [], []
    for part in [split] if split else sorted(builder.info.splits):
        for index, example in enumerate(builder.as_data_source(part)):
            pixels = _rgb(example["image"], f"{folder}: {part}[{index}]")
            images.append(framing.images(pixels[None])[0])
            labels.append(int(example[label]) if is_labelled else 0)
            if mask:
                masks.append(framing.mask(_mask(example[mask], pixels, f"{folder}: {part}[{index}]")))
            groups.append(_text(example[group]) if group else f"{part}/{index:06d}")
            splits.append(part)
    for part in dict.fromkeys(splits):  # TFDS writes -1 for no label
        of_part = [known for known, its in zip(labels, splits, strict=True) if its == part]
        if count := sum(known < 0 for known in of_part):
            raise MissingLabelsError(
                f"{folder}: {count} of {len(of_part)} examples of split {part!r} have no label (-1); expected one for "
                "each, or another split=NAME"
            )
    if not images:
        raise UserError(f"{folder}: no examples in split {split or 'any'!r}")
    title = name or builder.info.name
    found = Dataset(
        name=title,
        images=ImageStore.from_arrays(
            np.stack(images), image_size, [f"{title}/{part}/{row:06d}" for row, part in enumerate(splits)]
        ),
        labels=np.array(labels, np.int64),
        classes=tuple(features[label].names) if is_labelled else ("image",),
        groups=np.array(groups, dtype=str),
        columns={"split": np.array(splits, dtype=str)},
        masks=np.stack(masks) if mask else None,
    ).where(where)
    return with_classes(found, classes, drop_classes, str(folder))


def _version_folder(path: Path) -> Path:
    if (path / "dataset_info.json").is_file():
        return path
    versions = sorted(info.parent for info in path.glob("*/dataset_info.json"))
    if not versions:
        raise UserError(f"{path}: no prepared TFDS set; expected a folder with dataset_info.json")
    if len(versions) > 1:
        raise UserError(
            f"{path}: holds several versions; name one: {', '.join(folder.name for folder in versions)}"
        )
    return versions[0]


def _prepared(tfds: ModuleType, folder: Path, dataset: str) -> Path:
    """Return the version folder of a set by name; the set is prepared if it does not exist yet."""
    if any((folder / dataset).glob("**/dataset_info.json")):
        return _version_folder(folder / dataset)
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"{folder}: does not hold {dataset} prepared, and preparing it takes TensorFlow; pip install "
            "'dapt_jax[tfds]'"
        )
    try:
        builder = tfds.builder(dataset, data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(f"no set {dataset!r} in TFDS; {nearest(dataset, tfds.list_builders())}") from error
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"{folder}: {dataset} cannot be prepared ({one_line(error)[:300]})") from error
    return Path(builder.data_path)


def _rgb(image: np.ndarray, place: str) -> np.ndarray:
    if image.dtype != np.uint8 or image.shape[-1] not in (1, 3):
        raise UserError(
            f"{place}: image is {image.dtype} {list(image.shape)}, expected uint8 with 1 or 3 channels"
        )
    return np.broadcast_to(image, (*image.shape[:2], 3))


def _mask(mask: np.ndarray, image: np.ndarray, place: str) -> np.ndarray:
    """Return the segments of an example, uint8 [h, w]."""
    found = np.asarray(mask)
    found = found[..., 0] if found.ndim == 3 and found.shape[-1] == 1 else found
    if found.shape != image.shape[:2] or found.dtype.kind not in "uib":
        raise UserError(
            f"{place}: mask is {np.asarray(mask).dtype} {list(np.shape(mask))}, expected whole numbers "
            f"{[*image.shape[:2], 1]}, as large as its image"
        )
    if found.min() < 0 or found.max() > 255:
        raise UserError(f"{place}: mask holds {found.min()} to {found.max()}; expected 0 to 255")
    return found.astype(np.uint8)


def _text(value: object) -> str:
    return re.sub(r"\s+", " ", value.decode()) if isinstance(value, bytes) else str(value)
