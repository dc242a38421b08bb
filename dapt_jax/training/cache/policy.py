"""Decision whether and in which tier a phase caches the activations of its frozen prefix.

The decision is a pure function of the settings, the size of the corpus and the kind of device, so that a
plan, a run and a resumed run agree.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from dapt_jax.cost.memory import tree_bytes
from dapt_jax.errors import UserError
from dapt_jax.fields import check_fields, setting
from dapt_jax.training import accounting, quantised
from dapt_jax.training.steps import PhaseProgram

MODES = ("auto", "on", "off")
DTYPES = ("", "float32", "bfloat16", quantised.INT8)
Tier = Literal["", "memory", "disk"]

FLOPS_PER_BYTE = {"cpu": 50, "gpu": 5_000, "tpu": 10_000}
"""Forward-pass FLOPs that a device does in the time in which a disk delivers a byte.

A disk of 1 GB/s beside a processor that reaches 50 GFLOP/s in convolutions, a GPU that reaches 5 TFLOP/s, a
TPU 10: orders of magnitude. `python -m benchmarks.feature_cache` measures both sides; `cache.flops_per_byte`
sets it.
"""


@dataclasses.dataclass(frozen=True)
class Caching:
    """Which frozen prefixes may be cached, and where.

    Attributes:
        mode: `auto`, `on` (refuses a phase that could be cached but does not fit) or `off`.
        memory_bytes: Largest size of activations on the device, in bytes.
        disk_bytes: Largest size of activations on disk, in bytes; 0 to use no disk.
        dtype: Dtype of cached activations: `float32`, `bfloat16` (half the bytes, 8 bits of mantissa), `int8`
            (about a quarter, off by at most half a step of a scale for each image and channel: see
            `quantised.Quantised`), or empty for the dtype in which they are computed.
        flops_per_byte: Fewest forward FLOPs that a byte read from disk must save; 0 for the device's default.
    """

    mode: str = setting("auto", choices=MODES, doc="Whether activations of a frozen prefix are cached.")
    memory_bytes: int = setting(2 << 30, at_least=0, doc="Bytes of cached activations on the device.")
    disk_bytes: int = setting(8 << 30, at_least=0, doc="Bytes of cached activations on disk; 0: none.")
    dtype: str = setting(
        "", choices=DTYPES, doc="Dtype of cached activations; empty: the one they are computed in."
    )
    flops_per_byte: float = setting(
        0.0,
        at_least=0,
        doc="Least forward FLOPs that a byte read from disk has to save; 0: by the kind of device.",
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class CacheDecision:
    """Whether a phase trains on cached activations, and why.

    Attributes:
        tier: `memory`, `disk`, or empty for no cache.
        views: Views per image that are cached.
        bytes: Bytes that the cache holds for this phase.
        reason: Explanation of the decision.
    """

    tier: Tier
    views: int
    bytes: int
    reason: str

    @property
    def cached(self) -> bool:
        """Whether the phase trains on cached activations."""
        return bool(self.tier)


def cached_spec(shapes: PyTree[jax.ShapeDtypeStruct], dtype: str = "") -> PyTree[jax.ShapeDtypeStruct]:
    """Return shapes of one image's cached activations; a non-empty `dtype` replaces theirs.

    Those of `int8` are `Quantised`, except of pooled features; leaves named in `quantised.EXACT` stay.
    """

    def stored(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        if any(getattr(key, "key", None) in quantised.EXACT for key in path):
            return leaf
        if dtype == quantised.INT8:
            return quantised.spec(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype or leaf.dtype))

    return jax.tree_util.tree_map_with_path(stored, shapes)


def choose_cache(program: PhaseProgram, images: int, image_size: int, caching: Caching) -> CacheDecision:
    """Choose the cache tier from bytes and FLOPs.

    In memory, caching pays off as soon as a view is seen twice; of pairs, an epoch sees two. From disk,
    activations are read in every epoch, so a byte must save more forward FLOPs than the device computes while
    reading it.

    Args:
        program: The phase.
        images: Number of images in the corpus.
        image_size: Side of the data set's images in pixels, unless the phase has its own.
        caching: Caching options.

    Raises:
        UserError: `mode` is `on` where a frozen prefix cannot be cached.
    """
    boundary, epochs, side = program.mask.boundary, program.phase.epochs, program.side(image_size)
    views = 1 if program.augment.is_fixed else program.phase.views
    passes = epochs * (2 if program.is_paired else 1)
    per_row = tree_bytes(cached_spec(accounting.boundary_shape(program.model, boundary, side), caching.dtype))
    size = views * images * per_row
    if caching.mode == "off":
        return CacheDecision("", views, 0, "switched off")
    if boundary == 0:
        return CacheDecision("", views, 0, "nothing below the first trained layer is frozen")
    flops = accounting.forward(program.model, side, boundary).model
    saved = f"saves {flops * images * (passes - views) / 1e12:.3g} TFLOP"
    impossible = ""
    if not program.mix.is_identity:
        impossible = "images are mixed anew in each step"
    elif not views:
        impossible = "images are augmented anew each epoch; views=K would fix K of them"
    elif size > max(caching.memory_bytes, caching.disk_bytes):
        whole = accounting.image_cost(program, image_size)
        share = flops * (passes - views) / ((whole.prefix.model + whole.suffix.model) * epochs)
        exceeds = _exceeds("activations", views, size, caching, caching.memory_bytes)
        impossible = f"{exceeds}; {_ways(size, caching)} {saved}, {share:.0%} of the phase"
    if impossible:
        if caching.mode == "on":
            raise UserError(f"phase {program.phase.name!r}: cache.mode=on, but {impossible}")
        return CacheDecision("", views, 0, impossible)
    if caching.mode == "auto" and views >= passes and views > 1:
        return CacheDecision("", views, 0, f"{epochs} epochs see no view twice")
    if size <= caching.memory_bytes:
        return CacheDecision(
            "memory", views, size, f"{_mib(size)} in memory instead of {passes} passes: {saved}"
        )
    flops_per_byte = flops / per_row
    least = caching.flops_per_byte or FLOPS_PER_BYTE.get(jax.default_backend(), FLOPS_PER_BYTE["gpu"])
    if caching.mode == "auto" and flops_per_byte < least:
        return CacheDecision(
            "",
            views,
            0,
            f"{_mib(size)} exceed memory, and a byte from disk saves {flops_per_byte:.3g} FLOP: less than "
            f"{least:g}",
        )
    if caching.mode == "auto" and views >= passes:
        return CacheDecision("", views, 0, f"{_mib(size)} exceed memory, and one epoch reads nothing twice")
    return CacheDecision(
        "disk",
        views,
        size,
        f"{_mib(size)} on disk instead of {passes} passes: {saved}, {flops_per_byte:.3g} a byte",
    )


def budget_decision(
    phase: str, what: str, views: int, size: int, caching: Caching, first: CacheDecision
) -> CacheDecision:
    """Choose the tier of data that every epoch reads, and that would otherwise be computed for every batch.

    Args:
        phase: Name of the phase.
        what: Name of the data in plans and errors.
        views: Views per image.
        size: Bytes of all of them.
        caching: Caching options.
        first: Decision about activations that take their bytes first.

    Raises:
        UserError: `mode` is `on`, and they fit neither in memory nor on disk.
    """
    if caching.mode == "off":
        return CacheDecision("", views, 0, "switched off")
    left = {
        "memory": caching.memory_bytes - (first.bytes if first.tier == "memory" else 0),
        "disk": caching.disk_bytes - (first.bytes if first.tier == "disk" else 0),
    }
    if size <= left["memory"]:
        return CacheDecision("memory", views, size, f"{_mib(size)} in memory")
    if size <= left["disk"]:
        return CacheDecision("disk", views, size, f"{_mib(size)} on disk")
    impossible = _exceeds(what, views, size, caching, left["memory"], left["disk"])
    if caching.mode == "on":
        raise UserError(f"phase {phase!r}: cache.mode=on, but {impossible}")
    return CacheDecision("", views, 0, impossible)


def _exceeds(what: str, views: int, size: int, caching: Caching, memory: int, disk: int | None = None) -> str:
    """Return why data of some views fit nowhere, and how many views would."""
    disk = caching.disk_bytes if disk is None else disk
    fit = views * max(memory, disk) // max(size, 1)
    line = (
        f"{_mib(size)} of {what} exceed the budgets of {_mib(caching.memory_bytes)} in memory "
        f"and {_mib(caching.disk_bytes)} on disk"
    )
    return (
        line if views <= 1 else f"{line}; {f'views={fit} would fit' if fit > 0 else 'not even one view fits'}"
    )


def _ways(size: int, caching: Caching) -> str:
    """Return what would make activations fit, as the beginning of a clause on what that saves."""
    half = (
        "" if caching.dtype in ("bfloat16", quantised.INT8) else ", or half of it with cache.dtype=bfloat16,"
    )
    return f"cache.disk_mb={-(-size >> 20)}{half}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
