"""Target tasks: splits of their images, and result lines of their scores."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dapt_jax.data import identity, near_duplicates
from dapt_jax.data.concatenate import concatenate
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.splits import grouped_folds, grouped_holdout
from dapt_jax.errors import UserError, nearest
from dapt_jax.metrics import METRICS, Score, lookup
from dapt_jax.metrics.registry import MULTI_LABEL, ORDINAL, SINGLE_LABEL, names_of
from dapt_jax.records.vocabulary import OFFICIAL
from dapt_jax.settings.training import TransferSettings
from dapt_jax.statistics import PATIENT, PIXELS, Aggregation, Units

INNER_FOLDS = 5
"""Folds of a fold's training rows that choose the strength of its linear head."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A target task.

    Attributes:
        name: Name of the task.
        development: Images for training and choosing: those that are divided into folds; or, of a task with an
            official training split, that split and behind it the official validation split.
        held_out: Images used for scoring only, by split name (`test`, `external`).
        official: The official training split, and the validation split if there is one; empty for folds.
        split_seed: Seed of the folds and inner splits; None for the seed of the run.
        auc_classes: Classes of `auc_subset`; empty for none.
        aggregation: What images are aggregated to, and how; None for scores of images alone.
    """

    name: str
    development: Dataset
    held_out: dict[str, Dataset]
    official: tuple[Dataset, ...] = ()
    split_seed: int | None = None
    auc_classes: tuple[str, ...] = ()
    aggregation: Aggregation | None = None

    @classmethod
    def of(
        cls,
        name: str,
        parts: Mapping[str, Dataset],
        split_seed: int | None = None,
        auc_classes: tuple[str, ...] = (),
        aggregation: Aggregation | None = None,
    ) -> "Task":
        """Return the task of sets by split: `development`, or `train` and `val`; `test`, `external`.

        Args:
            name: Name of the task.
            parts: The sets.
            split_seed: See the attribute.
            auc_classes: See the attribute.
            aggregation: See the attribute.

        Raises:
            UserError: The sets do not go together.
        """
        official = tuple(parts[split] for split in OFFICIAL if split in parts)
        held_out = {split: parts[split] for split in parts if split not in ("development", *OFFICIAL)}
        if not official:
            return cls(name, parts["development"], held_out, (), split_seed, auc_classes, aggregation)
        try:
            development = concatenate(official, official[0].name)
        except UserError as error:
            raise UserError(f"task {name!r}: {error}") from error
        return cls(name, development, held_out, official, split_seed, auc_classes, aggregation)

    @property
    def parts(self) -> dict[str, Dataset]:
        """The sets by split, as the settings name them."""
        own = dict(zip(OFFICIAL, self.official, strict=False)) or {"development": self.development}
        return {**own, **self.held_out}

    def with_parts(self, parts: Mapping[str, Dataset]) -> "Task":
        """Return the task with other images in the same splits."""
        return Task.of(self.name, parts, self.split_seed, self.auc_classes, self.aggregation)

    def metrics(self, transfer: TransferSettings) -> tuple[str, ...]:
        """Return the metrics that the task is scored by, as its results name them: `auc`, `auc/monocyte`, ...

        Args:
            transfer: Settings of the task.
        """
        data = self.development
        if self.is_segmentation:
            names, classes = transfer.segmentation.metrics, data.segments[1:]
        else:
            kinds = (MULTI_LABEL,) if data.multi_label else (SINGLE_LABEL, *([ORDINAL] * data.ordinal))
            names, classes = names_of(*kinds, default=True), data.classes
            absent = () if self.auc_classes else ("auc_subset",)
            over_epochs = ("auc_epochs", "auc_epochs_sd") if transfer.head.score_every_epoch else ()
            names = (*(name for name in dict.fromkeys(names) if name not in absent), *over_epochs)
        of_classes = (f"{name}/{each}" for name in names if METRICS[name].per_class for each in classes)
        return (*names, *of_classes)

    @property
    def scored(self) -> str:
        """Name of the split of development images that are scored: those held out by folds, or `val`."""
        return OFFICIAL[1] if self.official else "development"

    @property
    def scored_rows(self) -> np.ndarray:
        """Rows of the development images that are scored, each once over all folds."""
        start = len(self.official[0]) if self.official else 0
        return np.arange(start, len(self.development))

    def scored_sets(self, rows: np.ndarray) -> dict[str, Dataset]:
        """Return the images that a fold is scored on, by split: `rows` of development, and all held out."""
        own = {self.scored: self.development.take(rows)} if len(rows) else {}
        return {**own, **self.held_out}

    def __post_init__(self) -> None:
        if self.aggregation:
            self._check_units(self.aggregation)
        for each in self.auc_classes:
            if each not in self.development.classes:
                raise UserError(
                    f"tasks.{self.name}.auc_classes: no class {each!r}; {nearest(each, self.development.classes)}"
                )
        for split, dataset in self.held_out.items():
            if (dataset.segments, dataset.overlapping) != (
                self.development.segments,
                self.development.overlapping,
            ):
                raise UserError(
                    f"task {self.name!r}: {split} has {_segments(dataset)}; expected those of development, "
                    f"{_segments(self.development)}"
                )
            if self.is_segmentation:
                continue
            if dataset.classes != self.development.classes:
                raise UserError(
                    f"task {self.name!r}: {split} has the classes {', '.join(dataset.classes)}; expected "
                    "those of "
                    f"development: {', '.join(self.development.classes)}; where a set lacks one, name all as "
                    "its classes"
                )
            if dataset.multi_label != self.development.multi_label:
                several, one = (split, "development") if dataset.multi_label else ("development", split)
                raise UserError(
                    f"task {self.name!r}: {several} has several labels per image, {one} has one; expected "
                    "one kind"
                )

    def units(self, dataset: Dataset) -> np.ndarray:
        """Return the unit of each image, str [n]: its patient, or patient and value of the unit's column.

        An image without a value is a unit of its own.

        Args:
            dataset: Images of one of the task's sets.
        """
        groups = np.asarray(dataset.groups, str)
        if self.aggregation is None or self.aggregation.unit == PATIENT:
            return groups
        values = np.asarray(dataset.columns[self.aggregation.unit], str)
        alone = np.asarray([identity.is_missing(value) for value in values.tolist()])
        rows = np.arange(len(values)).astype(str)
        own = np.where(alone, np.char.add("row ", rows), np.char.add("unit ", values))
        return np.char.add(np.char.add(groups, "/"), own)

    def _check_units(self, aggregation: Aggregation) -> None:
        """Refuse a unit that the sets lack or whose images disagree, and a rule that does not apply."""
        where = f"tasks.{self.name}"
        development = self.development
        if self.is_segmentation != (aggregation.rule == PIXELS):
            raise UserError(
                f"{where}.aggregate is {aggregation.rule!r} for a task of "
                f"{'masks' if self.is_segmentation else 'classes'}; expected none"
            )
        if aggregation.rule == "max" and len(development.classes) > 2 and not development.multi_label:
            raise UserError(
                f"{where}.aggregate=max takes the second of two classes; expected mean or vote for "
                f"{len(development.classes)}"
            )
        for split, dataset in self.datasets.items():
            if aggregation.unit != PATIENT and aggregation.unit not in dataset.columns:
                choice = nearest(aggregation.unit, (PATIENT, *dataset.columns))
                raise UserError(f"{where}.unit: {split} has no column {aggregation.unit!r}; {choice}")
            if self.is_segmentation:
                continue
            try:
                Units.of(self.units(dataset)).labels(dataset.truth, len(dataset.classes))
            except UserError as error:
                raise UserError(f"{where}.unit: {split}: {aggregation.unit} {error}") from error

    def check_order_not_needed(self) -> None:
        """Refuse units that are of the second of two classes, whose order nobody has given.

        Without `classes` names are in alphabetical order, in which `normal` follows `malignant`.

        Raises:
            UserError: `max` aggregates exclusive classes, or a unit has images of both.
        """
        aggregation, classes = self.aggregation, self.development.classes
        if aggregation is None or self.is_segmentation or self.development.multi_label or len(classes) != 2:
            return
        mixed = []
        for split, dataset in self.datasets.items():
            units = Units.of(self.units(dataset))
            mixed += [f"{str(units.names[unit])!r} of {split}" for unit in units.mixed(dataset.labels)]
        why = "aggregate=max takes one of two classes"
        if mixed:
            why = (
                f"unit={aggregation.unit}: {len(mixed)} units have images of both classes, first: {mixed[0]}"
            )
        elif aggregation.rule != "max":
            return
        a, b = classes
        raise UserError(
            f"tasks.{self.name}.{why}; expected "
            f"classes=({b!r}, {a!r}) or classes=({a!r}, {b!r}) in each of its sets: one image of the second class is "
            "enough for a unit of it"
        )

    @property
    def is_segmentation(self) -> bool:
        """Whether it is a segmentation task."""
        return bool(self.development.segments)

    @property
    def datasets(self) -> dict[str, Dataset]:
        """All images: development, and those held out by split name."""
        return {"development": self.development, **self.held_out}

    @property
    def distance_unit(self) -> str:
        """Unit of distances between masks: mm if all files define their spacing, else px of the files."""
        return "mm" if all(data.spacing is not None for data in self.datasets.values()) else "px"

    def folds(self, number: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return training and scored rows of each fold; near-duplicates and patients are not split.

        A task with official splits has one: all training rows, and the validation rows if there are any.

        Args:
            number: Number of folds.
            seed: Seed of the run, which `split_seed` overrides.
        """
        if self.official:
            return [(np.arange(len(self.official[0])), self.scored_rows)]
        groups = near_duplicates.merged(self.development).groups
        return grouped_folds(self.development.labels, groups, number, self._seed(seed))

    def inner_folds(
        self, splits: Sequence[np.ndarray], choices: int, seed: int
    ) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Return inner folds of the training rows of each fold: rows to fit on and rows to validate on.

        They are `INNER_FOLDS` of patients, divided as the folds are; fewer where a fold trains on fewer
        patients, of all folds the same number; none where there is nothing to choose. An official validation
        split is the one to validate on.

        Args:
            splits: Training rows of each fold.
            choices: Number of strengths that they choose among.
            seed: Seed of the run, which `split_seed` overrides.

        Raises:
            UserError: A fold trains on a single patient.
        """
        if choices == 1:
            return [[] for _ in splits]
        if len(self.official) > 1:
            return [[(rows, self.scored_rows)] for rows in splits]
        groups = near_duplicates.merged(self.development).groups
        fewest = min(len(np.unique(groups[rows])) for rows in splits)
        if fewest < 2:
            raise UserError(
                f"task {self.name!r}: a fold trains on 1 patient, whose images cannot choose "
                "transfer.head.strengths; expected 2 or more patients, or a single strength"
            )
        labels = self.development.labels
        return [
            [
                (rows[fit], rows[held])
                for fit, held in grouped_folds(
                    labels[rows], groups[rows], min(INNER_FOLDS, fewest), self._seed(seed)
                )
            ]
            for rows in splits
        ]

    def inner_split(self, rows: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows to fit on, and rows to watch: the validation split, or a fraction of a fold's by patient.

        Args:
            rows: Training rows of the fold.
            fraction: Share of them to hold out where there is no official validation split.
            seed: Seed of the run, which `split_seed` overrides.
        """
        if len(self.official) > 1:
            return rows, self.scored_rows
        groups = near_duplicates.merged(self.development).groups[rows]
        fit, validation = grouped_holdout(self.development.labels[rows], groups, fraction, self._seed(seed))
        return rows[fit], rows[validation]

    def watched_split(self, rows: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of `inner_split`; all rows, and none to watch, where there is nothing to hold out."""
        if not fraction and len(self.official) < 2:
            return rows, np.arange(0)
        return self.inner_split(rows, fraction, seed)

    def _seed(self, seed: int) -> int:
        return seed if self.split_seed is None else self.split_seed


def _segments(dataset: Dataset) -> str:
    kind = "overlapping segments" if dataset.overlapping else "the segments"
    return f"{kind} {', '.join(dataset.segments)}" if dataset.segments else "no segments"


@dataclasses.dataclass(frozen=True)
class ArmKey:
    """Leading keys of the lines of one arm in `results.jsonl`.

    Attributes:
        strategy: Name of the strategy, or what stands in its place.
        seed: Seed of the arm.
        init: Weights that it started from.
        model: Name of the encoder.
    """

    strategy: str
    seed: int
    init: str
    model: str


ResultRow = dict[str, str | int | float | list[str] | None]
"""A line of `results.jsonl`."""


def result_rows(
    task: Task, arm: ArmKey, protocol: str, names: tuple[str, ...], scores: dict[str, list[list[Score]]]
) -> Iterator[ResultRow]:
    """Yield lines for `results.jsonl`: the mean of each score over the folds in which it is defined.

    Args:
        task: The task.
        arm: The arm whose scores they are.
        protocol: How the encoder was used.
        names: Names of the classes, in their order.
        scores: Scores of each fold by split; of the development images, those that a fold holds out, which
            are counted together. A split without scores has no line.
    """
    for split, folds in scores.items():
        for of_folds in zip(*folds, strict=True):
            values = [score.value for score in of_folds if not np.isnan(score.value)]
            covered = set.intersection(*(set(score.classes) for score in of_folds))
            n = sum(score.n for score in of_folds) if split == "development" else of_folds[0].n
            yield {
                **dataclasses.asdict(arm),
                "task": task.name,
                "split": split,
                "protocol": protocol,
                "metric": of_folds[0].metric,
                "value": float(np.mean(values)) if values else None,
                "n": n,
                "classes": [name for name in names if name in covered],
                **({"unit": task.distance_unit} if lookup(of_folds[0].metric).is_distance else {}),
            }
