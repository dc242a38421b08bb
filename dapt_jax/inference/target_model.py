"""The file of a target model: an encoder, its heads or decoders, and all that a prediction needs.

One safetensors file holds the encoder once (`encoder/PATH`) and, for each fold, a head or a decoder on it
(`member0/PATH`, ...). The metadata says how images are read and normalised, what the outputs mean, and where
the model comes from; nothing else of the study is needed.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dapt_jax.data.framing import Framing
from dapt_jax.data.intensity import Range
from dapt_jax.data.plane import Window
from dapt_jax.errors import UserError
from dapt_jax.inference.familiarity import FeatureModel
from dapt_jax.inference.units import UnitRule
from dapt_jax.losses import LOSSES, SEGMENTATION_LOSSES, ClassificationLoss, SegmentationLoss
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.models.segmenter import Segmenter
from dapt_jax.runtime import home
from dapt_jax.weights import export, identity, normalisation, readers
from dapt_jax.weights.paths import flatten, unflatten
from dapt_jax.weights.source import Weights

KEY = "dapt_jax.target_model"
"""Key of the metadata that says that a file is a target model; its value is an `About` as JSON."""

FOLDER = "models"
"""Folder of target models in a workdir: `models/TASK/STRATEGY-PROTOCOL/seedS.safetensors`."""

SUFFIX = ".safetensors"
VERSION = 1

HOW_TO_KEEP = (
    "a study keeps its target models unless --config.transfer.keep=none; where it did not, run it with "
    "--config.transfer.keep=best in a new workdir (--config.weights=run:WORKDIR takes its adapted encoder)"
)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the training images were read, and so how new ones are.

    Attributes:
        image_size: Side of decoded images in pixels.
        crop: Side in pixels of the centre crop before resizing; 0 for the whole image.
        resize: How an image that is not square becomes one: `squash`, `pad` or `crop`, see `Framing`.
        window: Black and white that the study's settings state, as the fields of `Window`; empty for none.
        axis: Axis of NIfTI volumes.
        ranges: Black and white of the training set by kind of image, as the fields of `Range`.
        kinds: Origins of the training images' ranges, such as "8 bits".
        colour: Whether training images are in colour: "grey", "colour" or "both".
        sides: Smallest and largest side of the training images' files in pixels; empty where unknown.
        tile_size: Side of the tiles that training images were cut into, in pixels; 0 for whole images.
    """

    image_size: int
    crop: int = 0
    resize: str = "squash"
    window: tuple[Any, ...] = ()
    axis: int = 2
    ranges: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    colour: str = "both"
    sides: tuple[int, ...] = ()
    tile_size: int = 0

    def refusal(self, extent: tuple[int, int]) -> str:
        """Return why an image of this height and width cannot be read alike; empty where it can.

        A model of tiles would see a whole image at a scale that it was never trained on.
        """
        side = self.tile_size
        if not side or extent == (side, side):
            return ""
        return (
            f"{extent[1]} x {extent[0]} pixels, but the model was trained on tiles (tile_size) of {side} x {side}; "
            "expected images cut into such tiles"
        )

    @property
    def framing(self) -> Framing:
        """How a picture becomes the square that the network sees."""
        return Framing(self.image_size, self.crop or None, self.resize)

    @property
    def shown(self) -> Window | None:
        """The window of every image; None for the rule of each kind of file."""
        return Window(*self.window) if self.window else None

    @property
    def of_set(self) -> dict[str, Range]:
        """Ranges of the training set, which apply to new images of the same kind."""
        return {name: Range(*values) for name, values in self.ranges.items()}


