"""Contents behind the settings of a study: of weights, lists, images, labels and masks, and of this code.

A setting names a file; results depend on what is in it. The digests here depend on contents alone, so a file
that has been moved or copied has the same one.
"""

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from dapt_jax.data import facts, near_duplicates, splits
from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import redact
from dapt_jax.runtime import home
from dapt_jax.settings.schema import ON_LEAK
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.strategies import Strategy
from dapt_jax.training import targets
from dapt_jax.weights import identity
from dapt_jax.weights.merge import MergeReport
from dapt_jax.weights.paths import flatten

RESULTS_VERSION = 3
"""Version of everything in this code that results depend on.

Raise it in the commit that makes equal settings, weights and data give other numbers in `results.jsonl` beyond
rounding: whenever `tests/golden` has to be generated again for another reason than new rows. A workdir with
results of another version is then refused, since its arms would not be comparable. Costs, reports, error
lines, speed and new settings whose default keeps the numbers do not count. Version 1 trained the linear heads by
gradient steps; it is that of results without a recorded version. Version 2 cut patches and windows of tasks of
masks at the border, where version 3 mirrors the image.
"""

ARM_VERSION = 2
"""Version, in the same sense, of single arms: those whose numbers a change has concerned, where others stay.

Version 1 is that of workdirs without it. There, a frozen teacher saw the views of the first epoch throughout while
the student saw new ones in every epoch; of a batch in parts, `reconstruct` left an image of each clean; and rounds of a
`compute_budget` knew neither `adapt.balance_clusters` nor that the rule `patience` had ended an arm.
"""

Contents = Mapping[str, Mapping[str, str]]
"""Digests by setting, and by part of what it names: `{"weights": {"file": ..., "arrays": ...}}`."""

CODE = "code"
"""Key of `RESULTS_VERSION` and of `ARM_VERSION` among the settings."""

_VERSION = "version"

TEACHER = "adapt.distil.teacher"
"""Setting that names the weights of a frozen teacher."""


def contents(study: Study) -> dict[str, dict[str, str]]:
    """Return the digests of everything by name that the results of a study depend on.

    Args:
        study: The study, read and checked.
    """
    arms = study.arms_of(study.settings.seeds[0])
    versions = {_of_arm(arm.name): str(ARM_VERSION) for arm in arms if _has_version(study, arm)}
    found = {CODE: {_VERSION: str(RESULTS_VERSION), **versions}}
    own = {strategy.name: strategy for strategy in study.strategies if strategy.name in study.sources}
    shared = [strategy for strategy in study.strategies if strategy.name not in own]
    if "" in study.sources:
        found["weights"] = _of_weights(study.sources[""], shared[:1])
    for name, strategy in own.items():
        found[f"custom_strategies.{name}.weights"] = _of_weights(study.sources[name], [strategy])
    runs = (run for arm in arms for run in study.runs_of(arm))
    teachers = (run.teacher_weights for run in runs)
    if load := next(filter(None, teachers), None):
        params, batch_stats = load()
        found[TEACHER] = {"arrays": identity.fingerprint(flatten(params) | flatten(batch_stats))}
    leaks = home.expanded(study.settings.data.leaks)
    if study.settings.data.leaks not in ON_LEAK and leaks.is_file():
        found["data.leaks"] = {"file": identity.digest(leaks)}
    for name, corpus in study.corpora.items():
        found[f"corpora.{name}" if name else "corpus"] = _of_set(study, corpus)
    for task in study.tasks:
        for split, dataset in task.parts.items():
            found[f"tasks.{task.name}.{split}"] = _of_set(study, dataset)
    return found


def change(study: Study, now: Contents, before: Contents) -> str:
    """Return the first difference between two contents of settings that both have, in words; "" for none.

    Args:
        study: The study, whose settings say where the changed contents are.
        now: Contents of the study now.
        before: Contents at its first start.
    """
    for setting, parts in now.items():
        then = before.get(setting, {})
        for part, digest in parts.items():
            if part in then and then[part] != digest:
                return _in_words(study, setting, part, digest, then[part])
    return ""


def with_versions(before: Contents, strategies: Iterable[str]) -> Contents:
    """Return the contents of a workdir with an `ARM_VERSION` of 1 for those of its strategies without any.

    Args:
        before: Contents at its first start.
        strategies: Names of the strategies that it had when they were written.
    """
    return {**before, CODE: {**dict.fromkeys(map(_of_arm, strategies), "1"), **before.get(CODE, {})}}


