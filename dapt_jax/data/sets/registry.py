"""Registry of public data sets: one entry per set, with one function from files to records."""

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from absl import logging

from dapt_jax.data import records
from dapt_jax.data.dataset import LABEL, Dataset, matching
from dapt_jax.data.decode import CACHE_BYTES
from dapt_jax.data.records import Record
from dapt_jax.data.tiles import Tiles
from dapt_jax.errors import UserError, nearest, nearest_beside

CLASSIFICATION, SEGMENTATION = "classification", "segmentation"
THREE_SPLITS = {"train": "train", "val": "val", "test": "test"}
TWO_SPLITS = {"train": "train", "test": "test"}
"""Official lists of most sets, see `file_set`."""


@dataclass(frozen=True)
class Entry:
    """A public data set.

    Attributes:
        kind: Name of the set in a config.
        title: Name of the set in the literature.
        recipe: How to obtain it, in one line.
        licence: Licence as stated on its page.
        size: Contents of the set.
        splits: Origin of its splits.
        checksum: Checksum of its splits, as computed by `checksum`, or of its files; "unknown" if
            unavailable.
        tasks: Tasks that it can be used for, the default first.
        load: The reader.
        options: Options of this reader only, with their defaults.
        official: Conditions that select the official lists, by split of a task; empty if there are none.
        classes: Published classes; empty if they are those of the records.
        multi_label: Whether an image can have several classes.
    """

    kind: str
    title: str
    recipe: str
    licence: str
    size: str
    splits: str
    tasks: tuple[str, ...]
    load: Callable[..., Dataset]
    options: Mapping[str, Any]
    checksum: str = "unknown"
    official: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    multi_label: bool = False


SETS: dict[str, Entry] = {}


def file_set(
    *,
    kind: str,
    title: str,
    recipe: str,
    licence: str,
    size: str,
    splits: str,
    layout: str,
    classes: Sequence[str] = (),
    tasks: tuple[str, ...] = (CLASSIFICATION,),
    multi_label: bool = False,
    segments: Sequence[str] | Callable[..., Sequence[str]] = (),
    overlapping: bool = False,
    counts: Mapping[str, int] | None = None,
    official: Mapping[str, str] | None = None,
    finish: Callable[..., Dataset] | None = None,
) -> Callable[[Callable[..., Iterable[Record]]], Callable[..., Iterable[Record]]]:
    """Register a set of files; the decorated function turns its rows into records.

    Args:
        kind: See `Entry`, as for `title`, `recipe`, `licence`, `size`, `splits` and `tasks`.
        title: See `Entry`.
        recipe: See `Entry`.
        licence: See `Entry`.
        size: See `Entry`.
        splits: See `Entry`.
        layout: Files expected below the folder, for the error if there are none.
        classes: The classes in order; () for all labels of the records, sorted.
        tasks: See `Entry`.
        multi_label: Whether records have `values`, one per class, instead of `labels`.
        segments: Names of the mask values, the background first; or a function of the reader's options.
        overlapping: Whether masks are bit fields, see `Dataset`.
        counts: Published number of images per split; other numbers cause a warning.
        official: Value of the column `split` for each split of a task, where the set has official lists: those
            that a task takes that names the set alone.
        finish: Function that completes the data set, given the reader's options.

    Returns:
        A decorator for `records(root, *, option=default, ...)`; its options become config keys in addition to
        those that all sets share.
    """

    def register(rows: Callable[..., Iterable[Record]]) -> Callable[..., Iterable[Record]]:
        own = [parameter for name, parameter in inspect.signature(rows).parameters.items() if name != "root"]

        def load(
            path: str | Path,
            *,
            image_size: int,
            task: str = tasks[0],
            where: str = "",
            classes: Sequence[str] = (),
            drop_classes: Sequence[str] = (),
            crop: int | None = None,
            resize: str = "squash",
            checksum: str = "",
            on_bad_image: str = "error",
            cache_bytes: int = CACHE_BYTES,
            workers: int | None = None,
            tiles: Tiles | None = None,
            name: str = "",
            **options: Any,
        ) -> Dataset:
            root = Path(path)
            records.check_on_bad_image(on_bad_image)
            if task not in tasks:
                raise UserError(f"kind {kind!r} has no task {task!r}; {nearest(task, tasks)}")
            found = list(rows(_folder(root), **options))
            if not found:
                raise UserError(f"{root}: no images of {title}; expected {layout}")
            _check(found, root, kind, counts, checksum)
            found = _where(found, where, root, published)
            found, names = _classes(found, published, classes, drop_classes, str(root), multi_label)
            named = segments(**options) if callable(segments) else segments
            dataset = records.to_dataset(
                found,
                names,
                name=name or kind,
                origin=str(root),
                multi_label=multi_label,
                image_size=image_size,
                crop=crop,
                resize=resize,
                on_bad_image=on_bad_image,
                cache_bytes=cache_bytes,
                workers=workers,
                tiles=tiles,
                segments=named if task == SEGMENTATION else (),
                overlapping=overlapping,
            )
            return finish(dataset, **options) if finish else dataset

        published = tuple(classes)
        shared = list(inspect.signature(load).parameters.values())[:-1]
        if len(tasks) == 1:
            shared = [parameter for parameter in shared if parameter.name != "task"]
        load.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
        load.__doc__ = rows.__doc__
        options = {parameter.name: parameter.default for parameter in own}
        lists = {split: f"split={value}" for split, value in (official or {}).items()}
        SETS[kind] = Entry(
            kind,
            title,
            recipe,
            licence,
            size,
            splits,
            tasks,
            load,
            options,
            official=lists,
            classes=published,
            multi_label=multi_label,
        )
        return rows

    return register