@dataclasses.dataclass(frozen=True)
class About:
    """What a target model is, as plain JSON values.

    Attributes:
        task: Name of the target task.
        strategy: Strategy of the encoder's adaptation.
        protocol: How the encoder was used: a kind of head, or fine-tuning.
        seed: Seed of the arm.
        folds: Fold of each member, from 0.
        model: Architecture of the encoder.
        last_group: Last layer group of the encoder, which may be truncated.
        dtype: Dtype of activations.
        loss: Name of the loss; its outputs become probabilities.
        loss_values: Fields of the loss.
        reading: How images are read.
        classes: Names of the classes; empty for masks.
        segments: Names of the values of masks, the background first; empty for classes.
        overlapping: Whether masks are bit fields.
        decoder: Name of the decoder; empty for classes.
        side: Side of the centre crop, or of sliding windows, that the network takes; the image size for all.
        crops: Crops averaged for each image: 1, or 10.
        overlap: Overlap of sliding windows.
        temperatures: Temperature of each member, fitted to development images that it was not trained on; empty
            where there were none, and for masks.
        threshold: Distance of features beyond which an image is unlike the training images: see
            `familiarity`; 0 where unknown.
        units: What the study aggregates the probabilities of images to, and how; None for images alone.
        trained_on: Study, set, numbers of images and patients, and source weights.
    """

    task: str
    strategy: str
    protocol: str
    seed: int
    folds: tuple[int, ...]
    model: str
    last_group: str
    dtype: str
    loss: str
    loss_values: Mapping[str, Any]
    reading: Reading
    classes: tuple[str, ...] = ()
    segments: tuple[str, ...] = ()
    overlapping: bool = False
    decoder: str = ""
    side: int = 0
    crops: int = 1
    overlap: float = 0.5
    temperatures: tuple[float, ...] = ()
    threshold: float = 0.0
    units: UnitRule | None = None
    trained_on: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def objective(self) -> ClassificationLoss | SegmentationLoss:
        """The loss, which makes probabilities of logits."""
        registry: Mapping[str, Any] = SEGMENTATION_LOSSES if self.segments else LOSSES
        loss = registry[self.loss](**_tuples(self.loss_values))
        assert isinstance(loss, ClassificationLoss | SegmentationLoss)
        return loss

    @property
    def input_side(self) -> int:
        """Side in pixels of the squares that the network takes."""
        return self.side or self.reading.image_size

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes."""
        return bool(self.classes) and self.objective.multi_label

    @property
    def family(self) -> tuple[str, str, str]:
        """Task, strategy and protocol: models that differ only in seed and fold are one ensemble."""
        return self.task, self.strategy, self.protocol


@dataclasses.dataclass(frozen=True, eq=False)
class TargetModel:
    """An encoder with the heads or decoders of one or more folds.

    Attributes:
        about: What it is.
        encoder: The encoder, with the normalisation of its images.
        params: Its parameters.
        batch_stats: Its batch-norm statistics.
        members: Arrays of each fold. Of classes `shift` and `factor` [d], which features pass first, and
            layers `layer0/kernel` [outputs, d], `layer0/bias` [outputs] and so on, with ReLU between them; of
            masks parameters and statistics of the decoder.
        features: Distribution of the training images' features; None where unknown.
        path: The file; None for a model in memory.
    """

    about: About
    encoder: Encoder
    params: Tree
    batch_stats: Tree
    members: tuple[Tree, ...]
    features: FeatureModel | None = None
    path: Path | None = None

    @property
    def segmenter(self) -> Segmenter:
        """The network of a model of masks."""
        about = self.about
        return Segmenter(self.encoder, about.objective.outputs, about.decoder, about.dtype)

    @property
    def classifier(self) -> Classifier:
        """The encoder as a classifier, whose pooled features the members read."""
        return Classifier(self.encoder, 1, self.about.dtype)

    def segmenter_weights(self, member: int) -> tuple[Tree, Tree]:
        """Return parameters and statistics of the whole network of masks of one member."""
        params, batch_stats = self.segmenter.abstract()
        every = flatten(self.params) | flatten(self.batch_stats) | flatten(self.members[member])
        return (
            unflatten({path: every[path] for path in flatten(params)}),
            unflatten({path: every[path] for path in flatten(batch_stats)}),
        )

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        arrays = {
            f"encoder/{path}": leaf
            for tree in (self.params, self.batch_stats)
            for path, leaf in flatten(tree).items()
        }
        for number, member in enumerate(self.members):
            arrays |= {f"member{number}/{path}": leaf for path, leaf in flatten(member).items()}
        if self.features:
            arrays |= {f"features/{name}": leaf for name, leaf in self.features.arrays().items()}
        about = {
            KEY: json.dumps({"version": VERSION, **dataclasses.asdict(self.about)}),
            **export.about_encoder(self.encoder),
        }
        plain = {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in arrays.items()}
        export.save(path, plain, about)

    @property
    def fingerprint(self) -> str:
        """Sha256 of the file."""
        assert self.path
        return identity.digest(self.path)


def is_target_model(path: Path) -> bool:
    """Return whether a file is a target model, from its header alone."""
    return path.suffix == SUFFIX and KEY in readers.read(path).metadata


def read(path: Path) -> TargetModel:
    """Read the file of a target model.

    Raises:
        UserError: The file is damaged, no target model, or one of a newer version.
    """
    weights = readers.read(path)
    about, encoder = _described(weights, path)
    arrays = dict(weights.items())
    params, batch_stats = (
        unflatten(
            {
                name: _array(arrays, f"encoder/{name}", leaf.shape, path)
                for name, leaf in flatten(tree).items()
            }
        )
        for tree in encoder.abstract()
    )
    members = tuple(unflatten(_below(arrays, f"member{number}/")) for number in range(len(about.folds)))
    if not members or not all(members):
        raise UserError(
            f"{path}: holds no head or decoder of fold {len(members)}; expected a file of transfer.keep"
        )
    stored = _below(arrays, "features/")
    features = FeatureModel(**stored, threshold=about.threshold) if stored else None
    return TargetModel(about, encoder, params, batch_stats, members, features, path)


def describe(path: Path) -> tuple[About, Encoder]:
    """Return what a target model is, and its encoder, from the file's header alone.

    Raises:
        UserError: See `read`.
    """
    return _described(readers.read(path), path)


def _described(weights: Weights, path: Path) -> tuple[About, Encoder]:
    if KEY not in weights.metadata:
        raise UserError(f"{path}: weights, but not a target model; {HOW_TO_KEEP}")
    try:
        values = json.loads(weights.metadata[KEY])
        version = values.pop("version")
        if version != VERSION:
            raise UserError(
                f"{path}: a target model of version {version}; expected {VERSION}, or a newer dapt_jax"
            )
        values["reading"] = Reading(**_tuples(values["reading"]))
        values["units"] = UnitRule(**values["units"]) if values.get("units") else None
        about = About(**_tuples(values))
        _ = about.objective
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: its metadata {KEY} is damaged; expected a file of transfer.keep") from error
    encoder = registry.build(about.model).truncate(about.last_group)
    if preprocess := normalisation.from_metadata(weights.metadata, str(path)):
        encoder = encoder.with_preprocess(preprocess)
    return about, encoder


def find(places: Sequence[str | Path]) -> list[Path]:
    """Return the files of target models that paths name.

    Args:
        places: Files, folders of files, and workdirs.

    Raises:
        UserError: A path does not exist or holds no target model, or the files are of several tasks,
            strategies or protocols that no path tells apart.
    """
    found: list[Path] = []
    for place in places:
        path = home.expanded(place)
        if not path.exists():
            raise UserError(
                f"{path}: no such target model; expected a file, a folder of files, or a workdir of a study"
            )
        if path.is_file():
            found.append(path)
            continue
        is_workdir = (path / "config.json").is_file() or (path / FOLDER).is_dir()
        root = path / FOLDER if is_workdir else path
        below = (
            [file for file in sorted(root.rglob(f"*{SUFFIX}")) if is_target_model(file)]
            if root.is_dir()
            else []
        )
        if not below:
            raise UserError(f"{path}: holds no target models; {HOW_TO_KEEP}")
        folders = sorted({file.parent for file in below})
        if len(folders) > 1:
            listed = ", ".join(str(folder) for folder in folders[:6]) + (", ..." if len(folders) > 6 else "")
            raise UserError(
                f"{path}: holds target models of several tasks or strategies; expected one folder of {listed}"
            )
        found += below
    return list(dict.fromkeys(found))


def _below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): leaf for name, leaf in arrays.items() if name.startswith(prefix)}


def _array(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], path: Path) -> np.ndarray:
    if name not in arrays or arrays[name].shape != shape:
        held = f"has shape {arrays[name].shape}" if name in arrays else "is missing"
        raise UserError(f"{path}: {name!r} {held}; expected {shape}")
    return arrays[name]


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON values with lists as tuples, those of one more level of dicts too."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(map(one, value))
        return {key: one(each) for key, each in value.items()} if isinstance(value, dict) else value

    return {name: one(value) for name, value in values.items()}
