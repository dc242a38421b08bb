"""Frozen prefixes, and their activations on a set of images."""

import dataclasses
from typing import Any, Protocol

import jax
import numpy as np

from dapt_jax.data.augment import Augment
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.network import Network
from dapt_jax.models.trunk import Trunk
from dapt_jax.objectives.masking import MaskedPretext
from dapt_jax.objectives.network import Pretext
from dapt_jax.runtime import sharding
from dapt_jax.training import accounting, freezing
from dapt_jax.training.cache.policy import cached_spec
from dapt_jax.training.steps import PhaseProgram, eval_transform


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Computation that runs once: the groups below a boundary, on images or fixed views of them.

    Attributes:
        model: Network; nothing depends on its outputs.
        boundary: Index of the first group that is not run.
        augment: Augmentation of the images.
        seed: Seed of the views; 0 without augmentation.
        views: Augmented views per image; 1 for plain images.
        image_size: Side in pixels of the images that it takes; 0 for that of the data set.
    """

    model: Network
    boundary: int
    augment: Augment = dataclasses.field(default_factory=Augment)
    seed: int = 0
    views: int = 1
    image_size: int = 0

    @classmethod
    def of(cls, program: PhaseProgram, views: int) -> "Prefix":
        """Return the prefix of a phase, with the same views as in the uncached phase."""
        seed = 0 if program.augment.is_fixed else program.view_seed
        size = program.phase.image_size
        return cls(_prefix_model(program), program.mask.boundary, program.augment, seed, views, size)

    @property
    def plain(self) -> "Prefix":
        """The same prefix on images without augmentation, of the size of the data set."""
        return Prefix(self.model, self.boundary, eval_transform(self.model, self.augment))

    def shapes(self, image_size: int, dtype: str = "") -> Any:
        """Return shapes of one image's cached activations, a pytree; `dtype` overrides if not empty."""
        return cached_spec(
            accounting.boundary_shape(self.model, self.boundary, self._side(image_size)), dtype
        )

    def is_rounded(self, image_size: int, dtype: str) -> bool:
        """Return whether the activations are cached with less precision than they are computed with."""
        return dtype != "float32" and self.shapes(image_size, dtype) != self.shapes(image_size)

    def flops(self, image_size: int) -> int:
        """Return model FLOPs of one image in one view."""
        return accounting.forward(self.model, self._side(image_size), self.boundary).model

    def _side(self, image_size: int) -> int:
        """Return the side of the images that the network sees, given that of the data set's."""
        return self.augment.size(self.image_size or image_size)

    def part(self, tree: freezing.Tree) -> freezing.Tree:
        """Return copies, on the host, of the leaves of a nested dict that the prefix depends on."""
        groups = self.model.groups
        below = [
            path
            for path in freezing.paths(tree)
            if freezing.group_of(path, groups) in groups[: self.boundary]
        ]
        # A training step donates the buffers of its state, so values that outlive it are copied.
        return jax.tree.map(
            np.array, sharding.gather_to_host(freezing.prune(freezing.partition(tree, below)[0]))
        )


def _prefix_model(program: PhaseProgram) -> Network:
    """Return the network of a phase without what a prefix does not depend on, so that arms share prefixes."""
    model = program.model
    if isinstance(model, MaskedPretext):
        return model
    if not isinstance(model, Pretext):
        return dataclasses.replace(model, outputs=1)
    if program.mask.boundary == len(model.encoder.groups):
        return Trunk(model.encoder, dtype=model.dtype)
    return Classifier(model.encoder, 1, model.dtype)


class ActivationReader(Protocol):
    """Reads activations from disk."""

    def read(self, view: int, rows: np.ndarray) -> list[np.ndarray]:
        """Return the leaves of the activations of some rows in one view, each [k, ...]; thread-safe."""
        ...


@dataclasses.dataclass(frozen=True)
class Activations:
    """Activations of a prefix on a set of images, a pytree.

    Attributes:
        structure: Structure of the pytree.
        views: Views per image.
        flops: Model FLOPs of computing them from images.
        seconds: Wall time of the computation.
        ran: Model FLOPs that were run now: 0 if they were already cached, fewer than `flops` if activations
            at a lower boundary were.
        rounding_error: Root mean square error of a reduced dtype, as a share of the activations'; 0 without.
    """

    structure: Any
    views: int
    flops: int
    seconds: float
    ran: int
    rounding_error: float = dataclasses.field(default=0.0, kw_only=True)

    @property
    def reused(self) -> bool:
        """Whether the activations were already cached."""
        return not self.ran

    def rows(self, view: int, rows: np.ndarray) -> Any:
        """Return the activations of some rows in one view, each leaf [k, ...]."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class DeviceActivations(Activations):
    """Activations in memory.

    Attributes:
        x: Leaves [views, n, ...] on every device.
    """

    x: Any = dataclasses.field(kw_only=True)

    def rows(self, view: int, rows: np.ndarray) -> Any:
        """Return the activations of some rows in one view, each leaf [k, ...]."""
        # Reads the copy on a local device: other processes may call at other times, or not at all.
        return jax.tree.map(lambda leaf: leaf.addressable_data(0)[view, rows], self.x)

    @property
    def nbytes(self) -> int:
        """Bytes on a device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.x))


@dataclasses.dataclass(frozen=True)
class DiskActivations(Activations):
    """Activations on disk.

    Attributes:
        reader: Reader of the activations.
    """

    reader: ActivationReader = dataclasses.field(kw_only=True)

    def rows(self, view: int, rows: np.ndarray) -> Any:
        """Return the activations of some rows in one view, each leaf [k, ...]."""
        return jax.tree.unflatten(self.structure, self.reader.read(view, rows))
