"""Leakage checks: no image and no patient may occur both in training and in evaluation.

Sets of a study are compared by file, by content (bytes, and decoded pixels), by look (thumbnails) and by
patient, whatever folder or table they come from. The setting `data.leaks` determines the handling of
leaks: see `resolve`.
"""

import csv
import hashlib
import io
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dapt_jax.data import identity, near_duplicates
from dapt_jax.data.concatenate import COHORT, without_cohort
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.lists import read_columns
from dapt_jax.data.paths import true_path
from dapt_jax.data.plane import Plane, file_of, plane
from dapt_jax.data.records import patient_of_file
from dapt_jax.errors import UserError, nearest
from dapt_jax.runtime import home
from dapt_jax.settings.schema import ON_LEAK
from dapt_jax.study.stated import StatedImages
from dapt_jax.study.tasks import Task

ERROR, DROP_TRAIN, DROP_EVAL, MARK = ON_LEAK
DISTINCT = "distinct"
CORRELATION = 0.99
"""Least correlation of one picture's thumbnails in two sets; docs/data_sets.md says what was measured."""
_FILE, _CONTENT, _LOOK, _PATIENT = ("file", "content", "look", "patient")
_COLUMNS = ("kind", "set_a", "image_a", "set_b", "image_b", "patient", "decision")
_SPLIT_ORDER = ("development", "train", "val", "test", "external")


@dataclass(frozen=True)
class Leak:
    """One image or patient in two sets.

    Attributes:
        kind: Kind of match: "file", "content", "look" or "patient".
        set_a: The set that is nearer to training: a corpus, then development, test, external.
        set_b: The other set.
        rows_a: Rows of the image, or of all images of the patient, in `set_a`.
        rows_b: Rows in `set_b`.
        patient: Name of the patient in `set_a`; "" for an image.
    """

    kind: str
    set_a: str
    set_b: str
    rows_a: tuple[int, ...]
    rows_b: tuple[int, ...]
    patient: str = ""


@dataclass(frozen=True)
class Outcome:
    """The sets of a study after the handling of leaks between them.

    Attributes:
        tasks: Tasks without dropped images.
        corpora: Corpora without dropped images.
        notes: One line for each leak found and its handling.
        marks: For each task, the splits whose scores are of images or patients that were seen, and how many:
            for the report.
    """

    tasks: tuple[Task, ...]
    corpora: dict[str, Dataset]
    notes: list[str] = field(default_factory=list)
    marks: dict[str, dict[str, str]] = field(default_factory=dict)


def resolve(tasks: Sequence[Task], corpora: Mapping[str, Dataset], policy: str = ERROR) -> Outcome:
    """Find leaks between sets that must be disjoint, and refuse, drop or mark them.

    Args:
        tasks: Tasks of the study.
        corpora: Corpora by name; the main corpus has the empty name.
        policy: "error" refuses; "drop_train" drops images, and all others of their named patients, from the
            set that is nearer to training (a corpus, then development, test, external), "drop_eval" from the
            other; "mark" keeps them and marks every table; anything else is the path of a CSV list, written
            with all that is found where there is none, in whose column `decision` each row gets
            "drop_train", "drop_eval", "mark" or "distinct" (no leak).

    Raises:
        UserError: A leak was found that the policy does not handle, or a set becomes empty.
    """
    sets: dict[str, Dataset] = {name or "corpus": corpus for name, corpus in corpora.items()}
    sets |= {f"{task.name} {split}": dataset for task in tasks for split, dataset in task.parts.items()}
    found: list[Leak] = []
    for task in tasks:
        splits = sorted(task.parts, key=_SPLIT_ORDER.index)
        names = [*(name or "corpus" for name in corpora), *(f"{task.name} {split}" for split in splits)]
        for a, b in itertools.combinations(names, 2):
            if any(isinstance(sets[name].images, StatedImages) for name in (a, b)):
                continue  # of a plan, whose sets are not here
            if len({a, b} & {name or "corpus" for name in corpora}) < 2:  # no arm sees two corpora
                found += between(sets[a], sets[b], a, b)
    if not found:
        return Outcome(tuple(tasks), dict(corpora))
    decisions = _decisions(found, sets, policy)
    left = _without(sets, decisions)
    marked = [leak for leak, decision in decisions if decision == MARK]
    outcome = Outcome(
        tuple(
            task.with_parts({split: left[f"{task.name} {split}"] for split in task.parts}) for task in tasks
        ),
        {name: left[name or "corpus"] for name in corpora},
        _notes(decisions, sets, left),
    )
    for task in tasks:
        for split in task.parts:
            touched = [leak for leak in marked if leak.set_b == f"{task.name} {split}"]
            if touched:
                outcome.marks.setdefault(task.name, {})[split] = "; ".join(_counts(touched))
    return outcome


