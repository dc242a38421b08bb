"""Held-out loss of a label-free objective, and the spectrum of the features, after every epoch."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dapt_jax.data import file_crops
from dapt_jax.data.augment import Augment
from dapt_jax.models.classifier import Classifier, pool
from dapt_jax.models.network import Network
from dapt_jax.objectives import SelfDistillation
from dapt_jax.objectives.masking import MaskedViews
from dapt_jax.objectives.network import Pretext
from dapt_jax.runtime import processes, sharding
from dapt_jax.training.cache.fill import forward_fn
from dapt_jax.training.cache.prefix import Activations
from dapt_jax.training.freezing import Tree
from dapt_jax.training.quantised import in_float32
from dapt_jax.training.run import TrainingRun
from dapt_jax.training.steps import PhaseProgram, State, evaluation_params
from dapt_jax.training.targets import view_of
from dapt_jax.transferability import registry

MONITORED = 512
"""Largest number of images whose features are measured after every epoch."""

LIDAR_IMAGES, LIDAR_VIEWS = 128, 4
"""Largest numbers of images, and of cached views of each, whose features LiDAR compares.

Four views of all monitored images took as much time as an epoch of training on five hundred.
"""


@functools.cache
def _loss_fn(model: Pretext, boundary: int) -> Callable[..., jax.Array]:
    """Return the jitted weighted sum of losses of a batch, from activations at a boundary.

    The network is that of test time, without dropout and stochastic depth: the corruption alone is drawn.
    """
    objective = model.objective

    def total(params: Tree, stats: Tree, x: Any, label: Any, weight: jax.Array, key: jax.Array) -> jax.Array:
        start = boundary
        if objective.is_corrupting:
            x, start = model.corrupted(params, stats, x, boundary, key)
        outputs, _ = model.suffix(params, stats, x, start)
        return objective.total(outputs, label, weight)

    return jax.jit(total)


@functools.cache
def _self_distillation_loss_fn(model: Pretext, boundary: int) -> Callable[..., jax.Array]:
    """Return the jitted weighted sum of losses of a batch, from activations of two views at a boundary.

    The student is compared with its moving average, at the end of the objective's schedules.
    """
    objective = model.objective
    assert isinstance(objective, SelfDistillation)

    def total(params: Tree, average: Tree, stats: Tree, kept: Any, x: Any, weight: jax.Array) -> jax.Array:
        outputs, teacher = (model.suffix(each, stats, x, boundary)[0] for each in (params, average))
        return objective.total(outputs, objective.targets(teacher, kept, None), weight)

    return jax.jit(total)


@functools.cache
def _features_fn(model: Pretext, boundary: int) -> Callable[..., jax.Array]:
    """Return the jitted function from activations at a boundary to pooled features."""

    def features(params: Tree, stats: Tree, x: jax.Array) -> jax.Array:
        if boundary < len(model.encoder.groups):
            x, _ = model.encoder.apply(params, stats, x, start=boundary)
        return pool(x)

    return jax.jit(features)


class LabelFreeEvaluator:
    """Metrics of a phase's network without any label, on the first views of fixed images.

    The held-out loss sees the same views and the same corruption after every epoch, so that epochs of a phase
    compare; images have the size that the phase trains on.
    The spectrum is that of up to `MONITORED` images, drawn once from all rows of the run; LiDAR compares cached
    views of up to `LIDAR_IMAGES` of them, where there are two or more.
    """

    def __init__(
        self,
        run: TrainingRun,
        program: PhaseProgram,
        activations: Activations | None,
        targets: Activations | None,
        mesh: Mesh,
    ):
        """Prepare the forward pass.

        Args:
            run: The run.
            program: Program of its phase.
            activations: Cached activations at the phase's boundary, or None to start from images.
            targets: The teacher's outputs, or None for an objective without a teacher.
            mesh: Devices.
        """
        assert isinstance(program.model, Pretext)
        self._run, self._program, self._mesh = run, program, mesh
        self._activations, self._targets = activations, targets
        self._images = run.images_of(program)
        self._model, self._boundary = program.model, program.mask.boundary
        rows = np.concatenate([run.train_rows, run.val_rows])
        drawn = np.random.default_rng(0).permutation(rows)[:MONITORED]
        self._monitored, self._compared = np.sort(drawn), np.sort(drawn[:LIDAR_IMAGES])
        self._own = sharding.local_slice(run.batch_size, mesh)

    def __call__(self, state: State, logits: np.ndarray | None = None) -> dict[str, float]:
        """Return `val_loss` where there are validation rows, `rankme`, `alpha_req`, `feature_sd` and `lidar`.

        Args:
            state: State of the phase.
            logits: Not used.
        """
        del logits
        own = evaluation_params(state), state["batch_stats"]
        weights = sharding.shard_state(own, self._mesh)
        found = self._held_out(weights, state) if len(self._run.val_rows) else {}
        return processes.broadcast_from_primary(lambda: found) | self.spectrum(own)

    def spectrum(self, weights: tuple[Tree, Tree]) -> dict[str, float]:
        """Return `rankme`, `alpha_req` (NaN where undefined) and `feature_sd` of parameters and statistics.

        Where two views or more are cached also `lidar`.
        """
        weights = sharding.shard_state(weights, self._mesh)
        first = self._program.view_pair(0)[0]
        features = self._features(weights, first, self._monitored)
        views = [features[np.searchsorted(self._monitored, self._compared)]]
        cached = min(self._activations.views, LIDAR_VIEWS) if self._activations else 1
        views += [self._features(weights, first + view, self._compared) for view in range(1, cached)]
        return processes.broadcast_from_primary(lambda: spectrum(features, np.stack(views)))

    def _held_out(self, weights: tuple[Tree, Tree], state: State) -> dict[str, float]:
        run, first, sums, count = self._run, self._program.view_pair(0), 0.0, 0
        for number, (rows, filled) in enumerate(self._batches(run.val_rows)):
            x = self._inputs(weights, first[0], filled)
            if self._program.is_paired:
                x = x, self._inputs(weights, first[1], filled)
            label = (
                run.labels[filled]
                if self._targets is None
                else in_float32(self._targets.rows(view_of(self._program, first[0]), filled))
            )
            weight = (np.arange(run.batch_size) < len(rows))[self._own].astype(np.float32)
            label, weight = sharding.shard_batch((label, weight), self._mesh)
            if self._program.self_distillation:
                own = state["params"], *weights, state["objective"]
                total = _self_distillation_loss_fn(self._model, self._boundary)(*own, x, weight)
            else:
                key = jax.random.key(number)
                total = _loss_fn(self._model, self._boundary)(*weights, x, label, weight, key)
            sums += float(sharding.gather_to_host(total))
            count += len(rows)
        return {"val_loss": sums / count}

    def _features(self, weights: tuple[Tree, Tree], view: int, rows: np.ndarray) -> np.ndarray:
        """Return pooled features of rows in one view, float64 [n, d]."""
        parts = []
        for part, filled in self._batches(rows):
            found = self._pooled(weights, view, filled)
            parts.append(sharding.gather_to_host(found)[: len(part)])
        return np.concatenate(parts).astype(np.float64)

    def _pooled(self, weights: tuple[Tree, Tree], view: int, rows: np.ndarray) -> jax.Array:
        """Return pooled features of this process's rows in one view, all patches of which are seen."""
        model, augment = self._model, self._program.augment
        if isinstance(augment, MaskedViews):  # what is cached are features of the visible patches alone
            whole = Classifier(model.encoder, 1, model.dtype)
            pooled: jax.Array = self._forward(
                whole, len(model.encoder.groups), augment.image, weights, view, rows
            )
            return pooled
        return _features_fn(model, self._boundary)(*weights, self._inputs(weights, view, rows))

    def _batches(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield rows of a batch, and this process's part of them, padded to one shape."""
        for start in range(0, len(rows), self._run.batch_size):
            part = rows[start : start + self._run.batch_size]
            yield part, np.resize(part, self._run.batch_size)[self._own].astype(np.int32)

    def _inputs(self, weights: tuple[Tree, Tree], view: int, rows: np.ndarray) -> Any:
        """Return the activations of this process's rows in one view, in the compute dtype, on the devices."""
        if self._activations:
            found = self._activations.rows(view % self._activations.views, rows)
            own = jax.tree.map(np.asarray, self._program.to_compute_dtype(found))
            return sharding.shard_batch(own, self._mesh)
        return self._forward(self._model, self._boundary, self._program.augment, weights, view, rows)

    def _forward(
        self,
        model: Network,
        boundary: int,
        augment: Augment,
        weights: tuple[Tree, Tree],
        view: int,
        rows: np.ndarray,
    ) -> Any:
        """Return activations of this process's rows in one view, from images."""
        rng = {"seed": np.uint32(self._program.view_seed), "view": np.int32(view)}
        cut = file_crops.batch(self._images, augment, rows, self._program.view_seed, view)
        images, index = sharding.shard_batch((cut, rows), self._mesh)
        return forward_fn(model, boundary, augment)(*weights, images, rng, index)


def spectrum(features: np.ndarray, views: np.ndarray) -> dict[str, float]:
    """Return RankMe, alpha-ReQ and the mean standard deviation of features, and LiDAR of several views.

    What is undefined is NaN: alpha-ReQ of a collapsed network, and all of features that are not finite.

    Args:
        features: Features, float [n, d].
        views: Features of views of images, float [v, m, d]; LiDAR needs two of each.
    """
    names = ["rankme", "alpha_req", *(["lidar"] if min(views.shape[:2]) > 1 else [])]
    found = registry.evaluate(names, registry.Sample(features, views=views))
    with np.errstate(invalid="ignore"):
        deviation = float(np.std(features, axis=0).mean())
    return {name: outcome.value for name, outcome in found.items()} | {"feature_sd": deviation}
