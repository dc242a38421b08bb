"""Computation of cached activations, from images or from activations at a lower boundary."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from dapt_jax.cost.clock import Clock
from dapt_jax.data import file_crops
from dapt_jax.data.augment import Augment
from dapt_jax.data.decode import ImageStore
from dapt_jax.models.network import Network
from dapt_jax.runtime import sharding
from dapt_jax.training import freezing
from dapt_jax.training.cache.prefix import Activations, Prefix
from dapt_jax.training.freezing import Tree
from dapt_jax.training.quantised import Quantised, RoundingError, dequantised, quantise


def _is_stored(leaf: object) -> bool:
    return isinstance(leaf, Quantised)


def ignore(flops: int) -> None:
    """Ignore the computed FLOPs."""
    del flops


@dataclasses.dataclass(frozen=True)
class Filling:
    """Options for computing activations that are not cached yet.

    Attributes:
        base: A lower boundary with the activations of the same images there, used as the input; None to
            compute them from the images.
        clock: Clock of the caller, to which seconds of compilation are credited.
        mesh: Devices that compute them, and hold those that are cached in memory.
        on_computed: Function that receives the model FLOPs, called after all images are computed and before
            the activations become visible to others, so that a kill does not lose what the caller records.
    """

    base: tuple[int, Activations] | None = None
    clock: Clock = dataclasses.field(default_factory=Clock)
    mesh: Mesh = dataclasses.field(default_factory=sharding.make_mesh)
    on_computed: Callable[[int], None] = ignore


@dataclasses.dataclass(frozen=True)
class FillJob:
    """The computation of one cache entry.

    Attributes:
        prefix: Prefix to compute.
        params: Parameters of the prefix.
        batch_stats: Batch-norm statistics of the prefix.
        images: All images.
        dtype: Dtype of cached activations; empty for the dtype of the network.
        batch_size: Images per batch; rounded up to a multiple of the number of devices.
        filling: Options of the computation.
        rounding: Error of a reduced dtype, of what was computed so far.
    """

    prefix: Prefix
    params: freezing.Tree
    batch_stats: freezing.Tree
    images: ImageStore
    dtype: str
    batch_size: int
    filling: Filling
    rounding: RoundingError = dataclasses.field(default_factory=RoundingError)

    @property
    def last_group(self) -> str:
        """Name of the last group that the activations have passed."""
        return self.prefix.model.groups[self.prefix.boundary - 1]

    @functools.cached_property
    def shapes(self) -> Any:
        """Shapes of one image's activations, a pytree."""
        return self.prefix.shapes(self.images.size, self.dtype)

    @property
    def structure(self) -> Any:
        """Structure of the activations."""
        return jax.tree.structure(self.shapes)

    @property
    def flops(self) -> int:
        """Model FLOPs from the images."""
        return self._flops(self.prefix)

    @property
    def missing_flops(self) -> int:
        """Model FLOPs from the base."""
        if not self.filling.base:
            return self.flops
        return self.flops - self._flops(dataclasses.replace(self.prefix, boundary=self.filling.base[0]))

    def _flops(self, prefix: Prefix) -> int:
        return prefix.flops(self.images.size) * len(self.images) * prefix.views

    def fill(self, first: int) -> Iterator[Any]:
        """Yield activations [views, k, ...] of the images from `first` on, each decoded once."""
        specs = jax.tree.leaves(self.shapes, is_leaf=_is_stored)
        mesh = self.filling.mesh
        size = -(-self.batch_size // mesh.size) * mesh.size
        own = sharding.local_slice(size, mesh)
        for start in range(first, len(self.images), size):
            rows = np.arange(start, min(start + size, len(self.images)), dtype=np.int32)
            filled = np.resize(rows, size)  # constant shape, so one executable
            computed = [
                self._stored(np.stack([sharding.gather_to_host(leaf)[: len(rows)] for leaf in each]), spec)
                for each, spec in zip(zip(*self._views(filled[own]), strict=True), specs, strict=True)
            ]
            yield jax.tree.unflatten(self.structure, jax.tree.leaves(computed))
        self.filling.on_computed(self.missing_flops)

    def _stored(self, computed: np.ndarray, spec: Any) -> np.ndarray | Quantised:
        """Return activations [views, k, ...] as they are stored, and add up their rounding error."""
        stored: np.ndarray | Quantised
        if isinstance(spec, Quantised):
            stored = quantise(computed, 2)
        elif computed.dtype == spec.dtype:
            return computed
        else:
            stored = computed.astype(spec.dtype)
        self.rounding.add(computed, stored)
        return stored

    @functools.cached_property
    def _weights(self) -> tuple[freezing.Tree, freezing.Tree]:
        """Parameters and statistics on the devices."""
        return sharding.replicate((self.params, self.batch_stats), self.filling.mesh)

    def _views(self, rows: np.ndarray) -> list[list[jax.Array]]:
        """Return the leaves of the activations, in every view, of the images of all processes."""
        prefix, mesh = self.prefix, self.filling.mesh
        views = range(prefix.views)
        if self.filling.base:
            start, below = self.filling.base
            extend_prefix = _between(prefix.model, start, prefix.boundary)
            inputs = [sharding.shard_batch(below.rows(view, rows), mesh) for view in views]
            return [jax.tree.leaves(self._run(extend_prefix, *self._weights, each)) for each in inputs]
        forward = forward_fn(prefix.model, prefix.boundary, prefix.augment)
        index = sharding.shard_batch(rows, mesh)
        found = []
        for view in views:
            if not view or prefix.augment.crop_from:  # else all views are of the same images
                cut = file_crops.batch(self.images, prefix.augment, rows, prefix.seed, view)
                images = sharding.shard_batch(cut, mesh)
            rng = {"seed": np.uint32(prefix.seed), "view": np.int32(view)}
            found.append(jax.tree.leaves(self._run(forward, *self._weights, images, rng, index)))
        return found

    def _run(self, function: jax.stages.Wrapped, *arguments: Any) -> Any:
        """Call a jitted function; seconds of its first call are credited to compilation."""
        shapes = str(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), arguments))
        key = function, shapes, self.filling.mesh
        if key not in _executables:
            with self.filling.clock.span("compile"):
                _executables[key] = function.lower(*arguments).compile()
        return _executables[key](*arguments)


_executables: dict[tuple[Any, str, Mesh], Callable[..., Any]] = {}


@functools.cache
def forward_fn(model: Network, boundary: int, augment: Augment) -> Any:
    """Return the function from images to activations, compiled once for all arms."""

    def forward(
        params: Tree, batch_stats: Tree, images: jax.Array, rng: dict[str, jax.Array], index: jax.Array
    ) -> PyTree[jax.Array]:
        return model.prefix(params, batch_stats, augment(images, rng["seed"], rng["view"], index), boundary)

    return jax.jit(forward)


@functools.cache
def _between(model: Network, start: int, stop: int) -> Any:
    """Return the function from activations to those at a higher boundary, compiled once for all arms."""

    def extend_prefix(params: Tree, batch_stats: Tree, x: PyTree[jax.Array]) -> PyTree[jax.Array]:
        return model.between(params, batch_stats, dequantised(x, model.dtype), start, stop)

    return jax.jit(extend_prefix)
