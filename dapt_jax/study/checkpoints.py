"""Checkpoints that `mode=score` scores, and what is known of their downstream scores."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dapt_jax.data import lists
from dapt_jax.errors import UserError, nearest, redact
from dapt_jax.metrics import lower_is_better
from dapt_jax.models import registry
from dapt_jax.models.encoder import Encoder
from dapt_jax.records.scores import Downstream
from dapt_jax.records.study_records import Records
from dapt_jax.records.vocabulary import CHECKPOINT_MARK
from dapt_jax.runtime import home
from dapt_jax.settings import StudySettings
from dapt_jax.study import strategies
from dapt_jax.weights import export, locate, readers, zoo
from dapt_jax.weights.run_reference import ALL, SCHEME, ArmFolder, RunReference

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".tar", ".bin", ".ckpt", ".h5", ".keras", ".pkl")
"""Of the weight files of a folder of checkpoints."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An encoder with weights.

    Attributes:
        label: Name in tables, unique.
        spec: Weights, as the setting `weights` names them.
        encoder: The encoder, with the normalisation that the weights expect.
        path: File of the weights where it is known; None for names and addresses.
        seed: Seed of random weights.
        workdir: Workdir of the study that made them; empty for other weights.
        arm: Name of its arm in the results of that study, `STRATEGY@EPOCHS` of a kept epoch.
        arm_seed: Seed of that arm.
    """

    label: str
    spec: str
    encoder: Encoder
    path: Path | None = None
    seed: int = 0
    workdir: str = ""
    arm: str = ""
    arm_seed: int = 0


def listed(settings: StudySettings, workdir: Path) -> list[Checkpoint]:
    """Return the checkpoints of `scoring.checkpoints`, or the arms of the study where it is empty.

    Args:
        settings: Settings of the study.
        workdir: Folder of the study, which holds the encoders of its adapted arms.

    Raises:
        UserError: A checkpoint does not exist, or none is named.
    """
    found: list[Checkpoint] = []
    for spec in settings.scoring.checkpoints:
        found += _of_spec(spec, settings)
    if not settings.scoring.checkpoints:
        found = _arms(settings, workdir)
    return _unique(found)


def _unique(found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return checkpoints with unique labels: one that occurs twice becomes the whole specification."""
    labels = [each.label for each in found]
    named = [
        dataclasses.replace(each, label=redact(each.spec)) if labels.count(each.label) > 1 else each
        for each in found
    ]
    for each in named:
        if sum(other.label == each.label for other in named) > 1:
            raise UserError(f"scoring.checkpoints: {each.label} is there twice; expected each once")
    return named


def _of_spec(spec: str, settings: StudySettings) -> list[Checkpoint]:
    if spec.startswith(SCHEME):
        return _of_run(RunReference.of(spec), settings)
    folder = home.expanded(spec)
    if "://" not in spec and folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
        if files:
            return [_of_file(path.stem, str(path), path, settings) for path in files]
    if zoo.is_name(locate.Address.of(spec).place):
        model = zoo.entry(locate.Address.of(spec).place).model
        encoder = locate.fitted(spec, registry.build(model), settings.model.preprocess)
        return [Checkpoint(spec, spec, encoder)]
    if spec in (locate.IMAGENET, locate.RANDOM):
        encoder = locate.fitted(spec, settings.model.encoder(), settings.model.preprocess)
        return [Checkpoint(spec, spec, encoder)]
    path = locate.find(spec)
    return [_of_file(Path(redact(spec)).stem, spec, path, settings)]


def _of_file(label: str, spec: str, path: Path, settings: StudySettings) -> Checkpoint:
    """Return a checkpoint of a file: a file of ours says its encoder, others fit that of the settings."""
    encoder = settings.model.encoder()
    if path.is_file():
        metadata = readers.read(path).metadata or {}
        if metadata.get(export.MODEL) in registry.names():
            encoder = registry.build(metadata[export.MODEL])
            last = metadata.get(export.LAST_GROUP, encoder.groups[-1])
            encoder = encoder.truncate(last) if last != encoder.groups[-1] else encoder
    return Checkpoint(label, spec, locate.fitted(spec, encoder, settings.model.preprocess), path)


def _of_run(reference: RunReference, settings: StudySettings) -> list[Checkpoint]:
    several = len(reference.arms()) > 1 if reference.epoch == ALL else False
    arms = reference.arms() if reference.epoch == ALL else [reference.arm()]
    found = []
    for arm in arms:
        if reference.epoch != ALL:
            epochs = int(reference.epoch) if reference.epoch.isdecimal() else 0
            found.append(_of_arm(reference.workdir, arm, epochs, reference.path(), several, settings))
            continue
        kept = arm.epochs
        if not kept:
            raise UserError(f"{reference.spec}: {arm.title} has no kept epoch; {arm.kept()}")
        found += [_of_arm(reference.workdir, arm, n, path, several, settings) for n, path in kept.items()]
    return found


def _of_arm(
    workdir: str, arm: ArmFolder, epochs: int, path: Path, with_seed: bool, settings: StudySettings
) -> Checkpoint:
    name = f"{arm.strategy}{CHECKPOINT_MARK}{epochs}" if epochs else arm.strategy
    label = f"{name} seed {arm.seed}" if with_seed else name
    found = _of_file(label, str(path), path, settings)
    return dataclasses.replace(found, workdir=workdir, arm=name, arm_seed=arm.seed)


