"""What the devices are: peak arithmetic, bandwidth and power, from the makers' published figures.

Sources: NVIDIA data sheets of A100, H100, H200, L4 and T4 (dense figures, without structured sparsity); Google Cloud
TPU documentation for peak and bandwidth; Jouppi et al., "A Domain-Specific Supercomputer for Training Deep Neural
Networks" (CACM 2020) and "TPU v4" (ISCA 2023, maximum measured) for TPU power. Google has published no power for v5e,
v5p and v6e.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

from dapt_jax.errors import UserError, nearest

# Green Algorithms (Lannelongue et al. 2021) charges a processor its thermal design power per core; the entries of its
# table lie between 4 and 24 W, and 12 W is what it takes for a processor it does not know.
CPU_WATTS_PER_CORE = 12.0

# What Green Algorithms charges for a TPU v2 and for many GPUs of its day; stands in where nothing is published.
UNKNOWN_WATTS = 250.0


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The devices of a run.

    Attributes:
        kind: the device's own name, e.g. "NVIDIA H100 80GB HBM3"; for a CPU its model name.
        count: how many JAX devices, over all processes.
        platform: "cpu", "gpu" or "tpu".
        watts: power per JAX device under load, in watts.
        memory_gb: main memory of the hosts in GB (10^9 bytes); what the energy formula charges.
        peak_flops: dense FLOP/s per JAX device by type ("bfloat16", "float16", "tensorfloat32", "float32"), or None.
        bandwidth: device memory bandwidth per JAX device in bytes/s, or None.
        cpu: model name of the host's processor.
        cores: logical cores of the host.
        note: what is not known, in words; empty when everything is.
    """

    kind: str
    count: int
    platform: str
    watts: float
    memory_gb: float
    peak_flops: dict[str, float] | None
    bandwidth: float | None
    cpu: str
    cores: int
    note: str = ""


@dataclasses.dataclass(frozen=True)
class _Chip:
    """Published figures per JAX device: TFLOP/s by type, GB/s, watts (None: not published)."""

    teraflops: dict[str, float]
    gigabytes: float
    watts: float | None


def _nvidia(bfloat16: float, tensorfloat32: float, float32: float, gigabytes: float, watts: float) -> _Chip:
    return _Chip(
        {"bfloat16": bfloat16, "float16": bfloat16, "tensorfloat32": tensorfloat32, "float32": float32},
        gigabytes,
        watts,
    )


# Looked up by the first key that the device's name begins with, so longer names come first. JAX sees the two cores of
# a TPU v2 or v3 chip as two devices; their rows hold half a chip.
_CHIPS: dict[str, _Chip] = {
    "NVIDIA H200": _nvidia(989.4, 494.7, 66.9, 4800, 700),
    "NVIDIA H100 PCIe": _nvidia(756, 378, 51, 2000, 350),
    "NVIDIA H100": _nvidia(989.4, 494.7, 66.9, 3350, 700),
    "NVIDIA A100 80GB PCIe": _nvidia(312, 156, 19.5, 1935, 300),
    "NVIDIA A100-PCIE-40GB": _nvidia(312, 156, 19.5, 1555, 250),
    "NVIDIA A100-SXM4-80GB": _nvidia(312, 156, 19.5, 2039, 400),
    "NVIDIA A100": _nvidia(312, 156, 19.5, 1555, 400),
    "NVIDIA L4": _nvidia(121, 60.5, 30.3, 300, 72),
    "Tesla T4": _Chip({"float16": 65, "float32": 8.1}, 320, 70),
    "TPU v6 lite": _Chip({"bfloat16": 918}, 1640, None),
    "TPU v6e": _Chip({"bfloat16": 918}, 1640, None),
    "TPU v5 lite": _Chip({"bfloat16": 197}, 819, None),
    "TPU v5e": _Chip({"bfloat16": 197}, 819, None),
    "TPU v5p": _Chip({"bfloat16": 459}, 2765, None),
    "TPU v5": _Chip({"bfloat16": 459}, 2765, None),
    "TPU v4": _Chip({"bfloat16": 275}, 1228, 192),
    "TPU v3": _Chip({"bfloat16": 61.5}, 450, 225),
    "TPU v2": _Chip({"bfloat16": 22.5}, 350, 140),
}


