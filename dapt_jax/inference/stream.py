"""`mode=predict`: target models on images that are read, predicted and written batch by batch."""

import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dapt_jax.data import limits
from dapt_jax.data.plane import plane
from dapt_jax.errors import UserError
from dapt_jax.inference import inputs, predictor, results, target_model, units
from dapt_jax.inference.inputs import Batch, Read
from dapt_jax.inference.predictor import Ensemble, Outputs
from dapt_jax.inference.results import Table, VolumeMask
from dapt_jax.inference.units import MemberFile, Naming, UnitRule
from dapt_jax.runtime import atomic_files, home, streams
from dapt_jax.settings import StudySettings
from dapt_jax.settings.predict import PredictSettings

FOLDER, FILE, ABOUT, MASKS, OVERLAYS = "predict", "predictions.csv", "about.json", "masks", "overlays"
UNITS, MEMBERS = "units.csv", "members.f32"
CLAIMS = {
    "models": "by other target models",
    "images": "of other images",
    "calibrate": "with another predict.calibrate",
    "batch_size": "with another predict.batch_size",
}
"""What a folder of predictions is of, by key of its `about.json`."""
SAY_EVERY_S = 30.0


def run(settings: StudySettings, workdir: Path) -> Path:
    """Predict all images, and return `workdir/predict/predictions.csv`.

    The file has a row for each image in a fixed order, and grows batch by batch: the same command goes on
    where a kill stopped it, and ends with the same file. At most a few batches of images are in memory.

    Args:
        settings: Settings, of which the section `predict`, `data.on_bad_image`, `data.max_image_mb` and
            `data.threads` count; no data set of a study is read.
        workdir: Folder of the results; without `predict.model` also of the target models.

    Raises:
        UserError: No model, no image, an image that cannot be read or is unlike the training images, or the
            workdir holds predictions of others.
    """
    options = settings.predict
    limits.set_decoded_bytes(settings.data.max_image_mb << 20)
    if not options.images:
        raise UserError(
            "predict.images names no images; expected a folder, a file, or a CSV with a column image"
        )
    if not options.model and not (workdir / target_model.FOLDER).is_dir():
        raise UserError(
            f"predict.model names no target model, and {workdir} holds none; expected --config.predict.model="
            "RUN, the workdir of a study, a folder of target models, or one file"
        )
    ensemble = predictor.load(options.model or (workdir,), calibrate=options.calibrate).ensemble
    place = home.expanded(options.images)
    folder = workdir / FOLDER
    _claim(folder, ensemble, options, place)
    about = ensemble.about
    streams.say(
        f"predict: {ensemble.members} members of {'/'.join(about.family)}, "
        f"{', '.join(about.classes or about.segments)}"
    )
    naming = units.naming(about.units, place) if about.units else None
    named = naming if isinstance(naming, Naming) else None
    table = Table(folder / FILE, _header(ensemble, named))
    try:
        work = _Work(settings, ensemble, folder, table, place, named)
        work.run()
    finally:
        table.close()
    streams.say(f"predict: {table.path} ({work.said()})")
    if about.units:
        why = naming if isinstance(naming, str) else work.write_units(about.units)
        streams.say(f"predict: {why}")
    return table.path


def _claim(folder: Path, ensemble: Ensemble, options: PredictSettings, place: Path) -> None:
    """Refuse a folder that holds predictions by other models, of other images or with other options."""
    now = {
        "models": sorted(model.fingerprint for model in ensemble.models),
        "images": str(place.absolute()),
        "calibrate": options.calibrate,
        "batch_size": ensemble.batch_size(options.batch_size),
    }
    file, table = folder / ABOUT, folder / FILE
    if not results.has_rows(table):  # a command that ended before the first image claims nothing
        table.unlink(missing_ok=True)
    elif file.exists():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        before = {key: before.get(key) for key in now} if isinstance(before, dict) else {}
        for key, value in now.items():
            if before.get(key) != value:
                change = "" if key == "models" else f" ({_short(before.get(key))}, now {_short(value)})"
                raise UserError(
                    f"{folder} holds predictions {CLAIMS[key]}{change}; expected the same, or another --workdir"
                )
    atomic_files.write_text(file, json.dumps(now, indent=1) + "\n")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _header(ensemble: Ensemble, naming: Naming | None) -> list[str]:
    about = ensemble.about
    several = ensemble.members > 1
    if about.segments:
        own = ["mask", *(f"share_{name}" for name in about.segments[1:]), *(["spread"] if several else [])]
    else:
        own = results.class_header(about.classes, spreads=several)
    of = naming.columns if naming else []
    return ["image", *map(results.text_cell, [*of, *own]), "distance", "unlike"]


