"""The activation cache: a frozen prefix is computed once, and only the suffix is trained.

The cache is shared by all phases, arms, seeds and target tasks of a study whose prefix weights and images
agree; work done by another arm is not repeated, and the ledger records the reuse.
"""

import collections
import copy
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dapt_jax.cost.clock import Clock
from dapt_jax.data.decode import ImageStore
from dapt_jax.models.network import Network
from dapt_jax.runtime import processes, sharding
from dapt_jax.training import freezing
from dapt_jax.training.cache.disk import CacheEntry, DiskCache, SelfHealingReader
from dapt_jax.training.cache.fill import Filling, FillJob, ignore
from dapt_jax.training.cache.policy import Tier
from dapt_jax.training.cache.prefix import Activations, DeviceActivations, DiskActivations, Prefix

FILL_BATCH = 32


class ActivationCache:
    """Activations by the hash of their inputs: in memory with LRU eviction, and on disk."""

    def __init__(
        self,
        memory: int = 2 << 30,
        files: DiskCache | None = None,
        dtype: str = "",
        say: Callable[[str], None] = print,
        fill_batch: int = FILL_BATCH,
    ):
        """Start with nothing in memory.

        Args:
            memory: Largest size of activations on the device, in bytes.
            files: Activations on disk; None to use no disk.
            dtype: Dtype of cached activations: see `Caching`.
            say: Function that receives a line about lost data.
            fill_batch: Images per batch when activations are computed.
        """
        self._memory, self._files, self._dtype, self._say, self._fill_batch = (
            memory,
            files,
            dtype,
            say,
            fill_batch,
        )
        self._entries: collections.OrderedDict[tuple[str, Mesh], DeviceActivations] = (
            collections.OrderedDict()
        )

    @classmethod
    def open(
        cls, memory: int, disk: int, folder: Path, dtype: str, say: Callable[[str], None]
    ) -> "ActivationCache":
        """Return a cache with up to `disk` bytes of files; reports and uses no disk if that fails."""
        files = None
        if disk:
            try:
                files = DiskCache(folder, disk, say)
            except OSError as error:
                say(
                    f"no activations are cached on disk: {folder} cannot be written to "
                    f"({error.strerror or error})"
                )
        return cls(memory, files, dtype, say)

    @property
    def dtype(self) -> str:
        """Dtype of cached activations; empty for that of the network."""
        return self._dtype

    def in_dtype(self, dtype: str) -> "ActivationCache":
        """Return this cache for activations of another dtype; both share what is in memory and on disk."""
        if dtype == self._dtype:
            return self
        other = copy.copy(self)
        other._dtype = dtype
        return other

    def get(
        self,
        prefix: Prefix,
        params: freezing.Tree,
        batch_stats: freezing.Tree,
        images: ImageStore,
        tier: Tier = "memory",
        filling: Filling | None = None,
    ) -> Activations | None:
        """Return the activations of all images from a tier, and compute them if they are not cached.

        Args:
            prefix: Prefix to compute.
            params: Parameters of the network.
            batch_stats: Batch-norm statistics of the network.
            images: Data set whose images are all computed.
            tier: Tier in which they are cached.
            filling: How missing activations are computed; by default from the images, on all devices.

        Returns:
            The activations; None where they cannot be written to disk, which is reported.
        """
        if tier == "memory":
            return self.in_memory(prefix, params, batch_stats, images, filling)
        key, job = self._job(prefix, params, batch_stats, images, filling or Filling())
        if found := self._find_in_memory(key, job):
            return found
        return self._on_disk(key, job)

    def in_memory(
        self,
        prefix: Prefix,
        params: freezing.Tree,
        batch_stats: freezing.Tree,
        images: ImageStore,
        filling: Filling | None = None,
    ) -> DeviceActivations:
        """Return the activations of all images on the device; see `get` for the arguments."""
        key, job = self._job(prefix, params, batch_stats, images, filling or Filling())
        if found := self._find_in_memory(key, job):
            return found
        stored = self._find_on_disk(key)
        # All processes vote, whatever each has found, since what follows is collective.
        (is_missing,) = processes.all_reduce_max(stored is None)
        if stored and not is_missing:
            return self._put(key, job, _load(self._open(key, job, *stored, ran=0), job))
        start = time.monotonic()
        parts = [jax.tree.leaves(part) for part in job.fill(0)]
        leaves = [np.concatenate(each, 1) for each in zip(*parts, strict=True)]
        x = sharding.replicate(jax.tree.unflatten(job.structure, leaves), job.filling.mesh)
        seconds = time.monotonic() - start
        error = self._stated_error(job)
        made = DeviceActivations(
            job.structure, prefix.views, job.flops, seconds, job.missing_flops, x=x, rounding_error=error
        )
        return self._put(key, job, made)

    def _job(
        self,
        prefix: Prefix,
        params: freezing.Tree,
        batch_stats: freezing.Tree,
        images: ImageStore,
        filling: Filling,
    ) -> tuple[str, FillJob]:
        """Return the key and the computation of an entry."""
        parts = prefix.part(params), prefix.part(batch_stats)
        return self._key(prefix, *parts, images), FillJob(
            prefix, *parts, images, self._dtype, self._fill_batch, filling
        )

    def _find_in_memory(self, key: str, job: FillJob) -> DeviceActivations | None:
        found = self._entries.get((key, job.filling.mesh))
        if found is None:
            return None
        self._entries.move_to_end((key, job.filling.mesh))
        return dataclasses.replace(found, ran=0)

    def _find_on_disk(self, key: str) -> tuple[DiskCache, CacheEntry] | None:
        entry = self._files.find(key) if self._files else None
        return (self._files, entry) if self._files and entry else None

    def _on_disk(self, key: str, job: FillJob) -> DiskActivations | None:
        """Return activations on disk, computed if needed; None everywhere if any process cannot write."""
        stored = self._find_on_disk(key)
        # Disks belong to one process, or are shared: each process fills by itself, while others may wait for
        # it.
        if processes.is_multi_process():
            job = dataclasses.replace(
                job, filling=dataclasses.replace(job.filling, mesh=sharding.local_mesh())
            )
        ran = 0 if stored else job.missing_flops
        if not stored and self._files:
            try:
                stored = self._files, _write(self._files, key, job)
                self._stated_error(job)
            except OSError as error:
                self._say(
                    f"activations behind {job.last_group} cannot be cached, and are computed anew whenever they are "
                    f"needed ({error})"
                )
        # If any process had to compute them, they count as computed.
        is_missing, has_run = processes.all_reduce_max(stored is None, ran > 0)
        if is_missing or stored is None:
            return None
        return self._open(key, job, *stored, ran=job.missing_flops if has_run else 0)

    def _open(
        self, key: str, job: FillJob, files: DiskCache, entry: CacheEntry, *, ran: int
    ) -> DiskActivations:
        def fill_again() -> CacheEntry:
            files.drop(key)
            # Any reading thread may notice damage; it must not use the clock or the ledger.
            filling = dataclasses.replace(job.filling, clock=Clock(), on_computed=ignore)
            return _write(files, key, dataclasses.replace(job, filling=filling))

        reader = SelfHealingReader(entry, fill_again, self._say)
        seconds, error = entry.about["seconds"], entry.about.get("rounding_error", 0.0)
        return DiskActivations(
            job.structure, job.prefix.views, job.flops, seconds, ran, reader=reader, rounding_error=error
        )

    def _stated_error(self, job: FillJob) -> float:
        """Return the relative error of what was computed for a reduced dtype, and say it; 0 without."""
        error = job.rounding.relative
        if error:
            self._say(
                f"activations behind {job.last_group} are cached in {self._dtype}: off by {error:.2%} of their root "
                "mean square"
            )
        return error

    def _put(self, key: str, job: FillJob, activations: DeviceActivations) -> DeviceActivations:
        """Add an entry, and evict the least recently used ones."""
        self._entries[key, job.filling.mesh] = activations
        while sum(each.nbytes for each in self._entries.values()) > self._memory and len(self._entries) > 1:
            self._entries.popitem(last=False)
        return activations

    def _key(
        self,
        prefix: Prefix,
        params: freezing.Tree,
        batch_stats: freezing.Tree,
        images: ImageStore,
    ) -> str:
        model = prefix.model
        shown = (
            type(model).__name__,
            getattr(model, "decoder", getattr(model, "side", "")),
            model.encoder.name,
            model.encoder.preprocess,
            model.dtype,
            prefix.boundary,
            prefix.augment,
            prefix.seed,
            prefix.views,
            images.size,
            prefix.shapes(images.size, self._dtype),  # a truncated encoder pools where the full one continues
        )
        digest = hashlib.sha256(images.digest().encode())
        digest.update(repr(shown).encode())
        for tree in (params, batch_stats):
            for path, leaf in jax.tree.leaves_with_path(tree):
                digest.update(freezing.path_name(path).encode())
                digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()


