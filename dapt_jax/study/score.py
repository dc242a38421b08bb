"""`mode=score`: scores of any checkpoints on any target sets, without training anything.

Features of a checkpoint on a set are computed once; every variant of every score is arithmetic on them. What
is measured is written after each pair of checkpoint and set, and not measured again.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError, nearest
from dapt_jax.formatting import number
from dapt_jax.models.classifier import HEAD, Classifier, pool
from dapt_jax.models.encoder import Tree
from dapt_jax.records import scores as score_records
from dapt_jax.report import scores as score_report
from dapt_jax.runtime import streams
from dapt_jax.settings import StudySettings
from dapt_jax.study import budgets, checkpoints, prepare, strategies
from dapt_jax.study.checkpoints import Checkpoint
from dapt_jax.study.scorer import SEED, level_group
from dapt_jax.study.tasks import Task
from dapt_jax.training import accounting
from dapt_jax.transferability import registry
from dapt_jax.transferability.inputs import masks_at
from dapt_jax.transferability.robustness import jitter
from dapt_jax.transferability.variants import Features, Measure, ScoringGrid, Variant, random_halves
from dapt_jax.weights import export, locate, readers

BATCH = 32


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint's network.

    Attributes:
        model: Encoder with a head for the source classes, or for one output where there are none.
        params: Its parameters.
        batch_stats: Its batch-norm statistics.
        fingerprint: sha256 of the encoder's arrays.
        has_source: Whether the head gives probabilities of source classes by softmax.
    """

    model: Classifier
    params: Tree
    batch_stats: Tree
    fingerprint: str
    has_source: bool


def run(settings: StudySettings, workdir: Path) -> score_records.Scores:
    """Score every checkpoint on every set, and write `scores/` of a workdir: records, table, figures, page.

    Args:
        settings: Settings of the study, of which model, tasks, data and `scoring` count.
        workdir: Folder of the results.

    Returns:
        The scores.

    Raises:
        UserError: A checkpoint, a set or a score is invalid.
    """
    settings = budgets.for_this_device(strategies.expanded(settings))
    grid = settings.scoring
    chosen = checkpoints.listed(settings, workdir)
    tasks = _tasks(settings)
    variants = grid.variants(grid.names or settings.checkpoint_scoring.names)
    sets = [
        (task, split, _sample(task.datasets[split], grid.images))
        for task in tasks
        for split in grid.splits
        if split in task.datasets
    ]
    if not sets:
        raise UserError(f"scoring.splits is {grid.splits}; no task has one of them")
    known = checkpoints.downstream(settings, chosen, [task.name for task in tasks])
    needs = {registry.entry(variant.score).needs for variant in variants}
    views = max((variant.views or 0 for variant in variants), default=0)
    compatible = {bool(v.reference_compatible) for v in variants if v.reference_compatible is not None}
    passes = views * len(compatible) + bool(needs - {"views"})
    images = sum(len(data) for _, _, data in sets)
    print(
        f"score: {len(chosen)} checkpoints x {len(sets)} sets ({images} images) x {len(variants)} variants of "
        f"scores, {passes} forward passes for each image and checkpoint",
        flush=True,
    )
    file = workdir / score_records.FOLDER / score_records.FILE
    found = score_records.read(file) if file.exists() else []
    flops, rows = 0, []
    for checkpoint in chosen:
        loaded = functools.cache(functools.partial(_load, checkpoint, settings, "source head" in needs))
        for task, split, data in sets:
            key = _key(checkpoint, loaded().fingerprint, data, settings)
            own = {"checkpoint": checkpoint.label, "task": task.name, "split": split, "key": key}
            done = [row for row in found if all(row[name] == value for name, value in own.items())]
            missing = [
                v for v in variants if not any(score_records.is_of(row, v.score, v.values) for row in done)
            ]
            if missing:
                features, spent = _features(loaded(), data, missing)
                flops += spent
                done += _measured(checkpoint, loaded(), own, features, data, missing, grid)
            wanted = {v.title: v for v in variants}
            rows += [
                {**row, "variant_title": title}
                for title, v in wanted.items()
                for row in done
                if score_records.is_of(row, v.score, v.values)
            ]
            # What a kill leaves is taken up again; rows of other checkpoints stay until the end.
            kept = [row for row in found if (row["checkpoint"], row["key"]) not in _pairs(rows)]
            score_records.write(file, [*kept, *rows])
        streams.say(f"  {checkpoint.label}: {_line(rows, checkpoint, variants)}")
    score_records.write(file, rows)
    scores = score_records.Scores(rows, known)
    score_report.build(workdir / score_records.FOLDER, scores, title=settings.title or settings.name)
    print(f"score: {number(flops / 1e12)} TFLOP of forward passes; nothing was trained")
    print(f"report: {workdir / score_records.FOLDER / 'report.html'}")
    return scores


