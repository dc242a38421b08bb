"""Energy and carbon of a run, from hardware counters where available, else from a published formula.

The formula is that of Green Algorithms (Lannelongue, Grealey and Inouye, Advanced Science 2021, equation 1),
with which the costs of resource-efficient domain-adaptive pre-training were published (Mehmood et al., arXiv
2204.13280, appendix B). It is proportional to time; a counter is not. Counters cover the devices only: the
formula also charges memory and cooling (PUE), so figures from different sources are not comparable, and every
figure is reported with its source.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from dapt_jax.cost.hardware import Hardware, is_slice
from dapt_jax.errors import UserError, nearest

FORMULA = "green-algorithms"
JOULES_PER_KWH = 3.6e6

# Grams of CO2 equivalent per kWh, as Green Algorithms 2.2 has them: world IEA 2019; US EPA eGRID 2019; UK
# Defra 2021; Europe AIB 2020 production mix; China, India and Japan Climate Transparency 2020.
CARBON_INTENSITY = {
    "world": 475.0,
    "us": 423.94,
    "uk": 231.12,
    "france": 51.28,
    "germany": 338.66,
    "switzerland": 11.52,
    "china": 537.4,
    "india": 708.2,
    "japan": 465.8,
}


def green_algorithms(
    seconds: float,
    *,
    device_watts: float,
    memory_gb: float,
    pue: float = 1.67,
    memory_watts_per_gb: float = 0.3725,
) -> float:
    """Return the energy of a run in kWh: `hours * (devices + memory) * PUE / 1000`.

    Args:
        seconds: Wall time.
        device_watts: Power of all devices together, at full use.
        memory_gb: Main memory available to the run, in GB.
        pue: Power usage effectiveness of the data centre; 1.67 was the world's mean in 2019.
        memory_watts_per_gb: Power of memory, in watts per GB.

    Raises:
        UserError: A quantity is negative.
    """
    quantities = {"seconds": seconds, "device_watts": device_watts, "memory_gb": memory_gb, "pue": pue}
    for name, value in quantities.items():
        if not value >= 0:
            raise UserError(f"energy: {name} is {value!r}, expected a number that is not negative")
    return seconds / 3600 * (device_watts + memory_gb * memory_watts_per_gb) * pue / 1000


def carbon_kg(kwh: float, region: str = "world") -> float:
    """Return the kilograms of CO2 equivalent for electricity used in a region.

    Raises:
        UserError: The region is not in `CARBON_INTENSITY`.
    """
    if region.lower() not in CARBON_INTENSITY:
        raise UserError(
            f"no carbon intensity for region {region!r}; {nearest(region.lower(), CARBON_INTENSITY)}"
        )
    return kwh * CARBON_INTENSITY[region.lower()] / 1000


class Counter(Protocol):
    """A cumulative energy counter."""

    name: str

    def joules(self, seconds: float) -> float | None:
        """Return the joules since the last call, `seconds` ago.

        None means that the counter cannot be trusted for that span.
        """


class Rapl:
    """Running average power limit (RAPL) counters of Intel and AMD processors.

    They cover processor packages and, on servers, their memory.
    """

    name = "rapl"

    def __init__(self, root: Path = Path("/sys/class/powercap")) -> None:
        """Open every package and memory zone.

        Raises:
            OSError: No zone exists, or none can be read (most systems restrict them to root).
        """
        # Package zones include their cores, and "psys" the whole board: those would count twice.
        wanted = [
            zone
            for zone in sorted(root.glob("intel-rapl:*"))
            if (zone / "name").read_text(encoding="utf-8").strip().startswith(("package", "dram"))
        ]
        if not wanted:
            raise FileNotFoundError(f"no energy counters under {root}")
        self._zones = {
            zone / "energy_uj": int((zone / "max_energy_range_uj").read_text(encoding="utf-8"))
            for zone in wanted
        }
        self._last = self._read()

    def _read(self) -> dict[Path, int]:
        return {path: int(path.read_text(encoding="utf-8")) for path in self._zones}

    def joules(self, seconds: float) -> float | None:
        """Return the sum over the zones, assuming that each counter has wrapped at most once."""
        now = self._read()
        used = {path: (now[path] - self._last[path]) % (self._zones[path] + 1) for path in self._zones}
        self._last = now
        # The counter of a package wraps after some tens of minutes. At 500 W per socket, the span must be
        # shorter.
        if seconds * 500 >= min(self._zones.values()) / 1e6:
            return None
        return sum(used.values()) / 1e6


class Nvml:
    """NVIDIA's energy counters (Volta and later), through the optional package `pynvml` (`nvidia-ml-py`)."""

    name = "nvml"

    def __init__(self, devices: int) -> None:
        """Open every GPU that the driver lists.

        Args:
            devices: Number of GPUs that the run uses. The counters do not say which process used a GPU, so
                this must be all of them.

        Raises:
            Exception: The package, the driver or a counter is missing, or other GPUs are present; any
                exception that `pynvml` raises.
        """
        self._nvml = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        count = self._nvml.nvmlDeviceGetCount()
        if count != devices:
            raise OSError(f"{count} GPUs here, {devices} in use")
        self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        self._last = self._read()

    def _read(self) -> float:
        return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles) / 1e3

    def joules(self, seconds: float) -> float | None:
        """Return the joules of all GPUs since the last call."""
        del seconds
        before, self._last = self._last, self._read()
        return self._last - before


