"""Target models applied to images: forward pass, ensemble, and distance from the training images."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped, UInt8

from dapt_jax.data import crops
from dapt_jax.errors import UserError
from dapt_jax.inference import calibration, target_model
from dapt_jax.inference.target_model import About, TargetModel
from dapt_jax.inference.units import UnitPredictions, aggregate
from dapt_jax.losses import ClassificationLoss, SegmentationLoss
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import Tree
from dapt_jax.models.segmenter import Segmenter
from dapt_jax.runtime import sharding
from dapt_jax.training import windows
from dapt_jax.training.evaluate import ShardedForward

BATCH, BATCH_OF_MASKS = 64, 8
"""Images at a time where nothing else is asked for."""


@dataclasses.dataclass(frozen=True, eq=False)
class Outputs:
    """What an ensemble makes of images that are read already.

    Attributes:
        probabilities: Mean over members: of classes [k, classes], of masks [k, h, w, outputs] before the
            decision.
        spread: Standard deviation over members: of classes [k, classes]; of masks its mean over pixels and
            outputs, [k].
        distance: Distance of the features, in multiples of the threshold; NaN where it is unknown, [k].
        members: Probabilities by each member, of classes [k, members, classes]; empty for masks.
    """

    probabilities: np.ndarray
    spread: np.ndarray
    distance: np.ndarray
    members: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0, 0), np.float32))


class Ensemble:
    """Target models of one task, one strategy and one protocol, of any folds and seeds.

    Attributes:
        models: The models.
        calibrate: Whether probabilities are at the temperatures that the models store.
    """

    def __init__(self, models: Sequence[TargetModel], *, calibrate: bool = False, mesh: Mesh | None = None):
        """Put the models on the devices.

        Args:
            models: The models, one or more.
            calibrate: See the attribute.
            mesh: Devices; by default all.

        Raises:
            UserError: The models do not go together, or one that stores no temperature is to be calibrated.
        """
        self.models, self.calibrate = tuple(models), calibrate
        _check_together(self.models)
        if calibrate and (plain := next((each for each in self.models if not each.about.temperatures), None)):
            why = (
                "it is one of masks"
                if self.about.segments
                else "no labelled development image was held out of its training"
            )
            raise UserError(
                f"predict.calibrate is true, but {plain.path or 'the target model'} stores no temperature: {why}; "
                "expected false"
            )
        self._mesh = mesh or sharding.make_mesh()
        make = _segment if self.about.segments else _classify
        self._parts = [make(model, self._mesh) for model in self.models]

    @property
    def about(self) -> About:
        """What the first model is; the others differ in seed and folds only."""
        return self.models[0].about

    @property
    def members(self) -> int:
        """Number of heads or decoders."""
        return sum(len(model.members) for model in self.models)

    def batch_size(self, asked: int = 0) -> int:
        """Return the images of a batch: as asked, rounded up to a multiple of the devices."""
        wanted = asked or (BATCH_OF_MASKS if self.about.segments else BATCH)
        return -(-wanted // self._mesh.size) * self._mesh.size

    def __call__(self, images: UInt8[np.ndarray, "k h w 3"], batch_size: int = 0) -> Outputs:
        """Return the predictions of images of the models' size, k at most the size of a batch."""
        size = self.batch_size(batch_size)
        filled = np.concatenate([images, np.repeat(images[-1:], size - len(images), 0)])
        found = [part(filled) for part in self._parts]
        distance = np.stack([distance for _, distance in found]).mean(0)[: len(images)]
        every = [values[: len(images)] for members, _ in found for values in members]
        if self.calibrate:
            warmth = [each for model in self.models for each in model.about.temperatures]
            several = self.about.multi_label
            every = [
                calibration.apply(values, each, multi_label=several)
                for values, each in zip(every, warmth, strict=True)
            ]
        stacked = np.stack(every)
        mean, spread = stacked.mean(0, dtype=np.float32), stacked.std(0, dtype=np.float32)
        if self.about.segments:
            return Outputs(mean, spread.mean((1, 2, 3)), distance)
        return Outputs(mean, spread, distance, np.moveaxis(stacked, 0, 1))

    def decide(self, probabilities: Float[np.ndarray, "k h w outputs"]) -> UInt8[np.ndarray, "k h w"]:
        """Return the masks that probabilities of pixels stand for."""
        objective = self.about.objective
        assert isinstance(objective, SegmentationLoss)
        return np.asarray(windows.decide(objective)(probabilities))


