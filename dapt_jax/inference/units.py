"""Predictions of patients or volumes: a study's aggregation, applied to the images of each."""

import csv
import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float, Int

from dapt_jax.data import folders, identity, lists
from dapt_jax.errors import UserError
from dapt_jax.inference import results
from dapt_jax.runtime import atomic_files
from dapt_jax.statistics import PATIENT, Units

Name = TypeVar("Name", str, tuple[str, ...])

IMAGES = "images"
"""Column with the number of images of a unit."""
INDEX = re.compile(r"\[(\d+)\]$")
"""Selection of a slice of a file: `scan.nii.gz[12]`."""


@dataclasses.dataclass(frozen=True)
class UnitRule:
    """What a study aggregates images to, how, and how its images name their patients.

    >>> str(UnitRule("patient", "mean"))
    'by patient (mean)'

    Attributes:
        unit: `patient`, or the column of a table whose values name a patient's units, such as its volumes.
        rule: Rule of `statistics.Aggregation`.
        column: Column of a table that names patients; empty for a column with a usual name.
        pattern: Regular expression whose first group is the patient in the path of an image; empty for none.
    """

    unit: str
    rule: str
    column: str = ""
    pattern: str = ""

    def __str__(self) -> str:
        return f"by {self.unit} ({self.rule})"


@dataclasses.dataclass(frozen=True)
class Naming:
    """Where the images of one place name their units.

    Attributes:
        patient: Column of a table; empty for none. A DICOM file without a patient there names its own.
        unit: Column of a table whose values name a patient's units; empty where patients are the units.
        pattern: Regular expression that finds the patient in a path; empty for none.
    """

    patient: str = ""
    unit: str = ""
    pattern: str = ""

    @property
    def columns(self) -> list[str]:
        """Columns of the results that name the unit of an image."""
        return [PATIENT, *([self.unit] if self.unit else [])]

    def patient_in(self, name: str) -> str:
        """Return the patient in the path of an image; empty without a pattern.

        Raises:
            UserError: The path does not match.
        """
        pattern = folders.patient_pattern(self.pattern)
        if pattern is None:
            return ""
        found = pattern.search(name)
        if found is None:
            raise UserError(f"{name}: the pattern of the study's patients, {self.pattern!r}, does not match")
        return identity.patient(found[1] or "")


def naming(rule: UnitRule, place: Path) -> Naming | str:
    """Return where the images of a place name their units, or in words why they cannot.

    Args:
        rule: What the study aggregates to.
        place: A table (with the suffix of one), or a folder or file of images.

    Raises:
        UserError: Several columns of the table may name the patients.
    """
    own = rule.column if rule.unit == PATIENT or rule.column else ""
    needed = [name for name in (own, "" if rule.unit == PATIENT else rule.unit) if name]
    if place.suffix.lower() not in lists.TABLES or not place.is_file():
        if needed:
            return f"{place} is no table, which alone can have the column {needed[-1]!r}"
        return Naming(pattern=rule.pattern)
    header = lists.header(place)
    found = {}
    for name in needed:
        columns = identity.column(name, header)
        if len(columns) != 1:
            return f"{place} has no column {name!r}"
        found[name] = columns[0]
    patient = found[own] if own else _patients(place, header)
    return Naming(patient, "" if rule.unit == PATIENT else found[rule.unit])


def _patients(table: Path, header: Sequence[str]) -> str:
    """Return the column of patients by its usual names; empty without one."""
    candidates = identity.patient_columns(header)
    if PATIENT in candidates:
        return PATIENT
    named = [name for name in candidates if not _names_two_states(table, name)]
    if len(named) > 1:
        raise UserError(
            f"{table}: columns {named[0]!r} and {named[1]!r} may both name patients; expected one of them, or "
            f"one called {PATIENT!r}"
        )
    return named[0] if named else ""


def _names_two_states(table: Path, column: str) -> bool:
    """Return whether a column holds states, such as "case" and "control"."""
    return all(identity.names_two_states([cell] * 3) for _, cell in lists.iterate(table, column, ()))


@dataclasses.dataclass(frozen=True, eq=False)
class UnitPredictions(Generic[Name]):
    """Predictions of patients or volumes.

    Attributes:
        names: Name of each unit, as given, in the order of their first images.
        probabilities: Aggregated probabilities, the mean over members before aggregation, float32
            [units, classes]; NaN for a unit without an image that can be read.
        spread: Standard deviation over members, of which each is aggregated alone, float32 [units, classes].
        images: Number of images that were aggregated, int [units].
    """

    names: tuple[Name, ...]
    probabilities: Float[np.ndarray, "units classes"]
    spread: Float[np.ndarray, "units classes"]
    images: Int[np.ndarray, " units"]


