"""Assembly of a report: report.md, report.html and the figures."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from dapt_jax.cost.energy import CARBON_INTENSITY, carbon_kg
from dapt_jax.errors import one_line
from dapt_jax.formatting import number
from dapt_jax.records import intensities, overlays, samples
from dapt_jax.records.study_records import Records
from dapt_jax.records.vocabulary import BASELINE
from dapt_jax.report import (
    by_source,
    claims,
    competition,
    feature_maps,
    figures,
    leak_marks,
    main_table,
    narrative,
    prediction_figures,
    predictions,
    recommendation,
    selection,
    tables,
    thumbnails,
)
from dapt_jax.report.columns import Table
from dapt_jax.report.pictures import drawn, picture
from dapt_jax.report.style import STYLE, save
from dapt_jax.runtime import atomic_files
from dapt_jax.statistics import too_few_seeds

HOW_TO_READ = (
    "Intervals are 95% Student t-intervals of the mean over seeds; they are symmetric and not cut off at "
    "0 or 1. p comes from two two-sided tests over seeds against the reference strategy, the paired "
    "t-test and Welch's t-test of independent runs, each adjusted by Holm's method for the number of "
    "strategies, each split on its own. The generalization gap is development (or the official test "
    "split) minus external, seed by seed. Standalone is what one arm costs on its own: what it ran plus "
    "what it took from activations that another arm of the study had computed (energy in proportion to "
    "time); only the seconds of training are those that were run. FLOPs are those of matrix products and "
    "convolutions, a multiply-accumulate counted as 2, recomputation left out. Adapt covers domain- "
    "adaptive pre-training and choosing a checkpoint; transfer covers the heads on the target task. The "
    "note below a table says what its marks mean and which test they come from."
)


MOST_BYTES = 5_000_000
"""Size that the page stays below by leaving out figures of predictions."""


def build(workdir: Path) -> None:
    """Write report.md, report.html and figures/*.png from the records of a study.

    It reads config.json, results.jsonl, ledger.jsonl, leaks.json, intensities.json, predictions/, samples/
    and the images in overlays/ only; an unfinished study gives a report on the available results. The HTML page is
    one file with embedded images, without scripts or network access.

    Raises:
        UserError: The file config.json is missing, or one of the files is damaged.
    """
    workdir = Path(workdir)
    build_of(Records.read(workdir), workdir)


@dataclasses.dataclass(frozen=True)
class Overview:
    """What the report of several studies shows before its tasks.

    Attributes:
        tables: Tables over tasks.
        figure: Figure over tasks.
        warnings: Warnings, one line each.
    """

    tables: Sequence[Table]
    figure: Figure
    warnings: Sequence[str]


def build_of(records: Records, workdir: Path, overview: Overview | None = None) -> None:
    """Write the report of records into a folder; see `build`.

    Args:
        records: Records of a study, or of several.
        workdir: Folder of the report, and of predictions and overlays where there are any.
        overview: What comes first, of several studies.
    """
    pictures = figures.draw(records, overlays.read(workdir), workdir / "figures")
    view = _view(records, pictures, workdir)
    if overview:
        with mpl.rc_context(STYLE):  # type: ignore[arg-type]
            path = save(overview.figure, workdir / "figures" / "overview.png")
        caption = "Every arm on every task: seeds faint, mean with its 95% interval; shaded: the margin around the reference."
        view["overview"] = {
            "figures": [picture(path, workdir, caption)],
            "tables": [leak_marks.marked(records, table) for table in overview.tables],
        }
        view["warnings"] = [*overview.warnings, *view["warnings"]]
    render(workdir, "report", view)
    for section in reversed(view["sections"]):  # the last tasks lose their pictures first
        if (workdir / "report.html").stat().st_size < MOST_BYTES:
            break
        section.update(predictions=[], features=[], examples=[])
        view["warnings"].append(
            f"The figures of the predictions of {section['task']} are in figures/ alone: this page stays below "
            f"{MOST_BYTES // 1_000_000} MB."
        )
        render(workdir, "report", view)


def render(folder: Path, template: str, view: Mapping[str, Any]) -> None:
    """Write report.md and report.html of a folder.

    Args:
        folder: Folder of the two files.
        template: Name of the two templates: "report" of a study, or "page" of titled sections.
        view: Context of the templates.
    """
    for suffix, escape in (("md", markdown), ("html", printable)):
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("dapt_jax.report"),
            autoescape=suffix == "html",
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
            finalize=escape,
        )
        text = environment.get_template(f"{template}.{suffix}.j2").render(view)
        atomic_files.write_text(folder / f"report.{suffix}", text.lstrip("\n"))


def printable(value: object) -> object:
    """Return a value without control characters, which HTML does not allow."""
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return one_line(str(value).replace("\n", " ")) if is_text else value


def markdown(value: object) -> str:
    r"""Return a value as Markdown text that starts no tag, link, picture, code, table cell or emphasis.

    Signs that mean nothing where they stand stay as they are: `<0.001`, `[0.81, 0.93]`, `linear_auc`.

    Example:
        >>> markdown("<b> ![x](http://host) a|b <0.001 [0.81, 0.93]")
        '\\<b> ![x\\](http://host) a\\|b <0.001 [0.81, 0.93]'
    """
    if isinstance(value, Markup):
        return str(value)
    return _MARKS.sub(r"\\\g<0>", one_line(str(value).replace("\n", " ")))


_MARKS = re.compile(
    r"\\(?=[!-/:-@\[-`{-~])|[|`*$~]|<(?=[A-Za-z/!?])|\](?=[(\[:])|&(?=[#\w]+;)|(?<!\w)_|_(?!\w)"
)
"""What starts a construct of Markdown: backslashes, cells, code, emphasis, formulas, tags, links, entities."""


def _view(records: Records, pictures: list[tuple[str, Path, str]], workdir: Path) -> dict[str, Any]:
    """Return the context of the templates."""
    config = records.config

    def shown(of_task: str) -> list[dict[str, str]]:
        return [picture(path, workdir, caption) for task, path, caption in pictures if task == of_task]

    sections = []
    for task in records.tasks:
        splits = [
            of_split
            for split in records.splits(task)
            if (of_split := prediction_figures.SplitPredictions.read(workdir, records, task, split))
        ]
        found = [
            claims.table(records, task),
            predictions.table(workdir, records, task),
            tables.everything(records, task),
            tables.per_class(records, task),
            by_source.table(splits),
            selection.agreement(records, task),
        ]
        examples = [
            each
            for name in recommendation.arms_shown(records, task)[:1]
            for each in thumbnails.examples(workdir, records, task, name)
        ]
        sections.append(
            {
                "task": task,
                "sizes": _sizes(records, task),
                "box": recommendation.recommend(records, task, workdir),
                "words": narrative.summary(records, task),
                "main": leak_marks.marked(records, main_table.table(records, task), task),
                "figures": shown(task),
                "predictions": [
                    (
                        leak_marks.shown(records, task, each.split),
                        drawn(each.pictures, f"{task}_{each.split}", workdir),
                    )
                    for each in splits
                ],
                "examples": examples,
                "examples_words": thumbnails.saliency_words(examples),
                "features": drawn(
                    functools.partial(feature_maps.pictures, workdir, records, task), task, workdir
                ),
                "tables": [
                    leak_marks.marked(records, each, task) for each in found if each is not None and each.rows
                ],
            }
        )
    return {
        "title": str(config.get("title") or "Domain-adaptive pre-training study"),
        "note": str(config.get("note") or ""),
        "synthetic": config.get("synthetic") is True,
        "data_note": str(config.get("data_note") or ""),
        "facts": [*_facts(records), *_set_sizes(workdir)],
        "warnings": _warnings(records),
        "overview": None,
        "competition": competition.table(workdir, records),
        "sections": sections,
        "ranks": [leak_marks.marked(records, table) for table in claims.over_tasks(records)],
        "figures": shown(""),
        "sheets": thumbnails.sheets(workdir),
        "intensities": tables.intensity_ranges(intensities.read(workdir)),
        "totals": tables.totals(records) if records.rows else None,
        "totals_words": _totals_words(records),
        "how_to_read": HOW_TO_READ,
    }


def _facts(records: Records) -> list[tuple[str, str]]:
    """Return the description of model, data and settings."""
    of_arms = [row for row in records.results if row["strategy"] != BASELINE]
    models = [records.model] if records.model else [str(row["model"]) for row in of_arms if row.get("model")]
    inits = [str(row["init"]) for row in of_arms if row.get("init")]
    devices = [f"{row.devices} × {row.device}" for row in records.rows if row.device]
    sources = [row.energy_source for row in records.rows if row.energy_source]
    facts = {
        "model": models,
        "source weights": inits,
        "strategies": records.strategies,
        "seeds": [str(seed) for seed in records.seeds],
        "device": devices,
        "energy": sources,
    }
    return [(name, ", ".join(dict.fromkeys(values))) for name, values in facts.items() if values]


def _set_sizes(workdir: Path) -> list[tuple[str, str]]:
    """Return the number of images and patients of each set."""
    return [
        (
            sheet.title,
            f"{sheet.count:,} images "
            + (f"of {sheet.patients:,} patients" if sheet.patients else "that name no patient"),
        )
        for sheet in samples.read_sheets(workdir)
    ]


def _warnings(records: Records) -> list[str]:
    """Return the warnings about incomplete or leaking results, one line each."""
    lines = []
    if not records.results and records.rows and not records.config.get("tasks", True):
        lines.append(
            "No target task: the encoders of this pre-training are in checkpoints/; other studies take them by "
            "weights=run:WORKDIR."
        )
    elif not records.results:
        lines.append("No results yet: results.jsonl is missing or empty.")
    elif missing := records.missing():
        listed = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        lines.append(
            f"Unfinished: {len(missing)} of {len(records.arms)} arms have no result yet (strategy seed): {listed}."
        )
    for task, of_task in records.leaks.items():
        for split, what in of_task.items():
            lines.append(
                f"LEAK: {what} of {task} {split} were seen in training or in another set; marked ‡ in every "
                "table."
            )
    lines += [
        f"No patient-level intervals of {task}: its images and classes are too many to resample; predictions/ "
        "holds the predictions."
        for task in records.tasks
        if not predictions.resamples_of(records, task)
    ]
    undefined = sum(row["value"] is None for row in records.results)
    if undefined:
        lines.append(f"{undefined} of {len(records.results)} results are undefined and left out of means.")
    if not records.rows:
        lines.append("No costs: ledger.jsonl is missing or empty.")
    if len({(row.device, row.devices) for row in records.rows if row.device}) > 1:
        lines.append("Arms ran on different devices: seconds and kWh are not comparable; FLOPs are.")
    if len({row.energy_source for row in records.rows if row.energy_source}) > 1:
        lines.append("Energy was obtained in different ways: kWh are not comparable.")
    if records.results and (few := too_few_seeds(len(records.seeds))):
        lines.append(few)
    lines += [f"{task}: {line}." for task, of_task in records.few_samples.items() for line in of_task]
    return lines


def _sizes(records: Records, task: str) -> str:
    """Return the number of images and classes of a task."""
    found: dict[str, str] = {}
    classes = ""
    for row in records.results:
        if row["task"] != task or row["strategy"] == BASELINE:
            continue
        if row.get("n") is not None:
            found.setdefault(row["split"], f"{row['split']} {row['n']} images")
        if row.get("classes") and "/" not in row["metric"]:  # scores of a single class cover fewer images
            names = row["classes"]
            is_short = isinstance(names, list) and len(names) <= 20
            classes = ", ".join(map(str, names)) if is_short else f"{_count(names):,}"
    return "; ".join([*found.values(), *([f"classes: {classes}"] if classes else [])])


def _count(classes: list[str] | int) -> int:
    return len(classes) if isinstance(classes, list) else classes


def _totals_words(records: Records) -> str:
    """Return the total cost of the study, and the savings of its cache."""
    if not records.rows:
        return ""
    wall, reused = sum(row.wall_s for row in records.rows), sum(row.reused_s for row in records.rows)
    kwh = sum(row.energy_kwh for row in records.rows)
    peak = max(row.peak_bytes for row in records.rows)
    text = f"The study ran for {_duration(wall)}"
    if reused:
        text += f"; cached activations saved it another {_duration(reused)} ({reused / (wall + reused):.0%})"
    region = _region(records)
    text += f". It used {number(kwh)} kWh, about {number(carbon_kg(kwh, region))} kg of CO2 equivalent at "
    text += f"{CARBON_INTENSITY[region]:g} g/kWh ({'mean of the world' if region == 'world' else region})."
    return text + (f" Peak memory was {peak / 2**30:.1f} GiB." if peak else "")


def _region(records: Records) -> str:
    """Return the electricity region; the world where the configuration names no known one."""
    energy = records.config.get("energy")
    region = str(energy.get("region", "world")) if isinstance(energy, Mapping) else "world"
    return region if region in CARBON_INTENSITY else "world"


def _duration(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.1f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