def _arms(settings: StudySettings, workdir: Path) -> list[Checkpoint]:
    """Return the study's own arms: source weights of those without phases, kept or adapted encoders of others."""
    encoder = locate.fitted(settings.weights, settings.model.encoder(), settings.model.preprocess)
    found = []
    for name in settings.strategies:
        strategy = strategies.resolve(name, encoder, settings)
        if not strategy.phases:
            path = (
                None
                if strategy.weights in (locate.IMAGENET, locate.RANDOM)
                else locate.find(strategy.weights)
            )
            seed = settings.seeds[0]
            found.append(
                Checkpoint(name, strategy.weights, strategy.encoder, path, seed, str(workdir), name, seed)
            )
            continue
        for arm in RunReference(f"strategy {name!r}", str(workdir), name).arms():
            with_seed = len(settings.adaptation_seeds) > 1
            files = arm.epochs or {0: RunReference("", str(workdir), name, str(arm.seed)).path()}
            found += [_of_arm(str(workdir), arm, n, path, with_seed, settings) for n, path in files.items()]
    return found


def downstream(
    settings: StudySettings, chosen: Sequence[Checkpoint], tasks: Sequence[str]
) -> list[Downstream]:
    """Return known downstream scores of checkpoints: of `scoring.downstream`, or of the runs that made them.

    Args:
        settings: Settings of the study.
        chosen: The checkpoints.
        tasks: Names of the tasks that are scored.

    Raises:
        UserError: The file of `scoring.downstream` is damaged, or names none of the checkpoints.
    """
    place = settings.scoring.downstream
    if not place:
        return [
            each
            for workdir in dict.fromkeys(one.workdir for one in chosen if one.workdir)
            if (home.expanded(workdir) / "config.json").exists()
            for each in _of_records(Records.read(home.expanded(workdir)), workdir, chosen, tasks)
        ]
    path = home.expanded(place)
    if not path.exists():
        raise UserError(f"scoring.downstream: no file or folder {place}; expected a workdir, .jsonl or .csv")
    if path.suffix == ".csv" and path.is_file():
        return _of_csv(path, chosen, tasks)
    folder = path if path.is_dir() else path.parent
    found = _of_records(Records.read(folder), "", chosen, tasks)
    if not found:
        names = ", ".join(dict.fromkeys(row["strategy"] for row in Records.read(folder).results)) or "none"
        raise UserError(
            f"scoring.downstream: {path} has no result of {chosen[0].label} or another checkpoint on "
            f"{', '.join(tasks)}; it has {names}"
        )
    return found


def _of_records(
    records: Records, workdir: str, chosen: Sequence[Checkpoint], tasks: Sequence[str]
) -> list[Downstream]:
    """Return the primary metric of checkpoints in a study's results, by arm name, or by label for no workdir."""
    found = []
    for task in (task for task in tasks if task in records.tasks):
        metric, protocol = records.metric(task), records.protocol(task)
        for checkpoint in chosen:
            if workdir and checkpoint.workdir != workdir:
                continue
            name = checkpoint.arm if workdir else checkpoint.label
            for split in records.splits(task):
                values = dict(
                    zip(records.seeds, records.values(name, task, split, protocol, metric), strict=True)
                )
                own = values.get(checkpoint.arm_seed) if workdir and records.shared_seed is None else None
                known = [value for value in values.values() if value is not None]
                if own is not None or known:
                    value = own if own is not None else float(np.mean(known))
                    lowest = lower_is_better(metric)
                    found.append(
                        Downstream(checkpoint.label, task, split, f"{protocol} {metric}", value, lowest)
                    )
    return found


def _of_csv(path: Path, chosen: Sequence[Checkpoint], tasks: Sequence[str]) -> list[Downstream]:
    places, columns = lists.read_columns(path, "table", "checkpoint,value and one row for each checkpoint")
    for column in ("checkpoint", "value"):
        if column not in columns:
            raise UserError(f"{path}: no column {column!r}; {nearest(column, columns)}")
    if "task" not in columns and len(tasks) > 1:
        raise UserError(f"{path}: no column 'task', and there are several: {', '.join(tasks)}")
    labels = [each.label for each in chosen]
    of_tasks = columns.get("task", [""] * len(places))
    found: dict[tuple[str, str], Downstream] = {}
    for place, label, cell, named in zip(
        places, columns["checkpoint"], columns["value"], of_tasks, strict=True
    ):
        value = _number(cell)
        if not math.isfinite(value):
            raise UserError(f"{path}: {place}: value is {cell!r}; expected a number")
        task = named or tasks[0]
        if (label, task) in found:
            raise UserError(
                f"{path}: {place}: {label} is there twice for {task}; expected one value, such as the mean over seeds"
            )
        if label in labels and task in tasks:
            found[label, task] = Downstream(label, task, "given", "value", value, False)
    if not found:
        raise UserError(
            f"{path}: none of its checkpoints is scored; it has {', '.join(sorted({*columns['checkpoint']}))[:200]}"
            f", and scored are {', '.join(labels)[:200]}"
        )
    return list(found.values())


def _number(cell: str) -> float:
    """Return the number that a cell holds; NaN for anything else."""
    try:
        return float(cell)
    except ValueError:
        return math.nan