def aggregate(
    names: Iterable[Name],
    members: Float[np.ndarray, "n members classes"],
    rule: str,
    *,
    multi_label: bool,
) -> UnitPredictions[Name]:
    """Return the predictions of units as a study aggregates them: of the mean over members.

    >>> of = np.array([[[0.2, 0.8]], [[0.6, 0.4]], [[0.9, 0.1]]], np.float32)
    >>> found = aggregate(["a", "b", "a"], of, "mean", multi_label=False)
    >>> found.names, found.probabilities[:, 1].round(2).tolist(), found.images.tolist()
    (('a', 'b'), [0.45, 0.4], [2, 1])

    Args:
        names: Unit of each image.
        members: Probabilities by each member; NaN for images that cannot be read.
        rule: Rule of `statistics.Aggregation`.
        multi_label: Whether an image may have several classes.
    """
    places: dict[Name, int] = {}
    of = np.array([places.setdefault(name, len(places)) for name in names], np.int64)
    is_read = np.isfinite(members[:, 0, 0])
    units = Units.of(of[is_read])
    one = [members[is_read, member] for member in range(members.shape[1])]
    shape = len(places), members.shape[2]
    mean, spread = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    if is_read.any():
        together = (sum(one[1:], one[0]) / np.float32(len(one))).astype(np.float32)
        every = [units.probabilities(each, rule, multi_label) for each in one]
        mean[units.names] = units.probabilities(together, rule, multi_label)
        spread[units.names] = np.std(every, 0, dtype=np.float32)
    return UnitPredictions(tuple(places), mean, spread, np.bincount(of[is_read], minlength=len(places)))


class MemberFile:
    """Probabilities by each member, image by image, behind a CSV that grows: what units are made of.

    Attributes:
        path: The file: float32 [n, members, classes], little-endian, without a header.
        shape: Members and classes.
    """

    def __init__(self, path: Path, members: int, classes: int):
        """Open the file, or make it."""
        self.path, self.shape = path, (members, classes)
        path.touch()

    @property
    def _bytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1]

    def keep(self, images: int) -> None:
        """Remove what follows the first images.

        Raises:
            UserError: There are fewer.
        """
        if self.path.stat().st_size < images * self._bytes:
            raise UserError(
                f"{self.path}: has fewer than the {images} images of the table beside it; expected another --workdir"
            )
        with self.path.open("r+b") as file:
            file.truncate(images * self._bytes)

    def append(self, probabilities: Float[np.ndarray, "k members classes"]) -> None:
        """Append images."""
        with self.path.open("ab") as file:
            file.write(np.ascontiguousarray(probabilities, "<f4").tobytes())

    def read(self) -> Float[np.ndarray, "n members classes"]:
        """Return all images, mapped from the file."""
        return np.memmap(self.path, "<f4", "r").reshape(-1, *self.shape)


def write(
    path: Path,
    table: Path,
    members: MemberFile,
    naming: Naming,
    classes: Sequence[str],
    rule: str,
    *,
    multi_label: bool,
) -> int:
    """Write the predictions of units, and return their number; write none where no image names its unit.

    An image without a patient is of the patient of its own, as are all slices of its file; without a value of
    `naming.unit` it is a unit of its own.

    Args:
        path: The CSV.
        table: The CSV of images, whose columns `naming.columns` follow the name of each image.
        members: Probabilities of the same images.
        naming: Where images name their units.
        classes: Names of the classes.
        rule: Rule of `statistics.Aggregation`.
        multi_label: Whether an image may have several classes.
    """
    found = aggregate(_keys(table, len(naming.columns)), members.read(), rule, multi_label=multi_label)
    if not any(name[-1] for name in found.names) and found.images.max(initial=0) <= 1:
        return 0
    several = members.shape[0] > 1
    header = [*naming.columns, IMAGES, *results.class_header(classes, spreads=several)]
    with atomic_files.replacing(path) as file:
        file.write(results.line(list(map(results.text_cell, header))))
        for name, values, spread, count in zip(
            found.names, found.probabilities, found.spread, found.images.tolist(), strict=True
        ):
            cells = results.class_cells(classes, values, spread if several else (), multi_label=multi_label)
            file.write(results.line([*name[: len(naming.columns)], str(count), *cells]))
    return len(found.names)


def _keys(table: Path, columns: int) -> Iterator[tuple[str, ...]]:
    """Yield the unit of each row of a CSV of images, as cells: patient, unit if any, and what tells it apart.

    The last one is "" for a patient that no image names.
    """
    with table.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        next(rows)
        for number, (image, patient, *more) in enumerate(rows):
            named = [patient or INDEX.sub("", image), *more[: columns - 1]]
            alone = f"row {number}" if columns > 1 and identity.is_missing(named[1]) else ""
            yield (*named, alone, "named" if patient else "")