Part = Callable[[np.ndarray], tuple[Sequence[np.ndarray], np.ndarray]]
"""Function from a batch of images to the probabilities by each member, and distances [b]."""


def features_of(model: TargetModel, mesh: Mesh) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from images [b, h, w, 3] to pooled features of central squares, float32 [b, d]."""
    forward = ShardedForward(_pooled(model.classifier), model.params, model.batch_stats, mesh)
    side = model.about.input_side
    return lambda images: forward(crops.centre(images, side))


@functools.cache
def _pooled(classifier: Classifier) -> Callable[..., jax.Array]:
    return jax.jit(classifier.features)


def _distances(model: TargetModel, features: np.ndarray) -> np.ndarray:
    if model.features is None or not model.features.threshold:
        return np.full(len(features), np.nan, np.float32)
    return model.features.distance(features)


def _classify(model: TargetModel, mesh: Mesh) -> Part:
    about = model.about
    objective = about.objective
    assert isinstance(objective, ClassificationLoss)
    weights = {"encoder": model.params, "members": list(model.members)}
    forward = ShardedForward(_heads_of(model.classifier, objective), weights, model.batch_stats, mesh)
    side = about.input_side

    def predict(images: np.ndarray) -> tuple[Sequence[np.ndarray], np.ndarray]:
        found = [forward(square) for square in crops.seen(images, side, about.crops)]
        centre = found[4 if about.crops == 10 else 0]
        size, classes = model.encoder.features, len(about.classes)
        mean = np.stack(found).mean(0, dtype=np.float32) if len(found) > 1 else centre
        every = mean[:, size:].reshape(len(images), -1, classes)
        return list(np.moveaxis(every, 1, 0)), _distances(model, centre[:, :size])

    return predict


@functools.cache
def _heads_of(classifier: Classifier, objective: ClassificationLoss) -> Callable[..., jax.Array]:
    """Return the jitted function from weights and images to features, then probabilities by each member.

    They are columns of one array, [b, d + members * classes].
    """

    def run(weights: Tree, batch_stats: Tree, images: Array) -> Array:
        features = classifier.features(weights["encoder"], batch_stats, images)
        every = [objective.probabilities(head_logits(member, features)) for member in weights["members"]]
        return jnp.concatenate([features, *every], 1)

    return jax.jit(run)


def head_logits(member: Tree, features: Float[Array, "b d"]) -> Float[Array, "b outputs"]:
    """Return the logits of a head: see `TargetModel.members`."""
    x = (features - member["shift"]) * member["factor"]
    layers = [name for name in member if name.startswith("layer")]
    with jax.default_matmul_precision("highest"):
        for number in range(len(layers)):
            layer = member[f"layer{number}"]
            x = (jax.nn.relu(x) if number else x) @ layer["kernel"].T + layer["bias"]
    return x


def _segment(model: TargetModel, mesh: Mesh) -> Part:
    about, network = model.about, model.segmenter
    objective = about.objective
    assert isinstance(objective, SegmentationLoss)
    forwards = [_pixels(network, objective, model, number, mesh) for number in range(len(model.members))]
    features = features_of(model, mesh) if model.features is not None else None
    side = about.input_side

    def predict(images: np.ndarray) -> tuple[Sequence[np.ndarray], np.ndarray]:
        if side == images.shape[1]:
            every = [forward(images) for forward in forwards]
        else:
            every = [
                windows.sliding(forward, images, side, about.overlap, len(images)) for forward in forwards
            ]
        distance = (
            _distances(model, features(images)) if features else np.full(len(images), np.nan, np.float32)
        )
        return every, distance

    return predict


def _pixels(
    network: Segmenter, objective: SegmentationLoss, model: TargetModel, member: int, mesh: Mesh
) -> Callable[[np.ndarray], np.ndarray]:
    function = windows.probabilities_of(network, objective)
    return ShardedForward(function, *model.segmenter_weights(member), mesh)


def _check_together(models: Sequence[TargetModel]) -> None:
    first = models[0]
    for other in models[1:]:
        for what in ("task", "classes", "segments", "overlapping", "multi_label", "units"):
            here, there = getattr(first.about, what), getattr(other.about, what)
            if here != there:
                raise UserError(
                    f"{other.path}: {what} is {_shown(there)}, of {first.path} {_shown(here)}; expected "
                    "models of one task"
                )
        for what in ("image_size", "crop", "resize", "tile_size", "window", "axis", "ranges"):
            here, there = getattr(first.about.reading, what), getattr(other.about.reading, what)
            if here != there:
                raise UserError(
                    f"{other.path}: reads images with {what} {there}, {first.path} with {here}; expected "
                    "models that read images alike"
                )


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """Predictions of images.

    Attributes:
        names: Name of each image.
        classes: Names of the classes, or of the values of masks.
        probabilities: Of classes, float32 [n, classes]: the mean over members. None for masks.
        masks: Of masks, uint8 [n, h, w] at the size that the model reads images. None for classes.
        spread: Standard deviation over members, [n, classes] or, of masks, its mean over pixels [n].
        distance: Distance of each image's features from the training images', in multiples of the threshold,
            [n]; NaN where the model does not store it.
        units: Predictions of patients or volumes; None where images name none or the study has none.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: np.ndarray | None
    masks: np.ndarray | None
    spread: np.ndarray
    distance: np.ndarray
    units: UnitPredictions[str] | None = None

    @property
    def unlike(self) -> Shaped[np.ndarray, " n"]:
        """Whether the features of each image lie beyond the threshold, bool [n]."""
        return self.distance > 1