def describe() -> Hardware:
    """Describes the devices JAX sees; anything the table does not hold is None, and `note` says so."""
    import jax

    devices = jax.devices()
    return lookup(devices[0].device_kind, len(devices), devices[0].platform, hosts=jax.process_count())


def lookup(kind: str, count: int, platform_name: str, hosts: int = 1) -> Hardware:
    """Describes `count` devices of a kind, on hosts like this one.

    Args:
        kind: `jax.Device.device_kind`.
        count: JAX devices, over all hosts.
        platform_name: `jax.Device.platform`.
        hosts: how many hosts share them.
    """
    cpu, cores = _cpu_model(), os.cpu_count() or 1
    memory_gb = _memory_bytes() * hosts / 1e9
    if platform_name == "cpu":
        # A process may split one processor into many JAX devices: its power is shared out among them.
        watts = CPU_WATTS_PER_CORE * cores * hosts / count
        note = f"CPU: {CPU_WATTS_PER_CORE:g} W per core assumed; peak FLOP/s and bandwidth not known"
        return Hardware(cpu, count, "cpu", watts, memory_gb, None, None, cpu, cores, note)
    name = "gpu" if platform_name in ("gpu", "cuda", "rocm") else platform_name
    chip = next((chip for prefix, chip in _CHIPS.items() if _begins(kind, prefix)), None)
    if chip is None:
        note = f"{kind!r} is not in the table: peak FLOP/s and bandwidth not known, {UNKNOWN_WATTS:g} W assumed"
        return Hardware(kind, count, name, UNKNOWN_WATTS, memory_gb, None, None, cpu, cores, note)
    note = "" if chip.watts is not None else f"{kind}: no published power, {UNKNOWN_WATTS:g} W assumed"
    return Hardware(
        kind,
        count,
        name,
        UNKNOWN_WATTS if chip.watts is None else chip.watts,
        memory_gb,
        {dtype: teraflops * 1e12 for dtype, teraflops in chip.teraflops.items()},
        chip.gigabytes * 1e9,
        cpu,
        cores,
        note,
    )


def mfu(model_flops: float, seconds: float, hardware: Hardware, dtype: str = "bfloat16") -> float | None:
    """Returns model FLOPs utilisation: model FLOPs per second over the devices' peak.

    As in PaLM (arXiv 2204.02311, appendix B) and MaxText: recomputation is not counted as work done, so it lowers the
    figure.

    Args:
        model_flops: FLOPs of the work, over all devices (`Flops.model`).
        seconds: the time it took.
        hardware: the devices it ran on.
        dtype: the type the matrix products ran in; float32 on recent NVIDIA GPUs is "tensorfloat32" by JAX's default.

    Returns:
        A fraction, or None when the device's peak is not known.

    Raises:
        UserError: the device has no published peak for `dtype`, or `seconds` is not positive.
    """
    if hardware.peak_flops is None:
        return None
    if dtype not in hardware.peak_flops:
        raise UserError(f"{hardware.kind}: no published peak for {dtype!r}; {nearest(dtype, hardware.peak_flops)}")
    if not seconds > 0:
        raise UserError(f"utilisation needs a positive time, found {seconds!r} seconds")
    return model_flops / (seconds * hardware.count * hardware.peak_flops[dtype])


def _begins(kind: str, prefix: str) -> bool:
    """Tells whether a name begins with a prefix at a word's end: "NVIDIA L4" is not "NVIDIA L40S"."""
    if not kind.lower().startswith(prefix.lower()):
        return False
    rest = kind[len(prefix) :]
    return not rest[:1].isalnum()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def _memory_bytes() -> int:
    """Returns the main memory of this host; 0 where the system does not tell."""
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