def find_counter(device: Hardware) -> Counter | None:
    """Return the counter of the computing device, or None: NVML for a whole GPU, RAPL for a CPU."""
    opener: dict[str, Callable[[], Counter]] = {"gpu": lambda: Nvml(device.count), "cpu": Rapl}
    if device.platform not in opener or is_slice(device.kind):  # a counter is of the whole GPU
        return None
    try:
        return opener[device.platform]()
    except Exception:  # whatever a missing driver, package or permission raises, the formula is there
        return None


class EnergyMeter:
    """Accumulator of the energy of a run.

        meter = EnergyMeter(describe())
        with meter.span():
            train()
        meter.kwh, meter.source

    Keep spans under about ten minutes, or call `sample` inside them, where a RAPL counter may wrap. A span
    that is too long is charged by the formula instead, and `source` then names both.
    """

    def __init__(
        self,
        device: Hardware,
        *,
        counter: Counter | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start at zero.

        Args:
            device: The devices of the run; their power and memory enter the formula.
            counter: The counter to read; by default the one that `find_counter` returns.
            now: Function that returns monotonic seconds.
        """
        self._device = device
        self._counter = find_counter(device) if counter is None else counter
        self._now = now
        self._since: float | None = None
        self._kwh: dict[str, float] = {}

    def __call__(self, seconds: float) -> float:
        """Return the formula's energy in kWh for a number of seconds, for ledger rows without metering."""
        watts = self._device.watts * self._device.count
        return green_algorithms(
            seconds, device_watts=watts, memory_gb=self._device.memory_gb, pue=self._device.pue
        )

    def start(self) -> None:
        """Begin a span; an open span continues."""
        if self._since is None:
            self._since = self._now()
            if self._counter is not None:
                self._counter.joules(0.0)

    def sample(self) -> None:
        """Record the energy that the open span has used so far."""
        if self._since is None:
            return
        now = self._now()
        seconds, self._since = now - self._since, now
        joules = self._counter.joules(seconds) if self._counter is not None else None
        if self._counter is None or joules is None:
            source, kwh = FORMULA, self(seconds)
        else:
            source, kwh = self._counter.name, joules / JOULES_PER_KWH
        self._kwh[source] = self._kwh.get(source, 0.0) + kwh

    def stop(self) -> tuple[float, str]:
        """End the span.

        Returns:
            The kWh of all spans so far, and their source or sources ("rapl", "nvml", "green-algorithms").
        """
        self.sample()
        self._since = None
        return self.kwh, self.source

    @contextlib.contextmanager
    def span(self) -> Iterator[None]:
        """Measure the `with` block."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    @property
    def kwh(self) -> float:
        """Energy recorded so far, in kWh."""
        return sum(self._kwh.values())

    @property
    def source(self) -> str:
        """Source of the figures; several sources are joined by "+"."""
        if self._kwh:
            return "+".join(sorted(self._kwh))
        return FORMULA if self._counter is None else self._counter.name

    def state(self) -> dict[str, float]:
        """Return the state to checkpoint: kWh by source, including the open span so far."""
        self.sample()
        return dict(self._kwh)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: Hardware, **options: Any) -> EnergyMeter:
        """Resume from a stored state on the current machine; energy used in between does not count.

        Raises:
            UserError: A stored value is not a number.
        """
        meter = cls(device, **options)
        for source, kwh in state.items():
            if isinstance(kwh, bool) or not isinstance(kwh, int | float):
                raise UserError(f"stored energy: {source!r} is {kwh!r}, expected kWh")
            meter._kwh[source] = float(kwh)
        return meter