def listing() -> str:
    """Return the sets as a table in Markdown, as in docs/data_sets.md."""
    lines = [
        "| kind | set | how to get it | licence | size | splits | their checksum | tasks | own options |",
        "|---" * 9 + "|",
    ]
    for kind, entry in sorted(SETS.items()):
        options = ", ".join(f"`{name}={default!r}`" for name, default in entry.options.items())
        tasks = ", ".join(entry.tasks)
        cells = (
            f"`{kind}`",
            entry.title,
            entry.recipe,
            entry.licence,
            entry.size,
            entry.splits,
            entry.checksum,
            tasks,
            options,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def checksum(found: Iterable[Record]) -> str:
    """Return a checksum of splits: SHA-256 over the sorted lines "split<tab>image".

    Images are named as in the source.

    Equal checksums mean the same images in the same splits, wherever the files are.
    """
    lines = sorted(f"{record.columns.get('split', '')}\t{record.written}\n" for record in found)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _folder(root: Path) -> Path:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; {nearest_beside(root, Path.is_dir)}")
    return root


def _check(
    found: Sequence[Record], root: Path, kind: str, counts: Mapping[str, int] | None, expected: str
) -> None:
    """Refuse patients in two splits and duplicate images, and compare the splits with the published ones."""
    places = [record.place for record in found]
    splits = [record.columns.get("split", "") for record in found]
    records.check_splits(places, [record.group for record in found], splits, "patient", str(root))
    records.check_once(found, str(root))
    digest = checksum(found)
    if expected and expected != digest:
        raise UserError(
            f"{root}: the checksum of its splits is {digest}, expected {expected}; other images or splits"
        )
    there = dict(Counter(splits))
    said = ", ".join(f"{split or 'no split'} {count:,}" for split, count in there.items())
    logging.info("%s: %s; checksum of splits %s", kind, said, digest)
    for split, count in (counts or {}).items():
        if there.get(split, count) != count:
            logging.warning("%s: %d images in split %r, %d were published", kind, there[split], split, count)


def _where(found: Sequence[Record], where: str, root: Path, classes: Sequence[str]) -> list[Record]:
    columns = {key: [record.columns[key] for record in found] for key in found[0].columns}
    if found[0].labels:
        columns[LABEL] = [record.labels[0] for record in found]
    elif LABEL in where:
        columns[LABEL] = [
            "|".join(name for name, value in zip(classes, record.values, strict=True) if value == 1)
            for record in found
        ]
    columns = columns or {"": [""] * len(found)}
    return [record for record, keep in zip(found, matching(columns, where, str(root)), strict=True) if keep]


def _classes(
    found: Sequence[Record],
    published: tuple[str, ...],
    wanted: Sequence[str],
    dropped: Sequence[str],
    origin: str,
    multi_label: bool,
) -> tuple[list[Record], tuple[str, ...]]:
    """Return the records and classes that remain of those published."""
    if not multi_label:
        left = records.drop(found, dropped, origin)
        return left, records.resolve_classes(
            left, wanted or [n for n in published if n not in dropped], origin
        )
    for name in (*wanted, *dropped):
        if name not in published:
            raise UserError(f"{origin}: no class {name!r}; {nearest(name, published)}")
    names = tuple(name for name in wanted or published if name not in dropped)
    columns = [published.index(name) for name in names]
    return [replace(record, values=tuple(record.values[c] for c in columns)) for record in found], names