Images = np.ndarray | str | Path | Sequence[str | Path]


class Predictor:
    """Function from images to predictions; made by `dapt_jax.load_predictor`.

    Attributes:
        ensemble: The target models.
    """

    def __init__(self, ensemble: Ensemble):
        """Use target models that are loaded already."""
        self.ensemble = ensemble

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, or of the values of masks."""
        return self.ensemble.about.classes or self.ensemble.about.segments

    def __call__(
        self, images: Images, *, batch_size: int = 0, units: Sequence[str] | None = None
    ) -> Prediction:
        """Return the predictions of images, which are held in memory: for many, use `--config.mode=predict`.

        Args:
            images: uint8 [n, h, w, 3], [n, h, w, 1] or [n, h, w], or floats of these shapes from 0 to 1; or
                paths of image files, which are read as the training images were; `scan.nii.gz[12]` is a slice.
            batch_size: Images at a time; 0 for a suitable number.
            units: The patient or volume of each image, of a study with `tasks.NAME.unit`; by default the
                PatientID of DICOM files where it aggregates to patients.

        Raises:
            UserError: The array has another shape or range, a file cannot be read, or units are named although
                the study has none.
        """
        from dapt_jax.inference import inputs  # reads files, which arrays do not need

        reading = self.ensemble.about.reading
        size = self.ensemble.batch_size(batch_size)
        if isinstance(images, np.ndarray):
            pixels = inputs.from_array(images, reading)
            names = tuple(f"array/{number:06d}" for number in range(len(pixels)))
        else:
            paths = [images] if isinstance(images, str | Path) else list(images)
            pixels, names = inputs.from_paths(paths, reading), tuple(map(str, paths))
            units = inputs.units_of(paths, self.ensemble.about.units) if units is None else units
        found = [
            self.ensemble(pixels[start : start + size], batch_size) for start in range(0, len(pixels), size)
        ]
        about = self.ensemble.about
        masks = probabilities = None
        if about.segments:
            masks = np.concatenate([self.ensemble.decide(each.probabilities) for each in found])
        else:
            probabilities = np.concatenate([each.probabilities for each in found])
        return Prediction(
            names,
            self.classes,
            probabilities,
            masks,
            np.concatenate([each.spread for each in found]),
            np.concatenate([each.distance for each in found]),
            None
            if units is None
            else self._of_units(units, np.concatenate([each.members for each in found])),
        )

    def _of_units(self, units: Sequence[str], members: np.ndarray) -> UnitPredictions[str]:
        about = self.ensemble.about
        if about.units is None:
            raise UserError(
                "units are named, but the target model's study aggregates to none; expected a study of classes with "
                "tasks.NAME.unit=patient"
            )
        if len(units) != len(members):
            raise UserError(f"{len(units)} units of {len(members)} images; expected the unit of each image")
        names = list(map(str, units))
        return aggregate(names, members, about.units.rule, multi_label=about.multi_label)


def load(places: str | Path | Sequence[str | Path], *, calibrate: bool = False) -> Predictor:
    """Return the predictor of target models: see `dapt_jax.load_predictor`."""
    several = [places] if isinstance(places, str | Path) else list(places)
    models = [target_model.read(path) for path in target_model.find(several)]
    if len({model.about.family for model in models}) > 1:
        named = ", ".join(sorted({"/".join(model.about.family) for model in models}))
        raise UserError(f"target models of {named}; expected one task, strategy and protocol")
    return Predictor(Ensemble(models, calibrate=calibrate))
