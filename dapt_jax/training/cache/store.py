"""A frozen prefix is computed once: its activations are kept, and only the suffix is trained.

The cache is shared by all phases, arms, seeds and target tasks of a study whose prefix weights and images agree; what
another arm has computed is not paid for again, and the ledger says so.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dapt_jax.cost.clock import Clock
from dapt_jax.data.augment import Augment
from dapt_jax.data.decode import ImageStore
from dapt_jax.models.network import Network
from dapt_jax.runtime import processes, sharding
from dapt_jax.training import accounting, freezing
from dapt_jax.training.cache.disk import CacheEntry, DiskCache, SelfHealingReader
from dapt_jax.training.cache.policy import Tier, cached_spec
from dapt_jax.training.steps import PhaseProgram, eval_transform

FILL_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What is computed once: the groups below a boundary, on plain images or on fixed augmented views of them.

    Attributes:
        model: the network; of its outputs nothing depends.
        boundary: index of the first group that is not run.
        augment: of the images.
        seed: of the views; 0 where there is nothing to draw.
        views: number of augmented views per image; 1 for plain images.
    """

    model: Network
    boundary: int
    augment: Augment = dataclasses.field(default_factory=Augment)
    seed: int = 0
    views: int = 1

    @classmethod
    def of(cls, program: PhaseProgram, views: int) -> "Prefix":
        """The prefix of a phase, drawing its views as the uncached phase draws them."""
        seed = 0 if program.augment.is_fixed else program.seed
        model = dataclasses.replace(program.model, outputs=1)
        return cls(model, program.mask.boundary, program.augment, seed, views)

    @property
    def plain(self) -> "Prefix":
        """The same on images that are not augmented."""
        return Prefix(self.model, self.boundary, eval_transform(self.model, self.augment))

    def shapes(self, image_size: int, dtype: str = "") -> Any:
        """Shapes of one image's activations as they are kept, a pytree; `dtype` overrides where it is not empty."""
        return cached_spec(accounting.boundary_shape(self.model, self.boundary, self.augment.size(image_size)), dtype)

    def flops(self, image_size: int) -> int:
        """Model FLOPs of one image in one view."""
        return accounting.forward(self.model, self.augment.size(image_size), self.boundary).model

    def part(self, tree: freezing.Tree) -> freezing.Tree:
        """Copies, on the host, of the leaves of a nested dict that the prefix depends on."""
        groups = self.model.groups
        below = [path for path in freezing.paths(tree) if freezing.group_of(path, groups) in groups[: self.boundary]]
        # A training step gives the buffers of its state away: what is kept has to be a copy.
        return jax.tree.map(np.array, sharding.gather_to_host(freezing.prune(freezing.partition(tree, below)[0])))


@dataclasses.dataclass(frozen=True)
class Activations:
    """What a prefix makes of a set of images: a pytree, in memory or on disk.

    Attributes:
        structure: of the pytree.
        views: per image.
        x: leaves [views, n, ...] on every device; None where they are on disk.
        file: reads them; None where they are in memory.
        flops: model FLOPs of computing them from images.
        seconds: wall time that it took.
        ran: model FLOPs that were run for them now; 0 if they were there already, fewer than `flops` if activations
            below them were.
    """

    structure: Any
    views: int
    x: Any
    file: CacheEntry | SelfHealingReader | None
    flops: int
    seconds: float
    ran: int

    @property
    def reused(self) -> bool:
        """Whether they were there already."""
        return not self.ran

    def rows(self, view: int, rows: np.ndarray) -> Any:
        """The activations of some rows in one view, each leaf [k, ...]."""
        if self.file is None:
            # Of the copy on a device of this process: others may ask at other times, or not at all.
            return jax.tree.map(lambda leaf: leaf.addressable_data(0)[view, rows], self.x)
        return jax.tree.unflatten(self.structure, self.file.read(view, rows))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.x))


