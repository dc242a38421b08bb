"""Target models of a study as files (`transfer.keep`): what is written of each arm, and which of them stay.

`models/TASK/STRATEGY-PROTOCOL/` holds one file per seed for heads on frozen features and decoders on a frozen
encoder, with the encoder once and a head or decoder per fold; fine-tuned networks have a file per seed and
fold. With `keep="best"` only the primary protocol of the report is written, and at the end the strategy with
the best development score stays; where no strategy has one, since no development image is held out, all stay.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dapt_jax.data import formats
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.plane import plane
from dapt_jax.errors import redact
from dapt_jax.inference import calibration, familiarity, predictor, target_model
from dapt_jax.inference.familiarity import FeatureModel
from dapt_jax.inference.inputs import is_grey_image
from dapt_jax.inference.target_model import About, Reading, TargetModel
from dapt_jax.inference.units import UnitRule
from dapt_jax.losses import Loss
from dapt_jax.metrics import lower_is_better
from dapt_jax.models.classifier import HEAD
from dapt_jax.models.encoder import Encoder, Tree, get_group, put_group
from dapt_jax.objectives import Objective
from dapt_jax.records.study_records import Records
from dapt_jax.records.vocabulary import CHECKPOINT_MARK
from dapt_jax.runtime import atomic_files, processes, safe_paths, sharding, streams
from dapt_jax.settings.training import FINETUNE, TransferSettings
from dapt_jax.statistics import PATIENT
from dapt_jax.study import model_cards
from dapt_jax.study.adapt import Adapted
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.predictions import FoldPredictions
from dapt_jax.study.tasks import Task
from dapt_jax.training.context import RunContext
from dapt_jax.training.head_sweep import Heads
from dapt_jax.training.linear_head import LinearHeads
from dapt_jax.training.run import TrainingRun
from dapt_jax.weights.paths import flatten, unflatten

SAMPLE = 256
"""Training images from which a model remembers colour and sizes."""

BATCH = 32


@dataclasses.dataclass(frozen=True)
class Keeper:
    """Writer of the target models of an arm on a task.

    Attributes:
        study: The study.
        arm: The arm.
        task: The task.
        adapted: The arm's encoder.
        context: Environment of the runs.
    """

    study: Study
    arm: Arm
    task: Task
    adapted: Adapted
    context: RunContext
    _features: dict[Path, np.ndarray] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Features of the last network's encoder, by its file, which all folds on a frozen encoder share."""

    @property
    def _settings(self) -> TransferSettings:
        return self.study.settings.transfer_of(self.task.name)

    def keeps(self, protocol: str) -> bool:
        """Return whether this process writes the models of a protocol."""
        is_arm = not self.arm.epochs and self.context.workdir is not None and processes.is_primary()
        return is_arm and protocol in kept_protocols(self.study, self.task)

    def heads(
        self, protocol: str, trained: LinearHeads | Heads, features: np.ndarray, out_of_fold: FoldPredictions
    ) -> None:
        """Write the heads of all folds on frozen features, with the encoder.

        Args:
            protocol: The protocol.
            trained: The heads.
            features: Features of the development images.
            out_of_fold: Probabilities of the rows that each fold holds out, and these rows.
        """
        if not self.keeps(protocol):
            return
        loss = trained.objective if isinstance(trained, LinearHeads) else trained.settings.objective
        values = np.concatenate([values for values, _ in out_of_fold])
        rows = np.concatenate([rows for _, rows in out_of_fold])
        model = TargetModel(
            self._about(
                protocol,
                tuple(range(len(out_of_fold))),
                self.adapted.encoder,
                loss,
                temperatures=self._temperatures(loss, values, rows, len(out_of_fold)),
            ),
            self.adapted.encoder,
            self.adapted.params,
            self.adapted.batch_stats,
            tuple(_head(trained, fold) for fold in range(len(out_of_fold))),
            familiarity.fit(features, [rows for _, rows in out_of_fold]),
        )
        self._write(model, f"seed{self.arm.seed}")

    def finetuned(
        self,
        run: TrainingRun,
        params: Tree,
        batch_stats: Tree,
        fold: int,
        held: np.ndarray,
        held_rows: np.ndarray,
    ) -> None:
        """Write the network of one fold.

        Args:
            run: The run that trained it.
            params: Its parameters.
            batch_stats: Its batch-norm statistics.
            fold: Number of the fold.
            held: Probabilities of the rows that the fold holds out.
            held_rows: These rows.
        """
        if not self.keeps(FINETUNE):
            return
        params, batch_stats = jax.device_get((params, batch_stats))
        loss = run.programs[0].objective
        assert not isinstance(loss, Objective)
        encoder, head = run.model.encoder, params.pop(HEAD)
        member = {
            "shift": np.zeros(encoder.features, np.float32),
            "factor": np.ones(encoder.features, np.float32),
            "layer0": {"kernel": np.ascontiguousarray(np.asarray(head["kernel"]).T), "bias": head["bias"]},
        }
        about = self._about(
            FINETUNE,
            (fold,),
            encoder,
            loss,
            temperatures=self._temperatures(loss, held, held_rows, 1),
            side=run.programs[-1].augment.size(self.task.development.images.size),
            crops=self._settings.finetune.test_crops,
        )
        model = TargetModel(about, encoder, params, batch_stats, (member,))
        self._write_familiar(model, f"seed{self.arm.seed}-fold{fold}", held_rows)

    def decoder(
        self,
        protocol: str,
        run: TrainingRun,
        params: Tree,
        batch_stats: Tree,
        fold: int,
        held_rows: np.ndarray,
    ) -> None:
        """Write the network of one fold for masks; on one encoder of all folds, they are in one file."""
        if not self.keeps(protocol):
            return
        params, batch_stats = jax.device_get((params, batch_stats))
        encoder, loss = run.model.encoder, run.programs[-1].objective
        assert not isinstance(loss, Objective)
        own, kept_params, kept_stats = dict[str, Any](), dict[str, Any](), dict[str, Any]()
        for name in run.model.groups:
            if name in encoder.groups:
                put_group(kept_params, name, get_group(params, name))
                put_group(kept_stats, name, get_group(batch_stats, name))
            else:
                both = flatten(get_group(params, name)) | flatten(get_group(batch_stats, name))
                put_group(own, name, unflatten(both))
        segmentation = self._settings.segmentation
        # Statistics that each fold moves belong to that fold, as parameters that it trains do.
        is_frozen = protocol != FINETUNE and segmentation.frozen_batch_norm == "frozen"
        name = f"seed{self.arm.seed}" if is_frozen else f"seed{self.arm.seed}-fold{fold}"
        before: tuple[Tree, ...] = ()
        if is_frozen and fold:
            before = target_model.read(self._path(protocol, name)).members[:fold]
        about = self._about(
            protocol,
            tuple(range(fold + 1)) if is_frozen else (fold,),
            encoder,
            loss,
            side=run.programs[-1].augment.size(self.task.development.images.size),
            decoder=segmentation.decoder,
            overlap=segmentation.overlap,
        )
        model = TargetModel(about, encoder, kept_params, kept_stats, (*before, own))
        self._write_familiar(model, name, held_rows)

    def _about(
        self, protocol: str, folds: tuple[int, ...], encoder: Encoder, loss: Loss, **more: Any
    ) -> About:
        development = self.task.development
        is_masks = self.task.is_segmentation
        return About(
            task=self.task.name,
            strategy=self.arm.name,
            protocol=protocol,
            seed=self.arm.seed,
            folds=folds,
            model=encoder.name,
            last_group=encoder.groups[-1],
            dtype=self.study.settings.model.dtype,
            loss=loss.name,
            loss_values=dataclasses.asdict(loss),
            reading=reading_of(development),
            classes=() if is_masks else development.classes,
            segments=development.segments,
            overlapping=development.overlapping,
            units=self._units,
            trained_on={
                "study": self.study.settings.title or self.study.settings.name,
                "set": development.name,
                "images": len(development),
                "patients": len(np.unique(development.groups)),
                "class_counts": development.class_counts(),
                "weights": redact(self.arm.strategy.weights),
                "source": self.adapted.source,
            },
            **more,
        )

    @property
    def _units(self) -> UnitRule | None:
        """What the task aggregates the probabilities of images to; None for masks, whose pixels are counted."""
        aggregation = self.task.aggregation
        if aggregation is None or self.task.is_segmentation:
            return None
        own = self.study.settings.tasks[self.task.name]
        sources = own.development or own.train or ()
        (kind, group), *others = {
            (str(source["kind"]), str(source.get("group", "")))
            for source in (sources if isinstance(sources, tuple) else (sources,))
        }
        column = group if kind == "manifest" and not others and group not in (PATIENT, "image") else ""
        pattern = group if kind == "folder" and not others else ""
        return UnitRule(aggregation.unit, aggregation.rule, column, pattern)

    def _temperatures(
        self, loss: Loss, values: np.ndarray, rows: np.ndarray, members: int
    ) -> tuple[float, ...]:
        """Return the temperature of each member; none where no image with a label was held out."""
        if not len(rows):
            return ()
        truth = self.task.development.truth[rows]
        found = calibration.temperature(values, truth, multi_label=bool(loss.multi_label))
        return () if found is None else (found,) * members

    def _write_familiar(self, model: TargetModel, name: str, held_rows: np.ndarray) -> None:
        """Write a model with the distribution of the features of its own encoder."""
        images = self.task.development.images
        count = min(len(images), familiarity.MOST_ROWS)
        rows = np.unique(np.linspace(0, len(images) - 1, count).astype(int))
        file = self._path(model.about.protocol, name)
        if file not in self._features:
            mesh = sharding.local_mesh()
            features, size = predictor.features_of(model, mesh), -(-BATCH // mesh.size) * mesh.size
            parts = []
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                parts.append(features(images.batch(np.resize(part, size)))[: len(part)])
            self._features.clear()
            self._features[file] = np.concatenate(parts)
        held = np.flatnonzero(np.isin(rows, held_rows))
        fitted = familiarity.fit(self._features[file], [held])
        self._write(dataclasses.replace(model, features=fitted), name)

    def _path(self, protocol: str, name: str) -> Path:
        return folder_of(self.context.study_folder(), self.task.name, self.arm.name, protocol) / (
            name + target_model.SUFFIX
        )

    def _write(self, model: TargetModel, name: str) -> None:
        threshold = model.features.threshold if isinstance(model.features, FeatureModel) else 0.0
        about = dataclasses.replace(model.about, threshold=threshold)
        dataclasses.replace(model, about=about).write(self._path(model.about.protocol, name))


def folder_of(workdir: Path, task: str, strategy: str, protocol: str) -> Path:
    """Return the folder of the target models of a strategy."""
    name = f"{target_model.FOLDER}/{task}/{strategy}-{protocol}"
    return workdir.joinpath(*safe_paths.check(name, workdir))


def kept_protocols(study: Study, task: Task) -> tuple[str, ...]:
    """Return the protocols of a task whose target models are written."""
    transfer = study.settings.transfer_of(task.name)
    protocols = transfer.segmentation.protocols if task.is_segmentation else transfer.protocols
    if transfer.keep == "all":
        return protocols
    return () if transfer.keep == "none" else (study.settings.report.primary_of(protocols),)


def reading_of(dataset: Dataset) -> Reading:
    """Return how the images of a set were read, and what they are like."""
    images = dataset.images
    rows = np.unique(np.linspace(0, len(images) - 1, min(len(images), SAMPLE)).astype(int)).tolist()
    known = images.known_ranges()
    ranges = {
        name: dataclasses.astuple(found)
        for each in known
        for name, found in each.items()
        if all(other.get(name, found) == found for other in known)
    }
    sources = [images.source(row) for row in range(len(images))]
    planes = [plane(each) for each in sources if each is not None]
    windows, axes = {each.window for each in planes}, {each.axis for each in planes if each.index is not None}
    tiles = {each.tile.size for each in planes if each.tile}
    window = windows.pop() if len(windows) == 1 else None
    axis = axes.pop() if len(axes) == 1 else 2
    sampled = [source for row in rows if (source := sources[row]) is not None]
    sides = [side for source in sampled for side in formats.extent(source)]
    grey = {is_grey_image(images[row]) for row in rows}
    return Reading(
        images.size,
        images.framing.crop or 0,
        images.framing.resize,
        dataclasses.astuple(window) if window else (),
        axis,
        ranges,
        tuple(sorted({each.origin for each in images.ranges()})),
        "both" if len(grey) > 1 else "grey" if True in grey else "colour",
        (min(sides), max(sides)) if sides else (),
        max(tiles, default=0),
    )


def _head(trained: LinearHeads | Heads, fold: int) -> Tree:
    """Return the arrays of the head of one fold: see `TargetModel.members`."""
    if isinstance(trained, LinearHeads):
        layer = {"kernel": trained.kernel[fold], "bias": trained.bias[fold]}
        return {"shift": trained.shift, "factor": trained.factor, "layer0": layer}
    layers = {
        name: {leaf: np.asarray(values[fold, 0]) for leaf, values in layer.items()}
        for name, layer in trained.params.items()
    }
    return {"shift": trained.shift[fold], "factor": trained.factor[fold], **layers}


def finish(study: Study, workdir: Path) -> list[Path]:
    """Remove the models of strategies that are not the best where only those are kept, and write the cards.

    Args:
        study: The study, whose arms are finished.
        workdir: Its folder.

    Returns:
        The folders that stay.
    """
    records = Records.read(workdir)
    kept = []
    for task in study.tasks:
        root = workdir / target_model.FOLDER / task.name
        if not root.is_dir():
            continue
        if study.settings.transfer_of(task.name).keep == "best":
            _prune(study, task, records, workdir)
        for folder in sorted(root.iterdir()):
            files = sorted(folder.glob(f"*{target_model.SUFFIX}"))
            if files:
                card = model_cards.text([target_model.describe(file) for file in files], records)
                atomic_files.write_text(folder / "README.md", card)
                kept.append(folder)
    return kept


def _prune(study: Study, task: Task, records: Records, workdir: Path) -> None:
    """Keep the strategy with the best mean development score over seeds; the first of several equal ones.

    Where seeds were added to a finished study, strategies that still have their models of earlier seeds come
    first. Where no strategy has such a score, nothing says which is the best, and all stay.
    """
    (protocol,) = kept_protocols(study, task)
    metric = records.metric(task.name)
    sign = -1 if lower_is_better(metric) else 1
    scores, means = {}, {}
    for strategy in records.strategies:
        folder = folder_of(workdir, task.name, strategy, protocol)
        values = records.values(strategy, task.name, task.scored, protocol, metric)
        mean = _mean([value for value in values if value is not None], sign)
        if CHECKPOINT_MARK not in strategy:
            means[folder] = mean
        if folder.is_dir():
            seeds = {file.stem.partition("-")[0] for file in folder.glob(f"*{target_model.SUFFIX}")}
            scores[folder] = len(seeds), mean
    if not scores:
        return
    if not np.isfinite([mean for _, mean in scores.values()]).any():
        streams.say(
            f"target models: {task.name}: no strategy has a development score, so those of all strategies stay, as "
            "with transfer.keep=all; a val split, or a development set instead of train, lets best choose"
        )
        return
    best = max(scores, key=lambda folder: scores[folder])
    leader = max(means, key=lambda folder: means[folder], default=best)
    if not leader.is_dir():
        streams.say(
            f"target models: {task.name}: those of {leader.name}, whose mean is now the best, were removed "
            f"before seeds were added; those of {best.name} stay (transfer.keep=all keeps every one)"
        )
    for folder in sorted((workdir / target_model.FOLDER / task.name).iterdir()):
        if folder != best and folder.is_dir():
            shutil.rmtree(folder)


def _mean(values: Sequence[float], sign: int) -> float:
    return sign * float(np.mean(values)) if values else -np.inf