@dataclasses.dataclass
class _Work:
    """One run of `mode=predict`."""

    settings: StudySettings
    ensemble: Ensemble
    folder: Path
    table: Table
    place: Path
    naming: Naming | None = None
    done: int = 0
    bad: int = 0
    unlike: int = 0
    resumed: int = 0
    overlays: int = 0
    _volume: VolumeMask | None = None

    @property
    def options(self) -> PredictSettings:
        """What is predicted, with which models."""
        return self.settings.predict

    def run(self) -> None:
        """Predict what is not predicted yet."""
        reading = self.ensemble.about.reading
        size = self.ensemble.batch_size(self.options.batch_size)
        self.overlays = sum(1 for _ in (self.folder / OVERLAYS).rglob("*.png"))
        listed = self._remaining(inputs.batches(self.place, reading, size, self.naming, self.folder))
        if self.naming:
            self.members.keep(self.done)
        started = said = time.monotonic()
        for found in self._read_ahead(listed):
            self._write(found)
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                rate = (self.done - self.resumed) / (said - started)
                streams.say(f"predict: {self.done:,} images, {rate:,.0f} per second", sys.stderr)

    @functools.cached_property
    def members(self) -> MemberFile:
        """Probabilities by each member."""
        return MemberFile(self.folder / MEMBERS, self.ensemble.members, len(self.ensemble.about.classes))

    def write_units(self, rule: UnitRule) -> str:
        """Write the predictions of units, and return in words where they are, or why there are none."""
        assert self.naming
        about, path = self.ensemble.about, self.folder / UNITS
        count = units.write(
            path,
            self.table.path,
            self.members,
            self.naming,
            about.classes,
            rule.rule,
            multi_label=about.multi_label,
        )
        return f"{path} ({count:,}, {rule})" if count else f"none {rule}: no image names its patient"

    def said(self) -> str:
        """Return the counts of the run in words."""
        parts = [f"{self.done:,} images"]
        parts += [f"{self.resumed:,} of them before"] if self.resumed else []
        parts += [f"{self.bad:,} unreadable"] if self.bad else []
        parts += [f"{self.unlike:,} unlike the training images"] if self.unlike else []
        return ", ".join(parts)

    def _remaining(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Return the batches behind the last whole one, or whole volume, of the table.

        Raises:
            UserError: The images are others than at the first start.
        """
        rows = self.table.names()
        kept, done, waiting = 0, 0, list[Batch]()  # end of the last whole unit, its rows, batches behind it
        for batch in batches:
            waiting.append(batch)
            end = 0
            for item in batch.items:
                row = next(rows, None)
                if row is None:
                    self.table.keep(kept)
                    self.done = self.resumed = done
                    return itertools.chain(waiting, batches)
                name, end = row
                if name != results.text_cell(item.name):
                    raise UserError(
                        f"{self.table.path}: the next image was {name!r} and is {item.name!r} now; expected "
                        "the images of the first start, or another --workdir"
                    )
            if batch.ends_unit:
                kept, done, waiting = end, done + sum(len(each.items) for each in waiting), []
        if next(rows, None) is not None:
            raise UserError(
                f"{self.table.path}: holds more images than there are now; expected another --workdir"
            )
        self.table.keep(kept)
        self.done = self.resumed = done
        return iter(waiting)

    def _read_ahead(self, batches: Iterator[Batch]) -> Iterator[Read]:
        """Yield batches as read; the next one is read while one is predicted."""
        reading = self.ensemble.about.reading
        with ThreadPoolExecutor(1) as pool:
            waiting = None
            for batch in batches:
                following = pool.submit(inputs.read, batch, reading, self.settings.data.threads, self.naming)
                if waiting is not None:
                    yield waiting.result()
                waiting = following
            if waiting is not None:
                yield waiting.result()

    def _write(self, found: Read) -> None:
        if found.bad and self.settings.data.on_bad_image == "error":
            raise UserError(
                f"{next(iter(found.bad.values()))}; data.on_bad_image=skip leaves such images out"
            )
        outputs = None
        if len(found.rows):
            outputs = self.ensemble(found.pixels, self.options.batch_size)
        reasons = self._reasons(found, outputs)
        if reasons and self.options.unlike == "error":
            row = min(reasons)
            raise UserError(
                f"{found.batch.items[row].name}: unlike the training images ({reasons[row]}); expected "
                "images like them, or predict.unlike=flag"
            )
        cells = self._masks(found, outputs) if self.ensemble.about.segments else self._classes(found, outputs)
        places = {row: number for number, row in enumerate(found.rows.tolist())}
        rows = []
        for row, item in enumerate(found.batch.items):
            name = [results.text_cell(item.name), *item.within(self.naming)]
            if row in found.bad:
                why = results.text_cell(f"unreadable: {' '.join(found.bad[row].split())}")
                rows.append([*name, *[""] * (len(self.table.header) - len(name) - 1), why])
                continue
            assert outputs is not None
            distance = outputs.distance[places[row]]
            ends = [results.number(distance), results.text_cell(reasons.get(row, ""))]
            rows.append([*name, *cells[places[row]], *ends])
        if self.naming:
            every = np.full((len(rows), *self.members.shape), np.nan, np.float32)
            if outputs is not None:
                every[found.rows] = outputs.members
            self.members.append(every)  # before the table, which says how far the work is
        self.table.append(rows)
        self.done += len(rows)
        self.bad += len(found.bad)
        self.unlike += len(reasons)

    def _reasons(self, found: Read, outputs: Outputs | None) -> dict[int, str]:
        """Return by place how images differ from the training images, in format or by their features."""
        reasons = dict(found.unlike)
        for number, row in enumerate(found.rows.tolist()):
            assert outputs is not None
            if outputs.distance[number] > 1:
                far = f"features {outputs.distance[number]:.2f} times as far as the threshold"
                reasons[row] = "; ".join(filter(None, [reasons.get(row, ""), far]))
        return reasons

    def _classes(self, found: Read, outputs: Outputs | None) -> list[list[str]]:
        """Return the cells of each image that can be read: what is predicted, probabilities, and spreads."""
        if outputs is None:
            return []
        about, several = self.ensemble.about, self.ensemble.members > 1
        return [
            results.class_cells(
                about.classes, values, spread if several else (), multi_label=about.multi_label
            )
            for values, spread in zip(outputs.probabilities, outputs.spread, strict=True)
        ]

    def _masks(self, found: Read, outputs: Outputs | None) -> list[list[str]]:
        """Write the masks of a batch, and return the cells of each image: its mask, shares, and spread."""
        about, batch, rows = self.ensemble.about, found.batch, []
        if batch.volume is not None and self._volume is None:
            file = results.place(self.folder / MASKS, batch.name, "")
            self._volume = VolumeMask(batch.volume, about.reading.axis, file)
        for number, row in enumerate(found.rows.tolist()):
            assert outputs is not None
            item = batch.items[row]
            whole = results.at_size(outputs.probabilities[number], found.extents[row], about.reading.framing)
            mask = self.ensemble.decide(whole[None])[0]
            if self._volume is not None:
                self._volume.put(plane(item.source), mask)
                file = self._volume.file
            else:
                file = results.place(self.folder / MASKS, item.name, ".png")
                results.write_png(file, mask)
            self._overlay(found.pixels[number], outputs.probabilities[number], item.name)
            shares = [
                _share(mask, value, overlapping=about.overlapping) for value in range(1, len(about.segments))
            ]
            spread = [outputs.spread[number]] if self.ensemble.members > 1 else []
            rows.append(
                [
                    results.text_cell(file.relative_to(self.folder).as_posix()),
                    *map(results.number, [*shares, *spread]),
                ]
            )
        if batch.ends_unit and self._volume is not None:
            self._volume.write()
            self._volume = None
        return rows

    def _overlay(self, image: np.ndarray, probabilities: np.ndarray, name: str) -> None:
        """Write the image with its mask, for the first images with one."""
        mask = self.ensemble.decide(probabilities[None])[0]
        if self.overlays >= self.options.overlays or not mask.any():
            return
        about = self.ensemble.about
        drawn = results.overlay(image, mask, len(about.segments), overlapping=about.overlapping)
        results.write_png(results.place(self.folder / OVERLAYS, name, ".png"), drawn)
        self.overlays += 1


def _share(mask: np.ndarray, value: int, *, overlapping: bool) -> float:
    region = mask >> (value - 1) & 1 if overlapping else mask == value
    return float(region.mean())
