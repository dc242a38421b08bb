"""Sampling of a corpus without labels, balanced over clusters of the source weights' features."""

import dataclasses
import json
import warnings
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int
from scipy.cluster import vq

from dapt_jax.errors import UserError
from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.models.encoder import Tree
from dapt_jax.objectives import Objective
from dapt_jax.records.ledger import Row
from dapt_jax.runtime import atomic_files, processes, sharding
from dapt_jax.training import accounting, freezing
from dapt_jax.training.cache import store
from dapt_jax.training.cache.fill import Filling
from dapt_jax.training.context import RunContext
from dapt_jax.training.cost_meter import CostMeter
from dapt_jax.training.run import TrainingRun

FILE = "clusters.json"
"""Name of the file in an arm's folder that holds the cluster of every training row."""

PHASE = "clusters"
"""Name of the forward pass in the ledger."""

ITERATIONS = 50
"""Iterations of k-means."""


def flops(run: TrainingRun, clusters: int) -> int:
    """Return the model FLOPs of the features that a run's images are clustered by; 0 without clusters.

    Args:
        run: The run.
        clusters: The setting `adapt.balance_clusters`.
    """
    if not clusters or not isinstance(run.loss, Objective):
        return 0
    model, size = _pooling(run), run.dataset.images.size
    return accounting.forward(model, size, len(model.encoder.groups)).model * len(run.dataset)


def line(run: TrainingRun, clusters: int) -> str:
    """Return a line on the cost of balanced sampling; empty without clusters."""
    cost = flops(run, clusters)
    if not cost:
        return ""
    return (
        f"{run.tag.strategy}: balanced over {clusters} clusters of the features of {len(run.dataset)} images, "
        f"{cost / 1e12:.3g} TFLOP once, part of DAPT TFLOP"
    )


def balanced(
    run: TrainingRun, clusters: int, weights: tuple[Tree, Tree], folder: Path, context: RunContext
) -> TrainingRun:
    """Return a run that samples every cluster of its images equally often; itself without clusters.

    The features are those of one device, and the clusters of the first process are written down: neither the
    number of devices nor a restart changes them.

    Args:
        run: The run.
        clusters: The setting `adapt.balance_clusters`.
        weights: Parameters and statistics that the run starts from.
        folder: Folder of the arm, in which the clusters are kept.
        context: Surroundings of the run.

    Raises:
        UserError: The features of the images are too few or too alike for so many clusters.
    """
    if not flops(run, clusters):
        return run
    if not processes.sync_file(folder / FILE):
        features = _features(run, weights, context)[run.train_rows]
        found = processes.broadcast_from_primary(
            lambda: cluster(features, clusters, run.seed, run.dataset.name).tolist()
        )
        atomic_files.write_text(folder / FILE, json.dumps(found) + "\n")
        processes.sync_file(folder / FILE)
    members = tuple(json.loads((folder / FILE).read_text()))
    return dataclasses.replace(run, data=dataclasses.replace(run.data, clusters=members))


def cluster(
    features: Float[np.ndarray, "n d"], clusters: int, seed: int, name: str = "corpus"
) -> Int[np.ndarray, " n"]:
    """Return the cluster of each row by k-means of the features scaled to length 1.

    >>> cluster(np.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]]), 2, seed=0).tolist() in ([0, 0, 1], [1, 1, 0])
    True

    Args:
        features: Features.
        clusters: Number of clusters; some may stay empty, and are then left out.
        seed: Seed of the first centres.
        name: Name of the data set.

    Raises:
        UserError: There are fewer different rows than clusters.
    """
    rows = np.asarray(features, np.float64)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    different = len(np.unique(rows, axis=0))
    if different < clusters:
        raise UserError(
            f"{name}: adapt.balance_clusters is {clusters}, but the features of its {len(rows)} training "
            f"images hold {different} different vectors; expected up to {different}, or 0 to sample all "
            "images alike"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of clusters that become empty
        _, found = vq.kmeans2(rows, clusters, iter=ITERATIONS, minit="++", rng=np.random.default_rng(seed))
    return np.unique(found, return_inverse=True)[1]


def _pooling(run: TrainingRun) -> Classifier:
    return Classifier(run.model.encoder.base, 1, run.model.dtype)


def _features(run: TrainingRun, weights: tuple[Tree, Tree], context: RunContext) -> np.ndarray:
    """Return pooled features of all images of a run, and enter their cost into the ledger."""
    model, meter = _pooling(run), CostMeter(context.hardware)
    params = {key: value for key, value in run.model.encoder.merged(weights[0]).items() if key != HEAD}
    filling = Filling(clock=meter.clock, mesh=sharding.make_mesh(jax.local_devices()[:1]))
    with meter.clock.span("cache"):
        features, made = store.pooled(context.cache, model, params, weights[1], run.dataset.images, filling)
    row = Row(
        run.tag.strategy,
        run.seed,
        run.tag.stage,
        run.tag.label + PHASE,
        images=len(run.dataset),
        total_params=freezing.count(model.encoder.abstract()[0]),
        model_flops=made.ran,
        hardware_flops=made.ran,
        cached="filled" if made.ran else "reused",
        reused_flops=made.flops if made.reused else 0,
        reused_s=made.seconds if made.reused else 0.0,
    )
    context.ledger.put(meter.finalize(row))
    return features
