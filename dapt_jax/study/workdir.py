"""A workdir belongs to one study: its `config.json` says which."""

import json
from pathlib import Path
from typing import Any

from dapt_jax.errors import UserError, redact
from dapt_jax.records.study_records import Records
from dapt_jax.runtime import atomic_files
from dapt_jax.settings import from_json, to_dict
from dapt_jax.settings.defaults import differences
from dapt_jax.study.arms import Study


def check_workdir(study: Study, workdir: Path) -> None:
    """Write `config.json`, or check that the existing one belongs to the same study.

    Settings on which results do not depend may differ, and names of an earlier version are accepted.

    Raises:
        UserError: The workdir holds another study; names the first setting that differs.
    """
    path = workdir / "config.json"
    fingerprints = study.fingerprints()
    if path.exists():
        _check_same(study, fingerprints, workdir)
    elif any((workdir / name).exists() for name in ("results.jsonl", "ledger.jsonl", "checkpoints")):
        raise UserError(f"{workdir} holds results but no config.json; expected an empty or a new --workdir")
    try:
        values = {**_without_secrets(to_dict(study.settings)), "images": fingerprints}
        atomic_files.write_text(path, json.dumps(values, indent=1, sort_keys=False) + "\n")
    except OSError as error:
        raise UserError(
            f"{workdir}: cannot be written to ({error.strerror}); expected another --workdir"
        ) from error


def _check_same(study: Study, fingerprints: dict[str, str], workdir: Path) -> None:
    expected = "expected the same, or another --workdir"
    values = dict(Records.read(workdir).config)
    images = values.pop("images", {})
    try:
        there = from_json(values)
    except UserError as error:
        raise UserError(f"{workdir / 'config.json'}: {error}; {expected}") from error
    for name, now, before in differences(from_json(_without_secrets(to_dict(study.settings))), there):
        difference = f"{name} was {before!r} there and is {now!r} now"
        raise UserError(f"{workdir} holds the study of another config: {difference}; {expected}")
    for name in sorted({*fingerprints, *images}):
        if fingerprints.get(name) != images.get(name):
            difference = f"the images or labels of {name} are others now"
            raise UserError(f"{workdir} holds the study of another config: {difference}; {expected}")


def _without_secrets(value: object) -> Any:
    """Return settings as plain JSON for `config.json`, with secrets removed from URLs."""
    if isinstance(value, dict):
        return {str(key): _without_secrets(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_without_secrets(each) for each in value]
    return redact(value) if isinstance(value, str) else value