def _write(files: DiskCache, key: str, job: FillJob) -> CacheEntry:
    """Compute an entry on disk."""
    about: dict[str, Any] = {"what": repr(job.prefix)}

    def fill(first: int) -> Iterator[Any]:
        yield from job.fill(first)
        if not first:  # else the error of the images before the last start is not known
            about["rounding_error"] = job.rounding.relative

    return files.fill(key, job.shapes, job.prefix.views, len(job.images), fill, about)


def _load(stored: DiskActivations, job: FillJob) -> DeviceActivations:
    """Read an entry from disk into memory."""
    rows = np.arange(len(job.images))
    views = [jax.tree.leaves(stored.rows(view, rows)) for view in range(job.prefix.views)]
    x = jax.tree.unflatten(job.structure, [np.stack(each) for each in zip(*views, strict=True)])
    return DeviceActivations(
        stored.structure,
        stored.views,
        stored.flops,
        stored.seconds,
        stored.ran,
        x=sharding.replicate(x, job.filling.mesh),
        rounding_error=stored.rounding_error,
    )


def pooled_prefix(model: Network) -> Prefix:
    """Return the computation of the pooled features of a classifier."""
    return Prefix(dataclasses.replace(model, outputs=1), len(model.encoder.groups))


def pooled(
    cache: ActivationCache,
    model: Network,
    params: freezing.Tree,
    batch_stats: freezing.Tree,
    images: ImageStore,
    filling: Filling | None = None,
) -> tuple[np.ndarray, Activations]:
    """Return pooled features of images, float32 [n, features], and the activations that hold them."""
    found = cache.in_memory(pooled_prefix(model), params, batch_stats, images, filling)
    return np.asarray(found.x.addressable_data(0)[0], np.float32), found
