"""What a run is besides its weights: compared where it goes on from a checkpoint."""

import dataclasses
import hashlib
import re

import numpy as np

from dapt_jax.data import near_duplicates
from dapt_jax.fields import default_of
from dapt_jax.models.encoder import Encoder
from dapt_jax.objectives import Objective
from dapt_jax.training.cache.prefix import Prefix
from dapt_jax.training.run import TrainingRun
from dapt_jax.weights import identity
from dapt_jax.weights.paths import flatten


def digests(run: TrainingRun) -> dict[str, str]:
    """Return a digest of each part of a run that its numbers depend on, by name in words.

    Devices, names of the run and caches do not count, but for the dtype of a cache that rounds what it holds; images
    count by their decoded pixels, wherever their files are.

    Args:
        run: The run.
    """
    data, loss = run.data, run.loss
    parts: dict[str, object] = {
        "model": run.model,
        "phases": run.phases,
        "loss": loss,
        "optimizer": run.optimizer,
        "plateau": run.plateau,
        "augmentation": (run.augment, run.mix, run.view_seed),
        "batch size": (run.batch_size, run.grad_accum_steps),
        "seed": run.seed,
        "weight rows": tuple(spec.rows for spec in run.model.encoder.specs),
        "dtype of cached activations": _rounding(run),
    }
    found = {name: _of_bytes(text(part).encode()) for name, part in parts.items()}
    found["rows"] = _of_bytes(
        *(np.asarray(rows, "<i8").tobytes() for rows in (data.train_rows, data.val_rows, data.clusters)),
        np.asarray(data.weights, "<f8").tobytes(),
    )
    found["images"] = _of_bytes(near_duplicates.looks(run.dataset.images).digests.astype("<u8").tobytes())
    partners = run.partners(0) if isinstance(loss, Objective) and loss.pairs_patients else np.arange(0)
    found["labels"] = _of_bytes(np.ascontiguousarray(run.labels).tobytes(), partners.tobytes())
    if run.teacher_weights:
        params, batch_stats = run.teacher_weights()
        found["teacher"] = identity.fingerprint(flatten(params) | flatten(batch_stats))
    return found


def _rounding(run: TrainingRun) -> tuple[tuple[str, ...], ...]:
    """Return by phase the dtypes in which activations and targets are cached with less precision than computed."""
    size, dtype, found = run.dataset.images.size, run.caching.dtype, list[tuple[str, ...]]()
    for number, program in enumerate(run.programs):
        prefixes = [Prefix.of(program, 1)] if run.cache_decision(program).cached else []
        if wanted := run.targets_to_compute(number):
            prefixes.append(wanted[0])
        found.append(tuple(dtype for prefix in prefixes if prefix.is_rounded(size, dtype)))
    return tuple(found)


def text(value: object) -> str:
    """Return a value as text that no process, and no field that a later version adds, changes.

    >>> from dapt_jax.training.optim import Optimizer
    >>> text((Optimizer(clip=1.0), 3))
    '(Optimizer(clip=1.0), 3)'

    Args:
        value: A number, a name, a sequence, a set, a dataclass, of which fields with their defaults are left out,
            or an encoder, which its weights describe but for these.
    """
    if isinstance(value, Encoder):
        return text((value.name, value.groups, value.preprocess, value.options, value.lora))
    if dataclasses.is_dataclass(value):
        fields = [(each, text(getattr(value, each.name))) for each in dataclasses.fields(value)]
        own = [f"{field.name}={part}" for field, part in fields if part != text(default_of(field))]
        return f"{type(value).__name__}({', '.join(own)})"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(text, value))})"
    if isinstance(value, set | frozenset):  # whose order another process may change
        return f"{{{', '.join(sorted(map(text, value)))}}}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _of_bytes(*parts: bytes) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()
