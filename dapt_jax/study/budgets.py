"""Budgets of caches and dtypes that follow the machine.

They are asked of the machine once, at the first start of a study, and recorded with its settings: a resumed
study decides as it did before.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax

from dapt_jax.cost import hardware, memory
from dapt_jax.data import decode, file_crops
from dapt_jax.data.dataset import Dataset
from dapt_jax.records.study_records import Records
from dapt_jax.runtime import home, processes, streams
from dapt_jax.settings import StudySettings
from dapt_jax.settings.schema import AUTO, FIT
from dapt_jax.settings.training import FINETUNE
from dapt_jax.study.arms import Study
from dapt_jax.training.cache.policy import choose_cache

MEMORY_SHARE, DISK_SHARE = 4, 2
"""Divisors: a quarter of free memory for activations, another for decoded images; half of the free disk."""

STEP_MB = 256
"""Budgets are whole multiples of this many MiB where they reach it, so that they tell little of the moment."""


def resolved(settings: StudySettings, workdir: Path | None = None) -> StudySettings:
    """Return the settings with budgets in MiB in the place of those that follow the machine.

    Args:
        settings: Settings of the study.
        workdir: Its folder, whose recorded budgets hold; None where there is none.
    """
    cache, data, model = settings.cache, settings.data, settings.model
    fitting = (cache.dtype, *model.remat)
    if AUTO not in (cache.memory_mb, cache.disk_mb, data.cache_mb) and FIT not in fitting:
        return settings
    found = processes.broadcast_from_primary(lambda: _asked(cache.dir, workdir))
    own: dict[str, Any] = {
        "memory_mb": found["memory_mb"] if cache.memory_mb == AUTO else cache.memory_mb,
        "disk_mb": found["disk_mb"] if cache.disk_mb == AUTO else cache.disk_mb,
        "dtype": found.get("dtype", FIT) if cache.dtype == FIT else cache.dtype,
    }
    images = found["images_mb"] if data.cache_mb == AUTO else data.cache_mb
    return dataclasses.replace(
        settings,
        cache=dataclasses.replace(cache, **own),
        data=dataclasses.replace(data, cache_mb=images),
        model=dataclasses.replace(model, remat=found.get("remat", model.remat))
        if FIT in model.remat
        else model,
    )


def for_this_device(settings: StudySettings) -> StudySettings:
    """Return the settings without what costs time here and brings nothing; say so.

    On a CPU: float32 in the place of a bfloat16 that it would emulate, and no recomputed activations where its
    compiler keeps them anyway. Results are then those of `model.dtype='float32'`. Settings of other devices, and of
    ahead-of-time compilation for them, are returned as they are.

    Args:
        settings: Settings of the study.
    """
    if jax.default_backend() != "cpu" or settings.mode == "aot":
        return settings
    model = settings.model
    if model.dtype == "bfloat16" and processes.all_reduce_max(hardware.lacks_bfloat16())[0]:
        streams.say(
            "model.dtype: float32 in the place of bfloat16, for which this CPU has neither AMX nor AVX512-BF16"
        )
        model = dataclasses.replace(model, dtype="float32")
    if model.remat and not memory.saves_recomputed():
        model.encoder()  # refuses names of groups that it does not have
        streams.say(
            "model.remat: activations are kept and not computed again, since that saves no memory on a CPU with this "
            "jaxlib; adapt.grad_accum_steps does"
        )
        model = dataclasses.replace(model, remat=())
    return settings if model is settings.model else dataclasses.replace(settings, model=model)


def stated(settings: StudySettings) -> str:
    """Return a line on the budgets of resolved settings."""
    cache = settings.cache
    return (
        f"caches: activations {cache.memory_mb:,} MiB in memory and {cache.disk_mb:,} MiB on disk, decoded "
        f"images {settings.data.cache_mb:,} MiB (by default a quarter of free memory each, and half of the "
        "free disk; cache.memory_mb, cache.disk_mb and data.cache_mb set them)"
    )


def crop_lines(study: Study) -> list[str]:
    """Return a line on the memory of each set whose random crops are cut from files."""
    sets: dict[str, tuple[str, int, Dataset]] = {}
    if most := study.settings.adapt.augment.crop_from:
        sets |= {name or "corpus": ("adapt", most, corpus) for name, corpus in study.corpora.items()}
    for task in study.tasks:
        transfer = study.settings.transfer_of(task.name)
        most = transfer.finetune.augment.crop_from
        if most and FINETUNE in transfer.protocols and not task.is_segmentation:
            sets[f"{task.name} development"] = "transfer.finetune", most, task.development
    found = []
    for name, (section, most, dataset) in sets.items():
        size = file_crops.estimated_bytes(dataset.images, most)
        room = max(0, study.settings.data.cache_bytes - decode.cached_bytes())
        line = f"random crops of {name} ({section}.augment.crop_from={most}): its pictures take about "
        line += (
            f"{size / 2**20:,.1f} MiB beside stored images; data.cache_mb leaves {room / 2**20:,.1f} MiB, so "
        )
        share = min(1.0, room / size)
        some = (
            f"{share:.0%} stay in memory and the others are decoded again in each epoch, for the same crops"
        )
        found.append(line + ("all stay in memory" if share == 1 else some))
    return found


def with_fitting_dtype(study: Study) -> tuple[Study, str]:
    """Return the study with the dtype of cached activations that fits, and a line on it.

    Where some phase of adaptation can be cached in bfloat16 alone, all activations are cached so; bfloat16
    has 8 bits of mantissa, so that each activation is off by 0.39% at most.

    Args:
        study: The study; one whose `cache.dtype` is not `fit` is returned as it is.
    """
    if study.settings.cache.dtype != FIT:
        return study, ""
    caching = study.settings.cache.policy()
    smaller = dataclasses.replace(caching, dtype="bfloat16")
    reason = ""
    adapting = [arm for arm in study.arms_of(study.settings.seeds[0]) if arm.strategy.phases]
    for arm, run in [(each, run) for each in adapting for run in study.runs_of(each)]:
        images, size = len(run.dataset), run.dataset.images.size
        for program in run.programs:
            exact = choose_cache(program, images, size, dataclasses.replace(caching, mode="auto"))
            half = choose_cache(program, images, size, dataclasses.replace(smaller, mode="auto"))
            if half.cached and not exact.cached:
                reason = f"{arm.name}, phase {program.phase.name!r}: {half.reason}"
    settings = dataclasses.replace(
        study.settings, cache=dataclasses.replace(study.settings.cache, dtype="bfloat16" if reason else "")
    )
    line = f"cached activations are bfloat16, off by at most 0.39% each, since only so do they fit: {reason}"
    return dataclasses.replace(study, settings=settings, _runs={}), line if reason else ""


def _asked(folder: str, workdir: Path | None) -> dict[str, Any]:
    """Return the recorded budgets of a workdir, else those of the machine, in MiB."""
    place = home.expanded(folder) if folder else workdir or Path.cwd()
    on_device = (
        hardware.free_memory_bytes() // len(jax.local_devices())
        if jax.default_backend() == "cpu"
        else hardware.device_bytes()
    )
    found: dict[str, Any] = {
        "memory_mb": _rounded(on_device // MEMORY_SHARE),
        "disk_mb": _rounded(_free_disk(place) // DISK_SHARE),
        "images_mb": _rounded(hardware.free_memory_bytes() // MEMORY_SHARE),
    }
    is_begun = workdir is not None and (workdir / "config.json").exists()
    recorded = Records.read(workdir).config if workdir and is_begun else {}
    for section, name, key in (
        ("cache", "memory_mb", "memory_mb"),
        ("cache", "disk_mb", "disk_mb"),
        ("cache", "dtype", "dtype"),
        ("data", "cache_mb", "images_mb"),
    ):
        if (value := recorded.get(section, {}).get(name, AUTO)) not in (AUTO, FIT):
            found[key] = value
    if FIT not in (remat := tuple(recorded.get("model", {}).get("remat", (FIT,)))):
        found["remat"] = remat
    return found


def _free_disk(place: Path) -> int:
    """Return the free bytes where a folder is, or will be."""
    there = next(each for each in (place.absolute(), *place.absolute().parents) if each.exists())
    return shutil.disk_usage(there).free


def _rounded(size: int) -> int:
    """Return bytes as MiB, rounded down."""
    mib = size >> 20
    return mib - mib % STEP_MB if mib >= STEP_MB else mib
