"""Batches as a pure function of the step.

grain prefetches them, and their position is a number that a checkpoint stores.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from jaxtyping import Float32, Int32, Int64

from dapt_jax.data.dataset import Dataset

if TYPE_CHECKING:
    import grain


@dataclasses.dataclass(frozen=True)
class Order:
    """Order of the examples of a run: a new permutation per epoch, from (seed, epoch) alone.

    The last batch of an epoch is padded with examples of the same epoch that have weight 0, so every example
    counts once per epoch and all batches have one shape.

    Attributes:
        rows: Row numbers of the examples in their data set.
        batch_size: Examples per batch.
        seed: Seed of the permutations.
        weights: Weights of `rows` in the loss; empty if all are 1.
        clusters: Cluster of each of `rows`, of which every epoch draws all equally often; empty to draw every
            row once.
    """

    rows: tuple[int, ...]
    batch_size: int
    seed: int
    weights: tuple[float, ...] = ()
    clusters: tuple[int, ...] = ()

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches per epoch."""
        return -(-len(self.rows) // self.batch_size)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - orders live as long as a run
    def epoch(
        self, epoch: int
    ) -> tuple[Int32[np.ndarray, "steps batch"], Float32[np.ndarray, "steps batch"]]:
        """Return the row numbers and weights of an epoch's batches."""
        rng = np.random.default_rng([self.seed, epoch])
        places = balanced(self.clusters, rng) if self.clusters else rng.permutation(len(self.rows))
        shape = (self.steps_per_epoch, self.batch_size)
        filled = np.resize(places, shape)
        weights = np.asarray(self.weights or (1.0,) * len(self.rows), np.float32)[filled]
        weights[np.arange(filled.size).reshape(shape) >= len(places)] = 0
        return np.asarray(self.rows, np.int32)[filled], weights


def balanced(clusters: Sequence[int], rng: np.random.Generator) -> Int64[np.ndarray, " n"]:
    """Return as many places as there are, every cluster equally often, in random order.

    Of a large cluster a random part is drawn; places of a small one repeat, each equally often.

    >>> places = balanced([0, 0, 0, 0, 0, 1], np.random.default_rng(0))
    >>> (places < 5).sum(), (places == 5).sum()
    (np.int64(3), np.int64(3))

    Args:
        clusters: Cluster of each place.
        rng: Generator of the draws.
    """
    names, members = np.unique(clusters, return_inverse=True)
    share, rest = divmod(len(members), len(names))
    more = rng.permutation(len(names)) < rest
    parts = [
        np.resize(rng.permutation(np.flatnonzero(members == number)), share + more[number])
        for number in range(len(names))
    ]
    return rng.permutation(np.concatenate(parts))


class _Steps:
    """A grain data source whose records are steps: (epoch, row numbers, weights)."""

    def __init__(self, order: Order, epochs: int):
        self.order, self.epochs = order, epochs

    def __len__(self) -> int:
        return self.epochs * self.order.steps_per_epoch

    def __getitem__(self, step: SupportsIndex) -> tuple[int, np.ndarray, np.ndarray]:
        epoch, batch = divmod(int(step), self.order.steps_per_epoch)
        indices, weights = self.order.epoch(epoch)
        return epoch, indices[batch], weights[batch]


Read = Callable[[int, np.ndarray], Mapping[str, Any]]
"""Function from epoch and row numbers to the contents of a batch: a pytree of arrays by name."""


def batches(
    dataset: Dataset,
    order: Order,
    epochs: int,
    *,
    read: Read | None = None,
    labels: np.ndarray | None = None,
    share: slice = slice(None),
    threads: int = 2,
) -> "grain.DatasetIterator":
    """Return the batches of a run, prefetched by grain.

    Args:
        dataset: Data set of the rows of `order`.
        order: Assignment of rows to batches.
        epochs: Number of epochs of the whole run.
        read: Function for the contents of a batch besides labels; by default the images. It may return
            labels of its own as `label`.
        labels: Labels of all rows; by default `Dataset.targets`.
        share: Part of every batch that this process reads; other processes read the rest.
        threads: Number of decoding threads.

    Returns:
        An iterator with `get_state` and `set_state`, over dicts: the result of `read` (`image` uint8 [b,
        size, size, 3]), `label` (see `Dataset.targets`), `weight` float32 [b], `index` int32 [b] (rows),
        `epoch` int32 [].
    """
    import grain  # brings orbax: a second that settings and plans do not need

    of_rows = dataset.targets if labels is None else labels
    read = read or (lambda _, rows: {"image": dataset.images.batch(rows)})

    def load(step: tuple[int, np.ndarray, np.ndarray]) -> dict[str, Any]:
        epoch, indices, weights = step
        rows = indices[share]
        return {
            "label": of_rows[rows],
            **read(epoch, rows),
            "weight": weights[share],
            "index": rows,
            "epoch": np.int32(epoch),
        }

    steps = grain.MapDataset.source(_Steps(order, epochs)).map(load)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    return iter(steps.to_iter_dataset(options))


def in_order(
    dataset: Dataset, rows: np.ndarray, batch_size: int, share: slice = slice(None)
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield every row once, in order, in batches of one shape.

    Args:
        dataset: Data set of the rows.
        rows: Row numbers.
        batch_size: Number of images in a batch.
        share: Part of every batch that is read.

    Yields:
        Images uint8 [batch, size, size, 3], or the share of them, and row numbers [k] of the whole batch with
        k <= batch; the last image is repeated as padding.
    """
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        filled = np.concatenate([part, np.repeat(part[-1:], batch_size - len(part))])
        yield dataset.images.batch(filled[share]), part
