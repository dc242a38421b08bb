"""What a study would read, without training: the mode `data`."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from dapt_jax.data import facts, file_crops, stalls
from dapt_jax.data.augment import Augment
from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError, one_line
from dapt_jax.report import data_page
from dapt_jax.report.data_page import SetView, Tile
from dapt_jax.runtime import streams
from dapt_jax.settings import StudySettings
from dapt_jax.settings.training import FINETUNE
from dapt_jax.statistics import too_few_seeds
from dapt_jax.study import leakage, prepare, samples, strategies
from dapt_jax.study.arms import Study
from dapt_jax.study.prepare import NamedSet, ReadSet

PER_KIND, MOST_SAMPLED = 32, 384
"""Images of each class and of each source, and of a set in all, whose pixels its histograms count."""
_SEED = 0


def run(settings: StudySettings, workdir: Path | None) -> None:
    """Print a table for each set of a study, and write `data.html` into the workdir, if there is one.

    Sets are read as `prepare` reads them. A set that is refused does not hide the others: everything that
    can be read is shown before the study's error line is raised. Weights are not read.

    Args:
        settings: Settings of the study.
        workdir: Folder of the page.

    Raises:
        UserError: The study would refuse its data, and with this line; or the settings do not say what sets
            it has.
    """
    with stalls.told(settings.data.stall_s, lambda line: streams.say(line, file=sys.stderr)):
        settings = strategies.expanded(settings)
        encoder = settings.model.encoder()
        resolved = tuple(strategies.resolve(name, encoder, settings) for name in settings.strategies)
        named_sets = prepare.named_sets(settings, resolved)
        loaded, refused = _read(settings, named_sets)
        together = _between(settings, loaded, Study(settings, resolved))
        views = [_view(settings, named, loaded.get(named), refused.get(named, "")) for named in named_sets]
    refusals = [*refused.values(), *together.refusals]
    leaks = together.leaks + (f", and {len(refused)} refused sets are not compared" if refused else "")
    _print(views, leaks, together.warnings, refusals)
    if workdir is not None:
        path = workdir / "data.html"
        title = settings.title or settings.name
        data_page.write(path, title, views, leaks, together.warnings, refusals)
        streams.say(f"page: {path}")
    if refusals:
        raise UserError(refusals[0])


def _read(
    settings: StudySettings, named_sets: list[NamedSet]
) -> tuple[dict[NamedSet, ReadSet], dict[NamedSet, str]]:
    """Return the sets that can be read, and the error line of each that cannot."""
    loaded, refused = dict[NamedSet, ReadSet](), dict[NamedSet, str]()
    for named in named_sets:
        try:
            loaded[named] = prepare.read_set(settings, named)
        except UserError as error:
            refused[named] = str(error)
    return loaded, refused


@dataclasses.dataclass
class _Together:
    """What a study says of its sets together.

    Attributes:
        leaks: What was found of images and patients in two sets.
        warnings: Warnings, one line each.
        refusals: Error lines.
    """

    leaks: str
    warnings: list[str] = dataclasses.field(default_factory=list)
    refusals: list[str] = dataclasses.field(default_factory=list)


def _between(settings: StudySettings, loaded: dict[NamedSet, ReadSet], study: Study) -> _Together:
    """Compare the sets that were read, and check them against the settings.

    Args:
        settings: Settings of the study.
        loaded: The sets that were read.
        study: The study without sets.
    """
    found = _Together("no image and no patient is in two sets")
    tasks = []
    for name in settings.tasks:
        if any(named.task == name and named.is_trained_on for named in loaded):
            try:
                tasks.append(prepare.task_of(settings, loaded, name))
            except UserError as error:
                found.refusals.append(str(error))
    try:
        apart = leakage.resolve(tasks, prepare.corpora_of(loaded), settings.data.leaks)
    except UserError as error:
        found.leaks = "refused, see below"
        found.refusals.append(str(error))
        return found
    if apart.notes:
        found.leaks = "allowed by data.leaks, see the warnings"
    found.warnings += apart.notes + prepare.different_scales(apart.tasks)
    if settings.tasks and (line := too_few_seeds(len(settings.seeds))):
        found.warnings.append(line)
    for task in apart.tasks:
        try:
            found.warnings += prepare.check_folds(settings, task)
        except UserError as error:
            found.refusals.append(str(error))
    is_whole = len(loaded) == len(prepare.named_sets(settings, study.strategies))
    if is_whole and not found.refusals:
        try:
            prepare.check_study(dataclasses.replace(study, corpora=apart.corpora, tasks=apart.tasks))
        except UserError as error:
            found.refusals.append(str(error))
    return found


def _view(settings: StudySettings, named: NamedSet, read: ReadSet | None, refusal: str) -> SetView:
    """Return what is shown of a set."""
    if read is None:
        return SetView(named.title, refusal=refusal)
    dataset = read.dataset
    sampled = _sampled_rows(dataset)
    augment, by = _augment(settings, named, dataset)
    shown = {**facts.of_set(dataset), **_folds(settings, named, dataset)}
    shown["augmentation"] = by
    by_class = {
        name: np.intersect1d(np.flatnonzero(facts.has_class(dataset, column)), sampled)
        for column, name in enumerate(dataset.classes)
    }
    by_source = {name: np.intersect1d(rows, sampled) for name, rows in facts.sources_of(dataset).items()}
    return SetView(
        named.title,
        facts=shown,
        warnings=[line.removeprefix(f"{named.title}: ") for line in read.warnings],
        tiles=_tiles(dataset, augment, settings.seeds[0]),
        sampled=len(sampled),
        by_class=_histograms(dataset, by_class),
        by_source=_histograms(dataset, by_source),
        whole=facts.luminance_counts(dataset.images[row] for row in sampled),
    )


def _folds(settings: StudySettings, named: NamedSet, dataset: Dataset) -> dict[str, str]:
    """Return how a study divides a set."""
    if named.corpus is not None:
        fraction = settings.corpus_named(named.corpus).val_fraction
        return {"held out": f"{fraction:.0%} of the images, by patient" if fraction else "nothing"}
    if not named.is_divided:
        return {}
    try:
        task = prepare.task_of(settings, {named: ReadSet(dataset, "", [])}, named.task)
        folds = task.folds(settings.transfer_of(named.task).folds, settings.seeds[0])
    except UserError as error:
        return {"folds": f"refused: {error}"}
    held = [len(rows) for _, rows in folds]
    lines = [f"{len(folds)}, by patient, of {min(held):,} to {max(held):,} held-out images"]
    if not dataset.segments:
        for column, name in enumerate(dataset.classes):
            has = facts.has_class(dataset, column)
            counts = [int(has[rows].sum()) for _, rows in folds]
            lines.append(f"{name}: {min(counts):,} to {max(counts):,} held out per fold")
    return {"folds": "\n".join(lines)}


def _augment(settings: StudySettings, named: NamedSet, dataset: Dataset) -> tuple[Augment | None, str]:
    """Return the augmentation that a study applies to the images of a set, and the setting that says so."""
    transfer = settings.transfer_of(named.task)
    if named.corpus is not None:
        augment, where = settings.adapt.augment, "adapt.augment"
    elif not named.is_trained_on:
        return None, "none: the set is only scored"
    elif dataset.segments:
        augment, where = transfer.segmentation.augment, "transfer.segmentation.augment"
    elif FINETUNE in transfer.protocols:
        augment, where = transfer.finetune.augment, "transfer.finetune.augment"
    else:
        return None, "none: heads train on features of the images as they are"
    if augment.is_identity:
        return None, f"none: {where} changes nothing"
    changed = {name: value for name, value in vars(augment).items() if value != getattr(Augment(), name)}
    return augment, f"{where}: " + ", ".join(f"{name}={value}" for name, value in changed.items())


def _sampled_rows(dataset: Dataset) -> np.ndarray:
    """Return the rows that histograms count: some of each class and of each source, int64 [k]."""
    rng = np.random.default_rng(_SEED)
    kinds = [np.flatnonzero(facts.has_class(dataset, column)) for column in range(len(dataset.classes))]
    kinds += [*facts.sources_of(dataset).values(), np.arange(len(dataset))]
    chosen = [rng.permutation(rows)[:PER_KIND] for rows in kinds]
    found: np.ndarray = np.unique(np.concatenate(chosen))
    return np.sort(rng.permutation(found)[:MOST_SAMPLED])


def _tiles(dataset: Dataset, augment: Augment | None, seed: int) -> list[Tile]:
    """Return images of a set as the network sees them, each with its first augmented view and its masks."""
    rows = samples.sheet_rows(dataset)
    images = dataset.images.batch(rows)
    masks = dataset.targets[rows] if dataset.segments else None
    views: list[np.ndarray | None] = [None] * len(rows)
    view_masks = views
    is_cut = (
        augment is not None and augment.crop_from and (masks is not None or not dataset.images.is_of_files)
    )
    if augment is not None and augment.patch <= dataset.images.size and not is_cut:
        moved = np.asarray(augment(file_crops.batch(dataset.images, augment, rows, seed, 0), seed, 0, rows))
        views = list(np.rint(moved).clip(0, 255).astype(np.uint8))
        view_masks = (
            list(np.asarray(augment.masks(masks, seed, 0, rows))) if masks is not None else view_masks
        )
    unnamed = facts.unnamed(dataset)
    tiles = []
    for place, row in enumerate(rows):
        regions = {} if masks is None else facts.regions(dataset, masks[place])
        view_mask = view_masks[place]
        labels = [
            name for column, name in enumerate(dataset.classes) if facts.has_class(dataset, column)[row]
        ]
        tiles.append(
            Tile(
                name=Path(dataset.images.names[row]).name,
                label=", ".join(labels),
                patient="" if unnamed[row] else str(dataset.groups[row]),
                image=images[place],
                regions=regions,
                augmented=views[place],
                augmented_regions={} if view_mask is None else facts.regions(dataset, view_mask),
            )
        )
    return tiles


def _histograms(dataset: Dataset, rows_of: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return counts of grey values by name, without those of no image."""
    return {
        name: facts.luminance_counts(dataset.images[row] for row in rows)
        for name, rows in rows_of.items()
        if len(rows)
    }


def _print(views: list[SetView], leaks: str, warnings: list[str], refusals: list[str]) -> None:
    """Print a table of each set, then what the study says of all of them."""
    console = Console(width=None if Console().is_terminal else 150, markup=False, emoji=False)
    for view in views:
        table = Table(title=view.title, title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for heading, text in view.facts.items():
            table.add_row(heading, "\n".join(map(one_line, text.split("\n"))))
        for line in view.warnings:
            table.add_row("warning", one_line(line))
        if view.refusal:
            table.add_row("refused", one_line(view.refusal))
        console.print(table)
    streams.say(f"leaks: {leaks}")
    for line in warnings:
        streams.say(f"warning: {line}")
    for line in refusals:
        streams.say(f"refused: {line}")
