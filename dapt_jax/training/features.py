"""A frozen prefix is computed once: its activations are kept, and only the suffix is trained.

The cache is shared by all phases, arms and seeds of a study whose prefix weights and images agree; what another arm has
computed is not paid for again, and the ledger says so.
"""

import collections
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dapt_jax.data import pipeline
from dapt_jax.data.augment import Augment
from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError, nearest
from dapt_jax.models.classifier import Classifier
from dapt_jax.training import accounting, freezing
from dapt_jax.training.steps import PhaseProgram

MODES = ("auto", "on", "off")


@dataclasses.dataclass(frozen=True)
class Decision:
    """Whether a phase trains on cached activations, and why.

    Attributes:
        cached: whether it does.
        views: views per image that are kept.
        bytes: that the cache holds for this phase.
        reason: in words.
    """

    cached: bool
    views: int
    bytes: int
    reason: str


def decide(program: PhaseProgram, images: int, image_size: int, mode: str, budget: int) -> Decision:
    """Weighs bytes against FLOPs.

    Args:
        program: the phase.
        images: in the corpus.
        image_size: side in pixels.
        mode: `auto`, `on` (refuses where it cannot) or `off`.
        budget: bytes that activations may take.

    Raises:
        UserError: `mode` is unknown, or `on` where caching is impossible.
    """
    if mode not in MODES:
        raise UserError(f"unknown cache mode {mode!r}; {nearest(mode, MODES)}")
    views = 1 if program.augment.is_identity else program.phase.views
    shape = accounting.boundary_shape(program.model, program.mask.boundary, image_size)
    size = views * images * int(np.prod(shape.shape)) * shape.dtype.itemsize
    if mode == "off":
        return Decision(False, views, 0, "switched off")
    impossible = ""
    if program.mask.boundary == 0:
        impossible = "nothing below the first trained layer is frozen"
    elif not views:
        impossible = "images are augmented anew each epoch; views=K would fix K of them"
    elif size > budget:
        impossible = f"{size / 2**20:.0f} MiB of activations exceed the budget of {budget / 2**20:.0f} MiB"
    if impossible:
        if mode == "on" and program.mask.boundary:
            raise UserError(f"phase {program.phase.name!r}: cache=on, but {impossible}")
        return Decision(False, views, 0, impossible)
    if mode == "auto" and views >= program.phase.epochs and views > 1:
        return Decision(False, views, 0, f"{program.phase.epochs} epochs see no view twice")
    return Decision(True, views, size, f"{size / 2**20:.1f} MiB kept instead of {program.phase.epochs} passes")


@dataclasses.dataclass(frozen=True)
class Activations:
    """What a prefix makes of a data set.

    Attributes:
        x: [views, n, ...] on the device.
        flops: model FLOPs that computing it took.
        seconds: wall time that it took.
        reused: whether it was there already.
    """

    x: jax.Array
    flops: int
    seconds: float
    reused: bool


class Store:
    """Activations by what they depend on, least recently used ones dropped past the budget."""

    def __init__(self, budget: int):
        """Starts empty.

        Args:
            budget: bytes to keep.
        """
        self.budget = budget
        self._entries: collections.OrderedDict[str, Activations] = collections.OrderedDict()

    def get(
        self,
        program: PhaseProgram,
        params: freezing.Tree,
        stats: freezing.Tree,
        dataset: Dataset,
        views: int,
        batch_size: int = 32,
    ) -> Activations:
        """The activations of a whole data set at a phase's boundary, computed if they are not here.

        Args:
            program: says boundary and augmentation.
            params: the network's parameters.
            stats: its statistics.
            dataset: every image of it is computed.
            views: number of augmented views.
            batch_size: images at once.
        """
        key = self._key(program, params, stats, dataset, views)
        if key in self._entries:
            self._entries.move_to_end(key)
            return dataclasses.replace(self._entries[key], reused=True)
        start = time.monotonic()
        x = self._compute(program, params, stats, dataset, views, batch_size)
        per_image = accounting.forward(program.model, dataset.images.size, program.mask.boundary)
        entry = Activations(x, per_image.model * len(dataset) * views, time.monotonic() - start, reused=False)
        self._entries[key] = entry
        while sum(each.x.nbytes for each in self._entries.values()) > self.budget and len(self._entries) > 1:
            self._entries.popitem(last=False)
        return entry

    @staticmethod
    def _compute(
        program: PhaseProgram, params: Any, stats: Any, dataset: Dataset, views: int, batch_size: int
    ) -> jax.Array:
        forward = _forward(program.model, program.mask.boundary, program.augment)
        made = []
        for view in range(views):
            parts = []
            for images, rows in pipeline.in_order(dataset, np.arange(len(dataset), dtype=np.int32), batch_size):
                index = np.resize(rows, len(images))
                draw = {"seed": np.uint32(program.seed), "view": np.int32(view)}
                parts.append(np.asarray(forward(params, stats, images, draw, index))[: len(rows)])
            made.append(np.concatenate(parts))
        return jnp.asarray(np.stack(made))

    @staticmethod
    def _key(program: PhaseProgram, params: Any, stats: Any, dataset: Dataset, views: int) -> str:
        model, boundary = program.model, program.mask.boundary
        digest = hashlib.sha256(dataset.fingerprint().encode())
        seed = 0 if program.augment.is_identity else program.seed
        shown = (model.encoder.name, boundary, model.dtype, views, program.augment, seed, dataset.images.size)
        digest.update(repr(shown).encode())
        for tree in (params, stats):
            for path, leaf in jax.tree.leaves_with_path(tree):
                name = freezing.path_name(path)
                if freezing.group_of(name, model.groups) in model.groups[:boundary]:
                    digest.update(name.encode())
                    digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()


@functools.cache
def _forward(model: Classifier, boundary: int, augment: Augment) -> Callable[..., jax.Array]:
    """Images to activations, compiled once for all arms."""

    def forward(params: Any, stats: Any, images: Any, draw: Any, index: Any) -> jax.Array:
        return model.prefix(params, stats, augment(images, draw["seed"], draw["view"], index), boundary)

    return jax.jit(forward)


@functools.cache
def _pooled(model: Classifier) -> Callable[..., jax.Array]:
    return jax.jit(model.features)


def pooled(model: Classifier, params: Any, stats: Any, dataset: Dataset, batch_size: int = 32) -> np.ndarray:
    """Pooled features of a data set, float32 [n, features]."""
    forward = _pooled(model)
    rows = np.arange(len(dataset), dtype=np.int32)
    parts = [
        np.asarray(forward(params, stats, images))[: len(part)]
        for images, part in pipeline.in_order(dataset, rows, batch_size)
    ]
    return np.concatenate(parts)