def recorded_weights(text: str) -> dict[str, dict[str, str]]:
    r"""Return the contents of the study's weights that a `weights.txt` of an earlier version names.

    >>> recorded_weights("fingerprint: 5f\nsha256 of the source: none")
    {'weights': {'arrays': '5f'}}
    """
    titles = {"fingerprint": "arrays", "sha256 of the source": "file"}
    lines = (line.partition(": ") for line in text.splitlines())
    found = {titles[title]: value for title, _, value in lines if title in titles and value != "none"}
    return {"weights": found} if found else {}


def _has_version(study: Study, arm: Arm) -> bool:
    """Return whether the numbers of an arm are others than in version 1 of `ARM_VERSION`."""
    settings, programs = study.settings, [each for run in study.runs_of(arm) for each in run.programs]
    is_patient = settings.checkpoint_selection.rule == "patience"
    if settings.compute_budget and programs and (settings.adapt.balance_clusters or is_patient):
        return True
    return any(
        (targets.teacher_of(program) is not None and targets.are_fresh(program))
        or (program.is_corrupting and program.grad_accum_steps > 1)
        for program in programs
    )


def _of_arm(strategy: str) -> str:
    return f"strategy {strategy!r}"


def _in_words(study: Study, setting: str, part: str, now: str, then: str) -> str:
    if setting == CODE:
        what = "its results are" if part == _VERSION else f"its {part} is"
        return f"{what} of version {then} of the computation, and this code has version {now}"
    where = _where(study, setting)
    of = f"{setting} ({where})" if where else setting
    return {
        "file": f"the file of {of} has other contents now (sha256 {then[:16]} there, {now[:16]} now)",
        "arrays": f"other arrays are read for {of} now (fingerprint {then[:16]} there, {now[:16]} now)",
        "normalisation": f"images are normalised in another way for {of} now",
    }.get(part, f"the {part} of {of} are others now")


def _where(study: Study, setting: str) -> str:
    """Return the path or address that a setting names; empty where it names none."""
    settings, (section, _, name) = study.settings, setting.partition(".")
    if setting == "data.leaks":
        return settings.data.leaks
    if setting == TEACHER:
        return redact(settings.adapt.distil.teacher)
    if section == "weights":
        return redact(settings.weights)
    if section == "custom_strategies":
        return redact(settings.custom_strategies[name.removesuffix(".weights")].weights)
    if section == "tasks":
        task, _, split = name.rpartition(".")
        sources = settings.tasks[task].sources[split]
    else:
        sources = settings.corpus_named(name).source
    paths = [str(each.get("path", "")) for each in (sources if isinstance(sources, tuple) else (sources,))]
    return redact(", ".join(filter(None, paths)))


def _of_weights(report: MergeReport, strategies: Iterable[Strategy]) -> dict[str, str]:
    """Return the digests of loaded weights, and the normalisation of the images that they are given."""
    found = {"file": report.source_sha256, "arrays": report.fingerprint}
    for strategy in strategies:
        found["normalisation"] = repr(strategy.encoder.preprocess)
    return {part: digest for part, digest in found.items() if digest}


def _of_set(study: Study, dataset: Dataset) -> dict[str, str]:
    """Return the digests of a set's images by their decoded pixels, of its labels, patients and masks.

    Images without a patient are each their own, or that of their volume, under a name that may hold the folder of the
    data: of these the order counts, which splits depend on. Sets of volumes have a part of their own, which versions
    without it did not write: there the folder of the data counted.
    """
    unnamed = facts.unnamed(dataset)
    are_images = np.array_equal(unnamed, np.asarray(dataset.groups) == np.asarray(dataset.images.names))
    order = splits.in_order(dataset.groups)[1].astype("<i8")
    named = "\0".join(map(str, dataset.groups[~unnamed])).encode()
    about = (dataset.classes, dataset.labels.dtype.str, dataset.labels.shape, dataset.uncertain)
    found = {
        "images": _digest(near_duplicates.looks(dataset.images).digests.astype("<u8").tobytes()),
        "labels": _digest(repr(about).encode(), dataset.labels.tobytes()),
        "patients" if are_images else "patients and volumes": _digest(order.tobytes(), named),
    }
    if dataset.segments:
        about_masks = repr((dataset.segments, dataset.overlapping)).encode()
        found["masks"] = _digest(about_masks, dataset.targets.tobytes())
    elif dataset.masks is not None and study.scores and study.scores.dense and dataset is study.scored_images:
        found["masks"] = _digest(dataset.load_masks().tobytes())
    return found


def _digest(*parts: bytes) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()
