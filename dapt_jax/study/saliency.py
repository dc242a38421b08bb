"""Occlusion saliency of a few examples: how far the predicted probability falls without a part of the image.

Zeiler and Fergus, arXiv 1311.2901, section 4.2: squares of the image are replaced one at a time, here by its
mean colour, and the drop of the probability of the predicted class is recorded. It needs forward passes only,
and no gradient, so that it is the same for every encoder and head.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from dapt_jax.cost.clock import Clock
from dapt_jax.data.decode import ImageStore
from dapt_jax.models.classifier import Classifier
from dapt_jax.records.ledger import Row
from dapt_jax.records.vocabulary import SALIENCY
from dapt_jax.runtime import processes, sharding
from dapt_jax.study.adapt import Adapted
from dapt_jax.study.arms import Arm
from dapt_jax.study.predictions import FoldPredictions
from dapt_jax.study.tasks import Task
from dapt_jax.training import freezing
from dapt_jax.training.cache.fill import Filling, FillJob
from dapt_jax.training.cache.prefix import Prefix
from dapt_jax.training.cache.store import FILL_BATCH
from dapt_jax.training.context import RunContext
from dapt_jax.training.cost_meter import CostMeter
from dapt_jax.training.head_sweep import Heads
from dapt_jax.training.linear_head import LinearHeads

GRID = 7
"""Squares along a side of an image; an image costs `GRID**2 + 1` forward passes."""


def occluded(image: UInt8[np.ndarray, "h w 3"], grid: int = GRID) -> UInt8[np.ndarray, "n h w 3"]:
    """Return an image, then copies with one of `grid` by `grid` squares in its mean colour, row by row.

    >>> found = occluded(np.arange(12, dtype=np.uint8).reshape(2, 2, 3), grid=2)
    >>> found.shape, found[1, 0, 0].tolist(), found[1, 1, 1].tolist()
    ((5, 2, 2, 3), [4, 6, 6], [9, 10, 11])
    """
    height, width = image.shape[:2]
    rows = np.linspace(0, height, grid + 1).round().astype(int)
    columns = np.linspace(0, width, grid + 1).round().astype(int)
    copies = np.repeat(image[None], grid * grid + 1, 0)
    colour = image.mean((0, 1)).round().astype(np.uint8)
    for number in range(grid * grid):
        row, column = divmod(number, grid)
        copies[number + 1, rows[row] : rows[row + 1], columns[column] : columns[column + 1]] = colour
    return copies


def drops(
    probability: Callable[[UInt8[np.ndarray, "n h w 3"]], Float[np.ndarray, " n"]],
    image: UInt8[np.ndarray, "h w 3"],
    grid: int = GRID,
) -> Float[np.ndarray, "grid grid"]:
    """Return how far a probability falls, and below 0 rises, without each square of an image, float32.

    Args:
        probability: Function from images to the probability of the class that is explained.
        image: The image.
        grid: Squares along a side.
    """
    values = np.asarray(probability(occluded(image, grid)), np.float32)
    return (values[0] - values[1:]).reshape(grid, grid)


class Explainer(abc.ABC):
    """Saliency of predictions by what an arm trained on each fold, for one protocol."""

    def __init__(self, task: Task, context: RunContext):
        """Explain nothing before the folds are known.

        Args:
            task: The task.
            context: Environment of the runs.
        """
        self._task, self._context = task, context
        # One process explains alone, where the images are written.
        self._mesh = sharding.local_mesh() if processes.is_multi_process() else context.mesh
        self._held_rows: list[np.ndarray] = []
        self._meter: CostMeter | None = None
        self._flops = self._images = 0

    @property
    @abc.abstractmethod
    def _params(self) -> int:
        """Number of parameters that a pass goes through."""

    @abc.abstractmethod
    def _probability(
        self, shares: np.ndarray, column: int, clock: Clock, images: np.ndarray
    ) -> Float[np.ndarray, " n"]:
        """Return the probability of a class, the mean over folds by their shares, and count FLOPs and images."""

    def __call__(
        self, split: str, rows: Int[np.ndarray, " k"], classes: Int[np.ndarray, " k"]
    ) -> Float[np.ndarray, "k grid grid"]:
        """Return the saliency of images, each by what predicted it.

        Args:
            split: Their split.
            rows: Their rows among the scored images.
            classes: The predicted class of each.
        """
        scored = self._task.scored_sets(self._task.scored_rows)[split]
        maps = np.zeros((len(rows), GRID, GRID), np.float32)
        self._meter = self._meter or CostMeter(self._context.hardware)
        clock = self._meter.clock
        with clock.span("eval"):
            for place, (row, column) in enumerate(zip(rows, classes, strict=True)):
                shares = self._shares(split, int(row))
                predict = functools.partial(self._probability, shares, int(column), clock)
                maps[place] = drops(predict, scored.images.batch(np.array([row]))[0])
        return maps

    def account(self, arm: Arm) -> None:
        """Enter the passes into the ledger.

        They are hardware FLOPs: what explains a result is no part of what it costs to reach it.
        """
        if self._meter is None:
            return
        row = Row(
            arm.name,
            arm.seed,
            "transfer",
            f"{self._task.name}/{SALIENCY}",
            images=self._images,
            hardware_flops=self._flops,
            total_params=self._params,
        )
        self._context.ledger.put(self._meter.finalize(row))

    def _shares(self, split: str, row: int) -> Float[np.ndarray, " folds"]:
        """Return the share of each fold in the prediction of an image."""
        if split != self._task.scored:
            return np.full(len(self._held_rows), 1 / len(self._held_rows))
        own = self._task.scored_rows[row]
        return np.array([own in rows for rows in self._held_rows], float)


class HeadExplainer(Explainer):
    """Saliency of predictions by heads on an arm's frozen features."""

    def __init__(self, adapted: Adapted, task: Task, model: Classifier, context: RunContext):
        """Explain nothing before `hold` has received the heads.

        Args:
            adapted: The arm's encoder.
            task: The task.
            model: The encoder with a head.
            context: Environment of the runs.
        """
        super().__init__(task, context)
        self._adapted = adapted
        self._prefix = Prefix(dataclasses.replace(model, outputs=1), len(model.encoder.groups))

    def hold(self, heads: LinearHeads | Heads, features: np.ndarray, out_of_fold: FoldPredictions) -> None:
        """Take the heads of all folds, and the development rows that each holds out.

        Args:
            heads: The heads.
            features: Features of the development images; not needed.
            out_of_fold: Probabilities of the rows that each fold holds out, and these rows.
        """
        self._heads, self._held_rows = heads, [rows for _, rows in out_of_fold]

    @property
    def _params(self) -> int:
        return freezing.count(self._prefix.model.encoder.abstract()[0])

    def _probability(
        self, shares: np.ndarray, column: int, clock: Clock, images: np.ndarray
    ) -> Float[np.ndarray, " n"]:
        adapted, prefix = self._adapted, self._prefix
        weights = prefix.part(adapted.params), prefix.part(adapted.batch_stats)
        store = ImageStore.from_arrays(images, images.shape[1])
        job = FillJob(prefix, *weights, store, "", FILL_BATCH, Filling(clock=clock, mesh=self._mesh))
        features = np.concatenate([jax.tree.leaves(part)[0][0] for part in job.fill(0)])
        self._flops += job.flops
        self._images += len(images)
        return np.asarray(shares @ self._heads.probabilities(features.astype(np.float32))[:, :, column])