class ActivationCache:
    """Activations by what they depend on: in memory up to a budget, least recently used first out, and on disk."""

    def __init__(
        self,
        memory: int,
        files: DiskCache | None = None,
        dtype: str = "",
        say: Callable[[str], None] = print,
        mesh: Mesh | None = None,
    ):
        """Starts with nothing in memory.

        Args:
            memory: bytes to keep on the device.
            files: what is on disk; None for nothing.
            dtype: see `Caching`.
            say: takes a line about what was lost.
            mesh: devices that compute what is kept in memory, and keep it; all that there are by default.
        """
        self._memory, self._files, self._dtype, self._say = memory, files, dtype, say
        self._mesh = mesh or sharding.make_mesh()
        self._entries: collections.OrderedDict[str, Activations] = collections.OrderedDict()

    @classmethod
    def open(
        cls, memory: int, disk: int, folder: Path, dtype: str, say: Callable[[str], None], mesh: Mesh | None = None
    ) -> "ActivationCache":
        """A store with files, or without them and with a line that says why."""
        files = None
        if disk:
            try:
                files = DiskCache(folder, disk, say)
            except OSError as error:
                say(f"no activations are cached on disk: {folder} cannot be written to ({error.strerror or error})")
        return cls(memory, files, dtype, say, mesh)

    def get(
        self,
        prefix: Prefix,
        params: freezing.Tree,
        batch_stats: freezing.Tree,
        images: ImageStore,
        place: Tier = "memory",
        base: tuple[int, Activations] | None = None,
        clock: Clock | None = None,
    ) -> Activations | None:
        """The activations of all images, computed if they are nowhere.

        Args:
            prefix: what is computed.
            params: the network's parameters.
            batch_stats: its statistics.
            images: every one of them is computed.
            place: where to keep them.
            base: a boundary below, and the activations of the same images at it: what is missing is computed from there.
            clock: of who asks; what compiling takes of the time is told to it.

        Returns:
            None where they were to be on disk and cannot be: a line has said why.
        """
        params_part, stats_part = prefix.part(params), prefix.part(batch_stats)
        key = self._key(prefix, params_part, stats_part, images)
        if key in self._entries:
            self._entries.move_to_end(key)
            return dataclasses.replace(self._entries[key], ran=0)
        work = _FillJob(prefix, params_part, stats_part, images, self._dtype, base, clock, self._mesh)
        found = self._files.find(key) if self._files else None
        if place == "disk":
            return self._kept_on_disk(key, work, found)
        (is_missing,) = processes.all_reduce_max(
            found is None
        )  # all ask, whatever each has found: what follows is done together
        if found and not is_missing:
            return self._keep(key, self._load(self._on_disk(key, work, found, ran=0), work))
        start = time.monotonic()
        parts = [jax.tree.leaves(part) for part in work.fill(0)]
        leaves = [np.concatenate(each, 1) for each in zip(*parts, strict=True)]
        x = sharding.replicate(jax.tree.unflatten(work.structure, leaves), self._mesh)
        seconds = time.monotonic() - start
        return self._keep(
            key, Activations(work.structure, prefix.views, x, None, work.flops, seconds, work.missing_flops)
        )

    def _kept_on_disk(self, key: str, work: "_FillJob", found: CacheEntry | None) -> Activations | None:
        """What is on disk, computed there first if it is not; None in all processes where one of them cannot keep it."""
        # Disks are of a process' own, or shared: whoever fills one does so by itself, while others may wait for it.
        work = dataclasses.replace(work, mesh=sharding.local_mesh() if processes.is_multi_process() else work.mesh)
        ran, lost = 0 if found else work.missing_flops, ""
        if not found:
            try:
                found = self._write(key, work) if self._files else None
            except OSError as error:
                lost = f"the frozen prefix is computed anew each epoch: its activations cannot be kept ({error})"
        if lost:
            self._say(lost)
        # What anybody had to compute was computed.
        is_missing, ran = processes.all_reduce_max(found is None, ran > 0)
        if is_missing or found is None:
            return None
        return self._on_disk(key, work, found, ran=work.missing_flops if ran else 0)

    def _write(self, key: str, work: "_FillJob") -> CacheEntry:
        assert self._files is not None
        about = {"what": repr(work.prefix)}
        return self._files.fill(key, work.shapes, work.prefix.views, len(work.images), work.fill, about)

    def _on_disk(self, key: str, work: "_FillJob", entry: CacheEntry, *, ran: int) -> Activations:
        def again() -> CacheEntry:
            assert self._files is not None
            self._files.drop(key)
            # Whichever thread reads first notices damage; the clock is not its.
            return self._write(key, dataclasses.replace(work, clock=None))

        file = SelfHealingReader(entry, again, self._say)
        seconds = entry.about["seconds"]
        return Activations(work.structure, work.prefix.views, None, file, work.flops, seconds, ran)

    def _load(self, stored: Activations, work: "_FillJob") -> Activations:
        rows = np.arange(len(work.images))
        views = [jax.tree.leaves(stored.rows(view, rows)) for view in range(work.prefix.views)]
        x = jax.tree.unflatten(work.structure, [np.stack(each) for each in zip(*views, strict=True)])
        return dataclasses.replace(stored, x=sharding.replicate(x, self._mesh), file=None)

    def _keep(self, key: str, activations: Activations) -> Activations:
        self._entries[key] = activations
        while sum(each.nbytes for each in self._entries.values()) > self._memory and len(self._entries) > 1:
            self._entries.popitem(last=False)
        return activations

    def _key(self, prefix: Prefix, params: Any, batch_stats: Any, images: ImageStore) -> str:
        model = prefix.model
        shown = (
            type(model).__name__, getattr(model, "decoder", ""), model.encoder.name, model.encoder.preprocess, model.dtype,
            prefix.boundary, prefix.augment, prefix.seed, prefix.views, images.size,
            prefix.shapes(images.size, self._dtype),  # a cut encoder pools where the whole one goes on
        )  # fmt: skip
        digest = hashlib.sha256(images.digest().encode())
        digest.update(repr(shown).encode())
        for tree in (params, batch_stats):
            for path, leaf in jax.tree.leaves_with_path(tree):
                digest.update(freezing.path_name(path).encode())
                digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _FillJob:
    """The computation behind an entry."""

    prefix: Prefix
    params: freezing.Tree
    batch_stats: freezing.Tree
    images: ImageStore
    dtype: str
    base: tuple[int, Activations] | None
    clock: Clock | None
    mesh: Mesh

    @functools.cached_property
    def shapes(self) -> Any:
        return self.prefix.shapes(self.images.size, self.dtype)

    @property
    def structure(self) -> Any:
        return jax.tree.structure(self.shapes)

    @property
    def flops(self) -> int:
        return self._flops(self.prefix)

    @property
    def missing_flops(self) -> int:
        """Of `flops`, what is left to run above the base."""
        if not self.base:
            return self.flops
        return self.flops - self._flops(dataclasses.replace(self.prefix, boundary=self.base[0]))

    def _flops(self, prefix: Prefix) -> int:
        return prefix.flops(self.images.size) * len(self.images) * prefix.views

    def fill(self, first: int) -> Iterator[Any]:
        """Activations [views, k, ...] of the images from `first` on; each image is decoded once for all its views."""
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(self.shapes)]
        size = -(-FILL_BATCH // self.mesh.size) * self.mesh.size
        own = sharding.local_slice(size, self.mesh)
        for start in range(first, len(self.images), size):
            rows = np.arange(start, min(start + size, len(self.images)), dtype=np.int32)
            filled = np.resize(rows, size)  # one shape, one executable
            made = [
                np.stack([sharding.gather_to_host(leaf)[: len(rows)] for leaf in each]).astype(dtype)
                for each, dtype in zip(zip(*self._views(filled[own]), strict=True), dtypes, strict=True)
            ]
            yield jax.tree.unflatten(self.structure, made)

    @functools.cached_property
    def _weights(self) -> tuple[freezing.Tree, freezing.Tree]:
        """Parameters and statistics on the devices."""
        return sharding.replicate((self.params, self.batch_stats), self.mesh)

    def _views(self, rows: np.ndarray) -> list[list[jax.Array]]:
        """The leaves of the activations of some images in every view: of all processes' images, where there are several."""
        prefix = self.prefix
        views = range(prefix.views)
        if self.base:
            start, below = self.base
            extend_prefix = _between(prefix.model, start, prefix.boundary)
            inputs = [sharding.shard_batch(below.rows(view, rows), self.mesh) for view in views]
            return [jax.tree.leaves(self._run(extend_prefix, *self._weights, each)) for each in inputs]
        forward = _forward(prefix.model, prefix.boundary, prefix.augment)
        images, index = sharding.shard_batch((self.images.batch(rows), rows), self.mesh)
        draws = [{"seed": np.uint32(prefix.seed), "view": np.int32(view)} for view in views]
        return [jax.tree.leaves(self._run(forward, *self._weights, images, draw, index)) for draw in draws]

    def _run(self, function: Any, *arguments: Any) -> Any:
        """Calls a jitted function; the first time, compiling it is booked as that."""
        shapes = str(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), arguments))
        key = function, shapes, self.mesh
        if key not in _executables:
            with self.clock.span("compile") if self.clock else contextlib.nullcontext():
                _executables[key] = function.lower(*arguments).compile()
        return _executables[key](*arguments)


