"""A workdir belongs to one study: its `config.json` says which.

Seeds and strategies can be added to a study; nothing else that its results depend on can change.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapt_jax.errors import UserError, redact
from dapt_jax.records import typed
from dapt_jax.records.study_records import Records
from dapt_jax.runtime import atomic_files
from dapt_jax.settings import StudySettings, from_json, to_dict
from dapt_jax.settings.defaults import differences
from dapt_jax.study import contents
from dapt_jax.study.arms import Arm, Study

WEIGHTS = "weights.txt"
"""Name of the file, in a workdir, that lists every parameter of the study's source weights."""

_CONTENTS, _IMAGES = "contents", "images"
"""Keys of `config.json` beside the settings: `contents.contents`, and the images alone of earlier versions."""

_HOLDS, _EXPECTED = "{} holds the study of another config", "expected the same, or another --workdir"


def claim(study: Study, workdir: Path) -> None:
    """Check that a workdir is new or belongs to the study, and write its `config.json` and `weights.txt`.

    Settings on which results do not depend may differ, and names of an earlier version are accepted.

    Raises:
        UserError: The workdir holds another study; names the first difference.
    """
    now = check(study, workdir)
    try:
        values = {**_without_secrets(to_dict(study.settings)), _CONTENTS: now}
        atomic_files.write_text(workdir / "config.json", json.dumps(values, indent=1, sort_keys=False) + "\n")
        if not (workdir / WEIGHTS).exists():
            atomic_files.write_text(workdir / WEIGHTS, study.weights)
    except OSError as error:
        raise UserError(
            f"{workdir}: cannot be written to ({error.strerror}); expected another --workdir"
        ) from error


def check(study: Study, workdir: Path) -> dict[str, dict[str, str]]:
    """Check that a workdir is new or belongs to the study, write nothing, and return the study's contents.

    Raises:
        UserError: The workdir holds another study; names the first difference.
    """
    now = contents.contents(study)
    if (workdir / "config.json").exists():
        _check_same(study, now, workdir)
    elif any((workdir / name).exists() for name in ("results.jsonl", "ledger.jsonl", "checkpoints")):
        raise UserError(f"{workdir} holds results but no config.json; expected an empty or a new --workdir")
    return now


def _check_same(study: Study, now: contents.Contents, workdir: Path) -> None:
    records = Records.read(workdir)
    before = _recorded(records.config.get(_CONTENTS), workdir)
    there = recorded_settings(records, workdir)
    _check_arms(_as_recorded(study), there, records, workdir)
    check_settings(study, there, workdir)
    if before is None:
        text = (workdir / WEIGHTS).read_text(errors="replace") if (workdir / WEIGHTS).exists() else ""
        unversioned = {contents.CODE: {"version": "1"}} if records.results else {}
        before = {**contents.recorded_weights(text), **unversioned}
        images = records.config.get(_IMAGES, {})
        for name, digest in study.fingerprints().items():
            if images.get(name, digest) != digest:
                holds = _HOLDS.format(workdir)
                raise UserError(f"{holds}: the images or labels of {name} are others now; {_EXPECTED}")
    before = contents.with_versions(before, there.strategies)
    if changed := contents.change(study, now, before):
        raise UserError(
            f"{_HOLDS.format(workdir)}: {changed}; expected what was there at its start, or another --workdir"
        )


def recorded_settings(records: Records, workdir: Path) -> StudySettings:
    """Return the settings of a workdir's study.

    Raises:
        UserError: Its `config.json` holds none.
    """
    values = {name: value for name, value in records.config.items() if name not in (_CONTENTS, _IMAGES)}
    try:
        return from_json(values)
    except UserError as error:
        raise UserError(f"{workdir / 'config.json'}: {error}; {_EXPECTED}") from error


