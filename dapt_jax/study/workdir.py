"""A workdir belongs to one study: its `config.json` says which."""

import json
from pathlib import Path
from typing import Any

from dapt_jax.errors import UserError
from dapt_jax.records.study_records import Records
from dapt_jax.runtime import atomic_files
from dapt_jax.settings import checks

NON_RESULT_SETTINGS = (
    "mode", "data_dir", "checkpoint", "report", "energy", "measure_peak", "data.threads", "data.cache_mb", "data.stall_s",
    "aot", "cache.dir", "parallel", "watch", "profile", "debug",
)  # fmt: skip
"""Settings, or sections of them, that may differ between two starts of one study: they do not change its results."""


def check_workdir(config: Any, fingerprints: dict[str, str], workdir: Path) -> None:
    """Writes `config.json`, or checks that the one that is there is of the same study.

    Raises:
        UserError: the workdir holds another study; names the first setting that differs.
    """
    path = workdir / "config.json"
    mine = json.loads(json.dumps({**config.to_dict(), "images": fingerprints}))
    if path.exists():
        ours, held = checks.flat(mine), checks.flat(Records.read(workdir).config)
        for key in sorted({*ours, *held}):
            section, _, name = key.partition(".")
            if {section, key} & {*NON_RESULT_SETTINGS} or ours.get(key) == held.get(key):
                continue
            differs = f"{key} was {held.get(key)!r} there and is {ours.get(key)!r} now"
            if section == "images":
                differs = f"the images or labels of {name} are others now"
            raise UserError(
                f"{workdir} holds the study of another config: {differs}; expected the same, or another --workdir"
            )
    elif any((workdir / name).exists() for name in ("results.jsonl", "ledger.jsonl", "checkpoints")):
        raise UserError(f"{workdir} holds results but no config.json; expected an empty or a new --workdir")
    try:
        atomic_files.write_text(path, json.dumps(mine, indent=1, sort_keys=False) + "\n")
    except OSError as error:
        raise UserError(f"{workdir}: cannot be written to ({error.strerror}); expected another --workdir") from error