def _pairs(rows: Sequence[Mapping[str, Any]]) -> set[tuple[str, str]]:
    return {(row["checkpoint"], row["key"]) for row in rows}


def _line(rows: Sequence[Mapping[str, Any]], checkpoint: Checkpoint, variants: Sequence[Variant]) -> str:
    """Return the first variant's values of a checkpoint, one per set, and the number of undefined ones."""
    own = [row for row in rows if row["checkpoint"] == checkpoint.label]
    first = [row for row in own if row["variant_title"] == variants[0].title]
    words = ", ".join(
        f"{row['task']} {row['split']} {number(row['value'], 4)}" for row in first if row["value"] is not None
    )
    undefined = [row for row in own if row["value"] is None]
    reason = f"; {len(undefined)} undefined ({undefined[0]['reason']})" if undefined else ""
    return f"{variants[0].title} {words or 'undefined'}{reason}"


def _tasks(settings: StudySettings) -> list[Task]:
    if not settings.tasks:
        raise UserError("mode=score needs target images; expected tasks.NAME.development and so on")
    for name in settings.scoring.tasks:
        if name not in settings.tasks:
            raise UserError(f"scoring.tasks holds {name!r}; {nearest(name, settings.tasks)}")
    names = settings.scoring.tasks or tuple(settings.tasks)
    loaded = {}
    for named in prepare.named_sets(settings, ()):
        if named.task in names:
            loaded[named] = read = prepare.read_set(settings, named)
            for line in (read.line, *(f"warning: {each}" for each in read.warnings)):
                streams.say(line)
    return [prepare.task_of(settings, loaded, name) for name in names]


def _sample(dataset: Dataset, images: int) -> Dataset:
    """Return a fixed random sample of a set, the same for all checkpoints; all images for 0."""
    if not images or images >= len(dataset):
        return dataset
    return dataset.take(np.sort(np.random.default_rng(SEED).permutation(len(dataset))[:images]))


def _key(checkpoint: Checkpoint, fingerprint: str, data: Dataset, settings: StudySettings) -> str:
    """Return what a measured value depends on beside checkpoint label, set and variant, as hexadecimal."""
    parts = [
        fingerprint, repr(checkpoint.encoder.preprocess), checkpoint.encoder.name, data.fingerprint(),
        settings.model.image_size, settings.model.dtype, settings.scoring.resamples, SEED,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:16]


def _load(checkpoint: Checkpoint, settings: StudySettings, wants_source: bool) -> Loaded:
    """Return a checkpoint's network, with the head of its source classes where its file holds one."""
    encoder, dtype = checkpoint.encoder, settings.model.dtype
    outputs = _source_classes(checkpoint) if wants_source else 0
    model = Classifier(encoder, outputs or 1, dtype)
    params, batch_stats, merged = locate.load(
        checkpoint.spec, model, seed=checkpoint.seed, head="load" if outputs else "auto"
    )
    fingerprint = merged.fingerprint or f"random {checkpoint.seed}"
    return Loaded(model, params, batch_stats, fingerprint, bool(outputs))


def _source_classes(checkpoint: Checkpoint) -> int:
    """Return the number of source classes whose head a file of ours holds; 0 without such a head."""
    if checkpoint.path is None:
        return 0
    file = readers.read(checkpoint.path)
    origin = json.loads((file.metadata or {}).get(export.ORIGIN, "{}"))
    kernel = file.get(f"{HEAD}/kernel")
    return kernel.shape[-1] if kernel is not None and origin.get("head") == "softmax" else 0


@functools.cache
def _forward(model: Classifier, levels: tuple[int, ...], dense: bool, source: bool) -> Callable[..., Any]:
    """Return the jitted function from images to maps at some groups, pooled features and source logits."""

    def forward(params: Tree, batch_stats: Tree, images: Array) -> PyTree[Array]:
        encoder, start = model.encoder, 0
        found: dict[str, Array] = {}
        x = model.prefix(params, batch_stats, images, 0)
        for level in sorted(set(levels)):
            x, _ = encoder.apply(params, batch_stats, x, start=start, stop=level + 1)
            start = level + 1
            at = encoder.as_map(x)
            found[str(level)] = (at if dense else at.mean((1, 2), keepdims=True)).astype(np.float32)
        last, _ = encoder.apply(params, batch_stats, x, start=start)
        found["last"] = pool(last).astype(np.float32)
        if source:
            logits = found["last"] @ params[HEAD]["kernel"] + params[HEAD]["bias"]
            found["source"] = jax.nn.softmax(logits)
        return found

    return jax.jit(forward)