def check_settings(study: Study, there: StudySettings, workdir: Path, free: tuple[str, ...] = ()) -> None:
    """Check that a study has the settings of a workdir's on which results depend, seeds and strategies aside.

    Args:
        study: The study; its images and weights need not be read.
        there: Settings of the workdir's study.
        workdir: The workdir.
        free: How the names of further settings begin that may differ.

    Raises:
        UserError: A setting differs; names the first one.
    """
    free += _of_other_strategies(study, there)
    for name, value, then in differences(_as_recorded(study), there):
        if not name.startswith(free):
            holds = _HOLDS.format(workdir)
            raise UserError(f"{holds}: {name} was {then!r} there and is {value!r} now; {_EXPECTED}")


def _as_recorded(study: Study) -> StudySettings:
    return from_json(_without_secrets(to_dict(study.settings)))


def _recorded(found: Any, workdir: Path) -> contents.Contents | None:
    """Return the contents in a `config.json` after a check of their types; None for one without."""
    if found is None:
        return None
    where = f"{workdir / 'config.json'}: {_CONTENTS}"
    typed.check(str(workdir / "config.json"), {_CONTENTS: found}, {_CONTENTS: typed.OBJECT})
    typed.check(where, found, dict.fromkeys(found, typed.OBJECT))
    for setting, parts in found.items():
        typed.check(f"{where}.{setting}", parts, dict.fromkeys(parts, typed.TEXT))
    return found


def arms_left(study: Study, workdir: Path) -> tuple[Arm, ...]:
    """Return the arms of a study that have no results yet, without those that successive halving eliminated.

    Args:
        study: The study.
        workdir: Its folder, which may be new.

    Raises:
        UserError: The workdir holds another study.
    """
    check(study, workdir)
    if not (workdir / "config.json").exists():
        return study.arms
    done = {(row["strategy"], row["seed"]) for row in Records.read(workdir).results}
    if study.settings.compute_budget:
        decided = {arm.seed for arm in study.arms if arm.strategy.phases and (arm.name, arm.seed) in done}
        done |= {(arm.name, arm.seed) for arm in study.arms if arm.strategy.phases and arm.seed in decided}
    return tuple(arm for arm in study.arms if (arm.name, arm.seed) not in done)


def _check_arms(ours: StudySettings, there: StudySettings, records: Records, workdir: Path) -> None:
    """Refuse a study that lacks a seed or a strategy with results, or that changes who competes for a budget.

    Raises:
        UserError: One of these is so.
    """
    if there.compute_budget and set(ours.strategies) != set(there.strategies):
        raise UserError(
            f"{workdir}: strategies was {there.strategies} there and is {ours.strategies} now, of which the "
            "one within compute_budget was chosen; expected the same, or another --workdir"
        )
    found = [*((row["strategy"], row["seed"]) for row in records.results)]
    found += [(row.strategy, row.seed) for row in records.rows]
    for strategy, seed in found:
        for title, value, name, left in (
            ("seeds", seed, "seed", ours.seeds),
            ("strategies", strategy.partition("@")[0], "strategy", ours.strategies),
        ):
            if value in getattr(there, title) and value not in left:
                raise UserError(
                    f"{workdir} holds records of {name} {value!r}, which is not in {title} now; expected all "
                    f"of {', '.join(map(str, getattr(there, title)))} (others may be added), or another "
                    "--workdir"
                )


def _of_other_strategies(study: Study, there: StudySettings) -> tuple[str, ...]:
    """Return how settings begin on which only strategies depend that are new, or had no part in the study."""
    both = [strategy for strategy in study.strategies if strategy.name in there.strategies]
    corpora = {part.corpus for strategy in both if strategy.phases for part in strategy.parts}
    settings = study.settings
    custom = {*settings.custom_strategies, *there.custom_strategies} - {strategy.name for strategy in both}
    others = {*settings.corpora, *there.corpora} - corpora
    free = [f"custom_strategies.{name}." for name in custom] + [f"corpora.{name}." for name in others]
    has_corpus = "" in corpora or there.compute_budget
    return ("strategies", "seeds", *free, *(() if has_corpus else ("corpus.",)))


def _without_secrets(value: object) -> Any:
    """Return settings as plain JSON for `config.json`, with secrets removed from URLs."""
    if isinstance(value, Mapping):
        return {str(key): _without_secrets(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_without_secrets(each) for each in value]
    return redact(value) if isinstance(value, str) else value
