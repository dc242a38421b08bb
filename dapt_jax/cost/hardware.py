"""Peak arithmetic, bandwidth and power of devices: published figures of the makers; for a CPU, measured.

Sources: NVIDIA data sheets of A100, H100, H200, L4 and T4 (dense figures, without structured sparsity);
Google Cloud TPU documentation for peak, memory and bandwidth; Jouppi et al., "A Domain-Specific Supercomputer
for Training Deep Neural Networks" (CACM 2020) and "TPU v4" (ISCA 2023, maximum measured) for TPU power and
the links of v2, v3 and v4. Google has published no power for v5e, v5p and v6e. The table holds memory and
interconnect of TPUs only, because only `mode=aot` needs them.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

from dapt_jax.cost import peak

# Green Algorithms (Lannelongue et al. 2021) charges a processor its thermal design power per core; the
# entries of its table lie between 4 and 24 W, and it assumes 12 W for processors that it does not list.
BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}
"""Flags of CPUs with bfloat16 arithmetic: x86's AMX and AVX512-BF16, and Arm's."""
CPU_WATTS_PER_CORE = 12.0

# What Green Algorithms charges for a TPU v2 and for many GPUs of its time; used where no figure is
# published.
UNKNOWN_WATTS = 250.0


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The devices of a run.

    Attributes:
        kind: Device name as JAX reports it, e.g. "NVIDIA H100 80GB HBM3"; for a CPU its model name.
        count: Number of JAX devices, over all processes.
        platform: "cpu", "gpu" or "tpu".
        watts: Power per JAX device under load, in watts.
        memory_gb: Main memory of the hosts in GB (10^9 bytes), which the energy formula charges.
        peak_flops: Dense FLOP/s per JAX device by type ("bfloat16", "float16", "tensorfloat32", "float32"),
            or None.
        bandwidth: Device memory bandwidth per JAX device in bytes/s, or None.
        cpu: Model name of the host's processor.
        cores: Logical cores of the host.
        note: Unknown figures, in words; empty when all are known.
        pue: Power usage effectiveness of the data centre; 1.67 was the world's mean in 2019.
        memory_bytes: Device memory per JAX device, or None.
        interconnect: Bytes/s that leave a JAX device over all its links to other devices together, or None.
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
    pue: float = 1.67
    memory_bytes: int | None = None
    interconnect: float | None = None

    def peak_for(self, dtype: str) -> float:
        """Return dense FLOP/s of all devices for activations of a type, 0 where unknown.

        The precision that JAX uses for float32 by default counts: TPUs multiply it as bfloat16, recent NVIDIA
        GPUs as tensorfloat32.
        """
        known = self.peak_flops or {}
        names = [dtype, *({"float32": ["tensorfloat32"], "bfloat16": ["float16"]}.get(dtype, []))]
        if self.platform == "tpu":
            names = ["bfloat16"]
        elif dtype == "float32":
            names.reverse()
        return next((known[name] * self.count for name in names if name in known), 0.0)


@dataclasses.dataclass(frozen=True)
class _Chip:
    """Published figures per JAX device.

    Attributes:
        teraflops: TFLOP/s by type.
        gigabytes: Memory bandwidth in GB/s.
        watts: Power under load; None: not published.
        gibibytes: Memory size in GiB; None: not recorded.
        links: GB/s that leave the device over all its links: half of the published bidirectional figure;
            None: not recorded.
    """

    teraflops: dict[str, float]
    gigabytes: float
    watts: float | None
    gibibytes: float | None = None
    links: float | None = None


def _nvidia(bfloat16: float, tensorfloat32: float, float32: float, gigabytes: float, watts: float) -> _Chip:
    return _Chip(
        {"bfloat16": bfloat16, "float16": bfloat16, "tensorfloat32": tensorfloat32, "float32": float32},
        gigabytes,
        watts,
    )


TPU_SOURCES = (
    "Google Cloud TPU documentation, pages v5e, v5p and v6e: peak compute, HBM and ICI bandwidth per chip; "
    "half of the bidirectional figure leaves a chip (v5p: 4,800 Gbit/s)",
    "Jouppi et al., TPU v4 (ISCA 2023): 6 links of 50 GB/s; A Domain-Specific Supercomputer (CACM 2020): "
    "4 links of 656 and 496 Gbit/s of v3 and v2",
)
"""Sources of the TPU figures."""

# Looked up by the first key that the device's name begins with, so longer names come first. JAX exposes the
# two cores of a TPU v2 or v3 chip as two devices; their rows hold half a chip.
_CHIPS: dict[str, _Chip] = {
    "NVIDIA H200 NVL": _nvidia(835.5, 417.5, 60, 4800, 600),
    "NVIDIA H200": _nvidia(989.4, 494.7, 66.9, 4800, 700),
    "NVIDIA H100 NVL": _nvidia(835.5, 417.5, 60, 3900, 400),
    "NVIDIA H100 PCIe": _nvidia(756, 378, 51, 2000, 350),
    "NVIDIA H100": _nvidia(989.4, 494.7, 66.9, 3350, 700),
    "NVIDIA A100 80GB PCIe": _nvidia(312, 156, 19.5, 1935, 300),
    "NVIDIA A100-PCIE-40GB": _nvidia(312, 156, 19.5, 1555, 250),
    "NVIDIA A100-SXM4-80GB": _nvidia(312, 156, 19.5, 2039, 400),
    "NVIDIA A100": _nvidia(312, 156, 19.5, 1555, 400),
    "NVIDIA L4": _nvidia(121, 60.5, 30.3, 300, 72),
    "Tesla T4": _Chip({"float16": 65, "float32": 8.1}, 320, 70),
    "TPU v6 lite": _Chip({"bfloat16": 918}, 1640, None, 32, 400),
    "TPU v6e": _Chip({"bfloat16": 918}, 1640, None, 32, 400),
    "TPU v5 lite": _Chip({"bfloat16": 197}, 819, None, 16, 200),
    "TPU v5e": _Chip({"bfloat16": 197}, 819, None, 16, 200),
    "TPU v5p": _Chip({"bfloat16": 459}, 2765, None, 95, 600),
    "TPU v5": _Chip({"bfloat16": 459}, 2765, None, 95, 600),
    "TPU v4": _Chip({"bfloat16": 275}, 1228, 192, 32, 300),
    "TPU v3": _Chip({"bfloat16": 61.5}, 450, 225, 16, 164),
    "TPU v2": _Chip({"bfloat16": 22.5}, 350, 140, 8, 124),
}


def describe(
    *, measure: bool = False, watts: float = 0.0, pue: float = Hardware.pue, memory_gb: float = 0.0
) -> Hardware:
    """Describe the devices that JAX sees; figures not in the table are None, and `note` says so.

    Args:
        measure: Whether to measure a CPU that has not been measured before: see `dapt_jax.cost.peak`.
        watts: Power per JAX device, if the user knows it; 0 takes the table's.
        pue: Power usage effectiveness of the data centre.
        memory_gb: Main memory that energy is charged for, in GB; 0 takes this machine's.
    """
    import jax

    from dapt_jax.cost.memory import memory_stats
    from dapt_jax.runtime import processes

    devices = jax.devices()
    found = lookup(devices[0].device_kind, len(devices), devices[0].platform, hosts=processes.hosts())
    if found.platform == "cpu":
        figures = (peak.measured if measure else peak.stored)(found.cpu, found.cores)
        found = _with_measured(found, figures)
    if found.platform != "cpu" and not any(memory_stats(device) for device in jax.local_devices()):
        lost = f"{found.kind} reports no memory figures: peak memory is that of the process on the host"
        found = dataclasses.replace(found, note="; ".join(filter(None, (found.note, lost))))
    return dataclasses.replace(
        found, watts=watts or found.watts, pue=pue, memory_gb=memory_gb or found.memory_gb
    )


def device_bytes() -> int:
    """Return the memory of a local device in bytes; 0 if unknown.

    The figure is the one that the device reports, or on CPUs its share of the host's main memory.
    """
    import jax

    from dapt_jax.cost.memory import memory_stats

    devices = jax.local_devices()
    limits = [memory_stats(device).get("bytes_limit") for device in devices]
    if all(limits):
        return min(int(limit) for limit in limits if limit)
    return _memory_bytes() // len(devices)


def free_memory_bytes() -> int:
    """Return the main memory that this process may still take in bytes; 0 where the system does not say.

    Limits of control groups (containers, batch jobs) count.
    """
    info = Path("/proc/meminfo")
    if not info.exists():
        return _memory_bytes()
    lines = (line.split() for line in info.read_text().splitlines())
    free = next((int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"), 0)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (Path(path).read_text().strip() for path in (limit, used))
        except OSError:
            continue
        if most.isdecimal() and now.isdecimal():
            free = min(free, max(0, int(most) - int(now)))
    return free


def _with_measured(found: Hardware, figures: dict[str, float] | None) -> Hardware:
    """Return a CPU with its measured figures, divided among its JAX devices."""
    assumed = f"{CPU_WATTS_PER_CORE:g} W per core assumed"
    if figures is None:
        lost = (
            "peak FLOP/s and bandwidth not known, so no utilisation "
            "(python -m dapt_jax.cost.hardware measures them once)"
        )
        return dataclasses.replace(found, note=f"CPU: {assumed}; {lost}")
    shares = {name: value / found.count for name, value in figures.items()}
    bandwidth = shares.pop("bandwidth")
    return dataclasses.replace(found, peak_flops=shares, bandwidth=bandwidth, note=f"CPU: {assumed}")


def lookup(kind: str, count: int, platform_name: str, hosts: int = 1) -> Hardware:
    """Describe `count` devices of a kind, on hosts like this one.

    Args:
        kind: `jax.Device.device_kind`.
        count: Number of JAX devices, over all hosts.
        platform_name: `jax.Device.platform`.
        hosts: Number of hosts that share them.
    """
    cpu, cores = _cpu_model(), os.cpu_count() or 1
    memory_gb = _memory_bytes() * hosts / 1e9
    if platform_name == "cpu":
        # A process may split one processor into many JAX devices, which share its power.
        watts = CPU_WATTS_PER_CORE * cores * hosts / count
        return _with_measured(Hardware(cpu, count, "cpu", watts, memory_gb, None, None, cpu, cores), None)
    name = "gpu" if platform_name in ("gpu", "cuda", "rocm") else platform_name
    chip = next((chip for prefix, chip in _CHIPS.items() if _begins(kind, prefix)), None)
    if chip is None or is_slice(kind):
        why = "is a slice of a GPU, of which makers publish the whole" if chip else "is not in the table"
        note = f"{kind!r} {why}: peak FLOP/s and bandwidth not known, {UNKNOWN_WATTS:g} W assumed"
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
        memory_bytes=None if chip.gibibytes is None else int(chip.gibibytes * 2**30),
        interconnect=None if chip.links is None else chip.links * 1e9,
    )


def utilisation(flops: float, seconds: float, peak_flops: float) -> float | None:
    """Return the fraction of the devices' peak FLOP/s that was achieved: MFU or HFU, depending on `flops`.

    Model FLOPs utilisation takes model FLOPs (`Flops.model`): recomputation is not useful work, so it lowers
    the figure. Hardware FLOPs utilisation takes all FLOPs that ran (`Flops.hardware`). As in PaLM (arXiv
    2204.02311, appendix B) and MaxText.

    Args:
        flops: FLOPs of the work, over all devices.
        seconds: Time that the work took.
        peak_flops: FLOP/s of all devices together: see `Hardware.peak_for`.

    Returns:
        A fraction, or None where the peak is unknown or no time has passed.
    """
    return flops / (seconds * peak_flops) if seconds > 0 and peak_flops > 0 else None


def _begins(kind: str, prefix: str) -> bool:
    """Return whether a name begins with a prefix at a word's end: "NVIDIA L4" is not "NVIDIA L40S"."""
    if not kind.lower().startswith(prefix.lower()):
        return False
    rest = kind[len(prefix) :]
    return not rest[:1].isalnum()