def between(a: Dataset, b: Dataset, name_a: str, name_b: str) -> list[Leak]:
    """Return the images, then the patients, that are in two sets."""
    pairs: dict[tuple[int, int], str] = {}
    for kind, keys in (
        (_FILE, (_files(a), _files(b))),
        (_CONTENT, _contents(a, b)),
        (_CONTENT, (_digests(a), _digests(b))),
    ):
        for pair in _matches(*keys):
            pairs.setdefault(pair, kind)
    for pair in near_duplicates.duplicates(a, b, CORRELATION):
        pairs.setdefault(pair, _LOOK)
    leaks = [Leak(kind, name_a, name_b, (i,), (j,)) for (i, j), kind in sorted(pairs.items())]
    if a.cohort and b.cohort and a.cohort != b.cohort:
        return leaks
    people_a, people_b = patients(a), patients(b)
    for key in people_a.keys() & people_b.keys():
        (name, rows_a), (_, rows_b) = people_a[key], people_b[key]
        rows_a, rows_b = _of_one_cohort(rows_a, a, rows_b, b), _of_one_cohort(rows_b, b, rows_a, a)
        if rows_a and rows_b:
            leaks.append(Leak(_PATIENT, name_a, name_b, rows_a, rows_b, name))
    return sorted(leaks, key=lambda leak: (leak.kind == _PATIENT, leak.patient, leak.rows_a, leak.rows_b))


def patients(dataset: Dataset) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the name and the images of every named patient, by a key in which spellings of one name are
    alike.

    Names are those of the set's groups and, of DICOM files, of their PatientID.
    """
    found: dict[str, tuple[str, list[int]]] = {}
    cohorts = _cohorts(dataset)
    for row, (group, own) in enumerate(zip(dataset.groups.tolist(), dataset.images.names, strict=True)):
        source = dataset.images.source(row)
        group = without_cohort(group, cohorts[row])
        names = {group} - {own, str(file_of(source)) if source else own}
        if source and (inside := patient_of_file(file_of(source))):
            names.add(inside)
        for key, name in {identity.spelling(name): name for name in sorted(names)}.items():
            found.setdefault(key, (name, []))[1].append(row)
    return {key: (name, tuple(rows)) for key, (name, rows) in found.items()}


def _cohorts(dataset: Dataset) -> list[str]:
    """Return the cohort of each image; a set made of several sources may have several."""
    if dataset.cohort or COHORT not in dataset.columns:
        return [dataset.cohort] * len(dataset)
    return list(dataset.columns[COHORT].tolist())


def _of_one_cohort(
    rows: tuple[int, ...], dataset: Dataset, others: tuple[int, ...], other: Dataset
) -> tuple[int, ...]:
    """Return the rows whose cohort is one of the other rows', or not known on either side."""
    own, there = _cohorts(dataset), _cohorts(other)
    known = {there[row] for row in others}
    return tuple(row for row in rows if not own[row] or "" in known or own[row] in known)


def _matches(keys_a: Iterable[object], keys_b: Iterable[object]) -> Iterable[tuple[int, int]]:
    """Return pairs of rows with equal keys; a key of None matches nothing."""
    rows: dict[object, list[int]] = defaultdict(list)
    for row, key in enumerate(keys_a):
        if key is not None:
            rows[key].append(row)
    return [(i, j) for j, key in enumerate(keys_b) if key is not None for i in rows.get(key, ())]


def _files(dataset: Dataset) -> list[object]:
    """Return a canonical name of each file and image in it; images in memory keep their names."""
    sources = [dataset.images.source(row) for row in range(len(dataset))]
    return [
        (true_path(file_of(source)), *_place(source)) if source else name
        for source, name in zip(sources, dataset.images.names, strict=True)
    ]


def _place(source: str | Path | Plane) -> tuple[int | None, int, str]:
    found = plane(source)
    return found.index, found.axis, found.key


