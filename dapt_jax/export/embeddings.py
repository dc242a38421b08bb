"""`mode=embed`: features of every image of a study's corpora and tasks, from any weights and layer group."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError
from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.records import arrays
from dapt_jax.runtime import safe_paths, sharding, streams
from dapt_jax.settings import StudySettings
from dapt_jax.study import budgets, prepare, strategies
from dapt_jax.study.prepare import NamedSet
from dapt_jax.training.evaluate import ShardedForward
from dapt_jax.weights import locate, normalisation

FOLDER = "embeddings"
BATCH = 64


def run(settings: StudySettings, workdir: Path) -> list[Path]:
    """Write the features of each set of a study to `workdir/embeddings/NAME.npz`.

    A file holds `feature` (float32 [n, d]), `image` (str [n], as its reader names it), `group` (str [n], the
    patient), `label` ([n] class numbers, or [n, classes]), `classes` (str [classes]) and `key`, which names
    architecture, weights, normalisation, dtype, layer group and images. A file with the same key and
    names is not computed again, so the same command resumes.

    Args:
        settings: Settings of the study; `weights` says whose features, `embed_level` of which layer group.
        workdir: Folder of the files.

    Returns:
        The files.

    Raises:
        UserError: The weights or the images cannot be read, the encoder has no such layer group, or the
            settings name no images.
    """
    settings = budgets.for_this_device(strategies.expanded(settings))
    encoder = locate.fitted(settings.weights, settings.model.encoder(), settings.model.preprocess)
    level = settings.embed_level
    if level:
        encoder.index(level)
    resolved = tuple(strategies.resolve(name, encoder, settings) for name in settings.strategies)
    named_sets = prepare.named_sets(settings, resolved)
    if not named_sets:
        raise UserError("the config names no images to embed; expected corpus.kind or tasks.NAME.development")
    params, batch_stats, report = locate.load(settings.weights, Classifier(encoder, 1), seed=0)
    streams.say(f"weights: {report}")
    params.pop(HEAD)
    forward = ShardedForward(
        _features_of(encoder, level, settings.model.dtype), params, batch_stats, sharding.make_mesh()
    )
    # Random weights have no fingerprint: their seed and the architecture say which they are.
    network = (
        f"{encoder.name}, weights {report.fingerprint or report.source}, normalisation "
        f"{normalisation.describe(encoder.preprocess)}, {settings.model.dtype}, level {level or 'pooled'}"
    )
    return [
        _write(prepare.read_set(settings, named).dataset, forward, network, path)
        for named in named_sets
        if (path := _path(workdir, named))
    ]


def _path(workdir: Path, named: NamedSet) -> Path:
    name = f"{named.task}-{named.split}" if named.corpus is None else named.corpus or "corpus"
    return workdir.joinpath(*safe_paths.check(f"{FOLDER}/{name}.npz", workdir))


def _write(dataset: Dataset, forward: ShardedForward, network: str, path: Path) -> Path:
    key = f"{network}, images {dataset.fingerprint()}"
    names = np.asarray(dataset.images.names, str)
    known = arrays.read(path) if path.exists() else {}
    # The key is of what images show; a file that was renamed has the name of then.
    if str(known.get("key", "")) == key and np.array_equal(known.get("image", ()), names):
        streams.say(f"embed: {path} is complete")
        return path
    found = {"image": names, "group": np.asarray(dataset.groups, str), "label": np.asarray(dataset.labels)}
    found |= {"classes": np.asarray(dataset.classes, str), "key": np.asarray(key)}
    path.parent.mkdir(parents=True, exist_ok=True)
    features = in_batches(forward, dataset.images.batch, len(dataset))
    arrays.write(path, {"feature": features, **found})
    streams.say(f"embed: {path} ({len(features):,} images, {features.shape[1]:,} features)")
    return path


def in_batches(
    forward: ShardedForward, read: Callable[[np.ndarray], np.ndarray], count: int, batch_size: int = BATCH
) -> Float32[np.ndarray, "n d"]:
    """Return the features of images, one batch of them in memory at a time.

    Args:
        forward: Function from uint8 images [batch_size, h, w, c] to features.
        read: Function from row numbers to images.
        count: Number of images, 1 or more.
        batch_size: Images of a batch over all devices; rounded up to a multiple of their number.
    """
    batch_size = -(-batch_size // jax.device_count()) * jax.device_count()
    parts = []
    for start in range(0, count, batch_size):
        batch = read(np.arange(start, min(start + batch_size, count)))
        padding = [(0, batch_size - len(batch)), *[(0, 0)] * (batch.ndim - 1)]
        parts.append(np.asarray(forward(np.pad(batch, padding)), np.float32)[: len(batch)])
    return np.concatenate(parts)


@functools.cache
def _features_of(encoder: Encoder, level: str, dtype: str) -> Callable[..., Any]:
    """Return the function from parameters, statistics and images to the features of a layer group."""
    model = Classifier(encoder, 1, dtype)
    if not level:
        return jax.jit(model.features)
    stop = encoder.index(level) + 1

    def features(params: Tree, batch_stats: Tree, images: Array) -> Array:
        x = encoder.preprocess(images, dtype)
        x, _ = encoder.apply(params, batch_stats, x, stop=stop)
        return encoder.as_map(x).mean((1, 2), dtype=jnp.float32)

    return jax.jit(features)