@dataclasses.dataclass(frozen=True)
class FoldNetwork:
    """The network that was fine-tuned on one fold.

    Attributes:
        probabilities: Function from images [n, h, w, 3] and devices to probabilities [n, classes].
        flops: FLOPs of it for one image.
        params: Number of its parameters.
    """

    probabilities: Callable[[UInt8[np.ndarray, "n h w 3"], Mesh], Float[np.ndarray, "n classes"]]
    flops: int
    params: int


class NetworkExplainer(Explainer):
    """Saliency of predictions by fine-tuned networks, of which each fold has its own."""

    def __init__(self, task: Task, context: RunContext):
        """Explain nothing before `hold` has received the networks: see `Explainer`."""
        super().__init__(task, context)
        self._networks: list[FoldNetwork] = []

    def hold(self, network: FoldNetwork, held_rows: np.ndarray) -> None:
        """Take the network of the next fold, and the development rows that it holds out."""
        self._networks.append(network)
        self._held_rows.append(held_rows)

    @property
    def _params(self) -> int:
        return self._networks[0].params

    def _probability(
        self, shares: np.ndarray, column: int, clock: Clock, images: np.ndarray
    ) -> Float[np.ndarray, " n"]:
        total = np.zeros(len(images), np.float64)
        for share, network in zip(shares, self._networks, strict=True):
            if share:
                total += share * network.probabilities(images, self._mesh)[:, column]
                self._flops += network.flops * len(images)
                self._images += len(images)
        return total