_executables: dict[tuple[Any, str, Mesh], Callable[..., Any]] = {}


@functools.cache
def _forward(model: Network, boundary: int, augment: Augment) -> Any:
    """Images to activations, compiled once for all arms."""

    def forward(params: Any, batch_stats: Any, images: Any, draw: Any, index: Any) -> Any:
        return model.prefix(params, batch_stats, augment(images, draw["seed"], draw["view"], index), boundary)

    return jax.jit(forward)


@functools.cache
def _between(model: Network, start: int, stop: int) -> Any:
    """Activations to activations further up, compiled once for all arms."""

    def extend_prefix(params: Any, batch_stats: Any, x: Any) -> Any:
        x = jax.tree.map(lambda leaf: leaf.astype(model.dtype), x)
        return model.between(params, batch_stats, x, start, stop)

    return jax.jit(extend_prefix)


def pooled(
    store: ActivationCache,
    model: Network,
    params: freezing.Tree,
    batch_stats: freezing.Tree,
    images: ImageStore,
    clock: Clock | None = None,
) -> tuple[np.ndarray, Activations]:
    """Pooled features of a set of images, float32 [n, features], and what they come from."""
    prefix = Prefix(dataclasses.replace(model, outputs=1), len(model.encoder.groups))
    found = store.get(prefix, params, batch_stats, images, clock=clock)
    assert found is not None  # in memory always
    return np.asarray(found.x.addressable_data(0)[0], np.float32), found