def _features(loaded: Loaded, data: Dataset, variants: Sequence[Variant]) -> tuple[Features, int]:
    """Return the features that variants need, in one forward pass per view, and their model FLOPs."""
    encoder = loaded.model.encoder
    needs = {registry.entry(variant.score).needs for variant in variants}
    levels = {
        v.level: level_group(encoder, v.level, "scoring.levels") for v in variants if v.level is not None
    }
    dense = any(variant.pooling == "dense" for variant in variants)
    groups = tuple(sorted(set(levels.values())))
    by_view: dict[tuple[bool, int], np.ndarray] = {}
    passes, last = 0, None
    for compatible in sorted({bool(v.reference_compatible) for v in variants if v.views is not None}):
        views = max(v.views or 0 for v in variants if bool(v.reference_compatible) == compatible)
        forward = _forward(loaded.model, groups, dense, False)
        every = [_batched(loaded, forward, _seen(data, view, compatible)) for view in range(views)]
        passes += views
        for level, group in levels.items():
            by_view[compatible, level] = np.stack([each[str(group)] for each in every])
        last = every[0]["last"] if last is None else last
    maps: dict[int, np.ndarray] = {}
    masks: dict[int, np.ndarray] = {}
    source = None
    if needs - {"views"}:
        with_masks = "masks" in needs and data.masks is not None
        forward = _forward(loaded.model, groups if with_masks else (), True, loaded.has_source)
        plain = _batched(loaded, forward, _plain(data))
        passes += 1
        last, source = plain["last"], plain.get("source")
        if with_masks:
            drawn = data.load_masks()
            for level, group in levels.items():
                maps[level] = plain[str(group)]
                masks[level] = masks_at(drawn, maps[level].shape[1])
    assert last is not None  # every score needs views or images
    labels = None if data.multi_label else data.labels
    each = accounting.forward(loaded.model, data.images.size, len(encoder.groups)).model
    return Features(last, by_view, maps, masks, labels, source), each * passes * len(data)


def _plain(data: Dataset) -> Iterator[np.ndarray]:
    for start in range(0, len(data), BATCH):
        yield data.images.batch(np.arange(start, min(start + BATCH, len(data))))


def _seen(data: Dataset, view: int, compatible: bool) -> Iterator[np.ndarray]:
    """Yield the jittered images of one view in batches, values 0 to 255."""
    for start in range(0, len(data), BATCH):
        rows = np.arange(start, min(start + BATCH, len(data)), dtype=np.int32)
        images = data.images.batch(rows)
        if compatible:
            scaled = images.astype(np.float32) / 255.0
            yield np.asarray(jitter(scaled, SEED, view, rows, reference_compatible=True)) * 255.0
        else:
            yield np.asarray(jitter(images, SEED, view, rows))


def _batched(
    loaded: Loaded, forward: Callable[..., Any], batches: Iterator[np.ndarray]
) -> dict[str, np.ndarray]:
    """Return a jitted function's arrays for all images, in batches of one shape."""
    parts: list[dict[str, np.ndarray]] = []
    for batch in batches:
        filled = np.concatenate([batch, np.repeat(batch[-1:], BATCH - len(batch), axis=0)])
        out = jax.device_get(forward(loaded.params, loaded.batch_stats, filled))
        parts.append({name: leaf[: len(batch)] for name, leaf in out.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _measured(
    checkpoint: Checkpoint,
    loaded: Loaded,
    own: Mapping[str, str],
    features: Features,
    data: Dataset,
    variants: Sequence[Variant],
    grid: ScoringGrid,
) -> list[dict[str, Any]]:
    """Return the records of variants of a checkpoint on a set."""
    halves = random_halves(data.groups, features.labels, grid.resamples, SEED)
    measure, rows = Measure(features, grid.margins), []
    for variant in variants:
        found = measure.of(variant, halves)
        rows.append({
            **own,
            "spec": checkpoint.spec,
            "model": loaded.model.encoder.name,
            "fingerprint": loaded.fingerprint,
            "score": variant.score,
            "variant": variant.values,
            "higher_is_better": registry.entry(variant.score).higher_is_better,
            "value": found.value if math.isfinite(found.value) else None,
            "reason": found.reason,
            "n": len(data),
            "halves": [float(f"{value:.7g}") if math.isfinite(value) else None for value in found.halves],
        })  # fmt: skip
    return rows