def _digests(dataset: Dataset) -> list[object]:
    seen = near_duplicates.looks(dataset.images)
    framing = dataset.images.framing
    return [
        None if flat else (digest, framing)
        for flat, digest in zip(seen.flat, seen.digests.tolist(), strict=True)
    ]


def _contents(a: Dataset, b: Dataset) -> tuple[list[object], list[object]]:
    """Return hashes of file contents, read only where files of both sets have equal length."""
    lengths = [[_length(dataset, row) for row in range(len(dataset))] for dataset in (a, b)]
    both = {length for length in lengths[0] if length} & {length for length in lengths[1] if length}
    hashes: dict[Path, bytes] = {}

    def content(dataset: Dataset, row: int, length: int) -> object:
        source = dataset.images.source(row)
        if source is None or length not in both:
            return None
        file = file_of(source)
        if file not in hashes:
            with file.open("rb") as opened:
                hashes[file] = hashlib.file_digest(opened, "blake2b").digest()
        return hashes[file], *_place(source)

    keys = [
        [content(dataset, row, length) for row, length in enumerate(of_set)]
        for dataset, of_set in zip((a, b), lengths, strict=True)
    ]
    return keys[0], keys[1]


def _length(dataset: Dataset, row: int) -> int:
    source = dataset.images.source(row)
    return os.path.getsize(file_of(source)) if source else 0


def _decisions(found: Sequence[Leak], sets: Mapping[str, Dataset], policy: str) -> list[tuple[Leak, str]]:
    """Return the decision for each leak."""
    if policy == ERROR:
        raise UserError(
            f"{_all(found, sets)}; expected each on one side only: data.leaks='drop_train' drops them from "
            "the set nearer to "
            "training, 'drop_eval' from the other, 'mark' keeps them and marks every table, and "
            "data.leaks=LIST.csv lists "
            "them for you to decide; sets whose patients are others of the same names take different cohort"
        )
    if policy in ON_LEAK:
        return [(leak, policy) for leak in found]
    path = home.expanded(policy)
    rows = {_key(leak, sets): leak for leak in found}
    if not path.exists():
        _write(path, rows)
        raise UserError(
            f"{_all(found, sets)}; all are listed in {path}: fill in its column decision {_ways()}"
        )
    places, columns = read_columns(path, "list of leaks")
    if lacking := [name for name in _COLUMNS if name not in columns]:
        raise UserError(f"{path}: no column {lacking[0]!r}; expected the columns {', '.join(_COLUMNS)}")
    said = {}
    for row, place in enumerate(places):
        cells = {name: columns[name][row] for name in _COLUMNS}
        decision = cells["decision"].casefold()
        if decision and decision not in (*ON_LEAK[1:], DISTINCT):
            raise UserError(
                f"{path}: {place}: decision {decision!r}; {nearest(decision, (*ON_LEAK[1:], DISTINCT))}"
            )
        said[tuple(cells[name] for name in _COLUMNS[1:-1])] = decision
    decided = [(leak, said.get(key, "")) for key, leak in rows.items()]
    if open_ := [leak for leak, decision in decided if not decision]:
        absent = sum(key not in said for key in rows)
        more = f" ({absent} of them are not in the list; remove it to have it written anew)" if absent else ""
        raise UserError(f"{path}: no decision on {_all(open_, sets)}{more}; expected {_ways()}")
    return [(leak, decision) for leak, decision in decided if decision != DISTINCT]


def _ways() -> str:
    return f"({', '.join(ON_LEAK[1:])}, or {DISTINCT} for what is no leak)"


def _key(leak: Leak, sets: Mapping[str, Dataset]) -> tuple[str, ...]:
    images = (sets[leak.set_a].images.names[leak.rows_a[0]], sets[leak.set_b].images.names[leak.rows_b[0]])
    return tuple(map(identity.clean, (leak.set_a, images[0], leak.set_b, images[1], leak.patient)))