def is_slice(kind: str) -> bool:
    """Return whether a device is an instance of a GPU that its driver divides (MIG), by its name.

    >>> is_slice("NVIDIA A100-SXM4-40GB MIG 1g.5gb"), is_slice("NVIDIA A100-SXM4-40GB")
    (True, False)
    """
    return "MIG" in kind.split()


def lacks_bfloat16() -> bool:
    """Return whether this CPU has no bfloat16 arithmetic by its flags; False where the system states none."""
    flags = {*_cpu_info("flags").split(), *_cpu_info("Features").split()}  # x86 and Arm
    return bool(flags) and not flags & BFLOAT16_FLAGS


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine() or "unknown CPU"


def _cpu_info(name: str) -> str:
    """Return what Linux states about the first processor; empty where it states nothing of that name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name and value.strip():
                return value.strip()
    return ""


def _memory_bytes() -> int:
    """Return the main memory of this host; 0 where the system does not report it."""
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def main() -> None:
    """Measure this machine's CPU again and print the figures."""
    here = lookup("cpu", 1, "cpu")
    for name, value in peak.measured(here.cpu, here.cores, anew=True).items():
        unit = "GB/s" if name == "bandwidth" else "GFLOP/s"
        print(f"{name}: {value / 1e9:,.1f} {unit}")
    kept = "kept" if peak.stored(here.cpu, here.cores) else "cannot be kept"
    print(f"{here.cpu}, {here.cores} cores; {kept} in {peak.file()}")


if __name__ == "__main__":
    main()
