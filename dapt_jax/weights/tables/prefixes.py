"""What training scripts put before every key of a model that they wrap."""

from typing import Any

from dapt_jax.weights.tables.scheme import Entry, Scheme


def prefix(entries: dict[str, Entry], scheme: Scheme, source: dict[str, Any]) -> tuple[str, int]:
    """What stands before every key of a table in a file, and how many of the table's keys are found behind it.

    Training scripts wrap models (`module.`, `backbone.`, `module.encoder_q.`). Any prefix is tried that makes some key of
    the file the table's first; the one with most keys wins. Where several hold as many, a student or query encoder is
    preferred to its averaged copy, as the copy's own names come later in `_PREFERRED`.
    """
    keys = [entry.key for entry in entries.values()]
    marker = min(keys, key=lambda key: (len(key), key)) if keys else ""
    candidates = {""}
    candidates |= {key.removesuffix(marker) for key in source if key.endswith(scheme.separator + marker)}
    hits = {candidate: sum(candidate + key in source for key in keys) for candidate in candidates}
    best = max(hits, key=lambda name: (hits[name], -_rank(name), -len(name)))
    return best, hits[best]


LAYOUTS = {
    "module.": "DataParallel, as SwAV, DeepCluster and SeLa save",
    "module.encoder_q.": "MoCo's query encoder",
    "module.encoder_k.": "MoCo's key encoder",
    "module.encoder.": "PyContrast's encoder",
    "encoder_q.": "MoCo's query encoder",
    "student.": "a student's encoder",
    "student.backbone.": "a student's encoder",
    "teacher.": "a teacher's encoder",
    "teacher.backbone.": "a teacher's encoder",
    "model.": "Lightning",
    "backbone.": "a backbone within a model",
    "encoder.": "an encoder within a model, as segmentation networks save",
}
"""Whose checkpoints put what before every key."""
_PREFERRED = ("", "module.", "module.encoder_q.", "encoder_q.", "student.", "backbone.", "model.", "encoder.")


def _rank(name: str) -> int:
    return _PREFERRED.index(name) if name in _PREFERRED else len(_PREFERRED)