def _write(path: Path, rows: Mapping[tuple[str, ...], Leak]) -> None:
    """Write the list atomically, since several processes of a study may write it at once."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(_COLUMNS)
    writer.writerows([leak.kind, *key, ""] for key, leak in rows.items())
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text.getvalue(), encoding="utf-8", newline="")
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"data.leaks={path}: cannot be written ({error.strerror}); expected a path of your own"
        ) from error


def _dropped(decisions: Sequence[tuple[Leak, str]]) -> dict[str, list[int]]:
    """Return the rows of each set that are to be dropped, as the leaks name them."""
    gone: dict[str, set[int]] = defaultdict(set)
    for leak, decision in decisions:
        if decision == DROP_TRAIN:
            gone[leak.set_a] |= set(leak.rows_a)
        elif decision == DROP_EVAL:
            gone[leak.set_b] |= set(leak.rows_b)
    return {name: sorted(rows) for name, rows in gone.items()}


def _with_their_patients(dataset: Dataset, rows: Sequence[int]) -> np.ndarray:
    """Return rows and all others of the same named patients, or volumes: what no split divides, int [k].

    An image that is in two sets shows that its patient is, whatever the sets call the patient.
    """
    groups = near_duplicates.merged(dataset).groups
    named = [row for row in rows if dataset.groups[row] != dataset.images.names[row]]
    return np.union1d(rows, np.flatnonzero(np.isin(groups, groups[named])))


def _without(sets: Mapping[str, Dataset], decisions: Sequence[tuple[Leak, str]]) -> dict[str, Dataset]:
    gone = _dropped(decisions)
    left = {}
    for name, dataset in sets.items():
        rows = None
        if name in gone:
            rows = np.setdiff1d(np.arange(len(dataset)), _with_their_patients(dataset, gone[name]))
        if rows is not None and not len(rows):
            also = "" if len(gone[name]) == len(dataset) else ", or are of patients who are"
            raise UserError(
                f"{name}: all of its {len(dataset)} images are in other sets too{also}; nothing is left of it"
            )
        if rows is None:
            left[name] = dataset
        else:
            left[name] = dataset.take(rows)
            near_duplicates.remember(left[name].images, near_duplicates.looks(dataset.images).take(rows))
    return left


def _notes(
    decisions: Sequence[tuple[Leak, str]], sets: Mapping[str, Dataset], left: Mapping[str, Dataset]
) -> list[str]:
    lines = []
    if marked := [leak for leak, decision in decisions if decision == MARK]:
        lines.append(f"leaks kept, and marked in every table: {_all(marked, sets)}")
    if dropped := [leak for leak, decision in decisions if decision != MARK]:
        gone, fewer = _dropped(decisions), []
        for name in (name for name in sets if name in gone):
            rows, count = gone[name], len(sets[name]) - len(left[name])
            others = f" ({count - len(rows)} as others of the same patients)" if count > len(rows) else ""
            fewer.append(f"{count} images of {name}{others}")
        lines.append(f"leaks dropped: {', '.join(fewer)}, since {_all(dropped, sets)}")
    return lines


def _all(found: Sequence[Leak], sets: Mapping[str, Dataset]) -> str:
    """Return, for each pair of sets, the shared images and patients, with the first one's name."""
    pairs: dict[tuple[str, str, bool], list[Leak]] = defaultdict(list)
    for leak in found:
        pairs[leak.set_a, leak.set_b, leak.kind == _PATIENT].append(leak)
    parts = []
    for (a, b, are_patients), leaks in pairs.items():
        first = leaks[0]
        image_a, image_b = sets[a].images.names[first.rows_a[0]], sets[b].images.names[first.rows_b[0]]
        shown = image_a if image_a == image_b else f"{image_a} is {image_b}"
        count, how = _count(leaks)
        are = "is" if count.startswith("1 ") else "are"
        parts.append(
            f"{count} {are} in both {b} and {a}{how}, first: {first.patient if are_patients else shown}"
        )
    return "; ".join(parts)


def _counts(leaks: Sequence[Leak]) -> list[str]:
    """Return the number of images and patients, and the kinds of match."""
    images = [leak for leak in leaks if leak.kind != _PATIENT]
    people = [leak for leak in leaks if leak.kind == _PATIENT]
    return ["".join(_count(part)) for part in (images, people) if part]


def _count(leaks: Sequence[Leak]) -> tuple[str, str]:
    """Return the number of images, or patients, and the kinds of match."""
    if leaks[0].kind == _PATIENT:
        return f"{len(leaks)} patient{'s' * (len(leaks) > 1)}", ""
    count = len({(leak.set_b, leak.rows_b) for leak in leaks})
    kinds = Counter(leak.kind for leak in leaks)
    listed = ", ".join(f"by {kind} {kinds[kind]}" for kind in (_FILE, _CONTENT, _LOOK) if kinds[kind])
    return f"{count} image{'s' * (count > 1)}", f" ({listed})"
