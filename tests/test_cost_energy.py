import sys
from types import SimpleNamespace

import pytest

from dapt_jax.cost import energy
from dapt_jax.cost.energy import EnergyMeter, Nvml, Rapl, carbon_kg, find_counter, green_algorithms
from dapt_jax.cost.hardware import Hardware
from dapt_jax.errors import UserError

CPU = Hardware("cpu", 2, "cpu", 125.0, 35.0, None, None, "cpu", 8)


@pytest.mark.parametrize(
    ("hours", "kwh"),
    [
        # Strategy by strategy: full, L1SB, L2SB, L1SB_PFT, L2SB_PFT, F1B, F2B. Mehmood et al.,
        # "Resource-efficient domain adaptive pre-training for medical images" (arXiv 2204.13280), tables B1
        # and B2: hours of its phases.
        ((132.2, 83.75, 0), 94.86),
        ((132.2, 22.433333333333334, 0), 67.93),
        ((132.2, 27.45, 0), 70.12),
        ((132.2, 14.95, 27.916666666666668), 76.9),
        ((132.2, 18.916666666666668, 27.916666666666668), 78.64),
        ((40.233333333333334, 29.0, 0), 30.41),
        ((68.3, 59.833333333333336, 0), 56.28),
    ],
)
def test_published_energies(hours, kwh):
    assert green_algorithms(sum(hours) * 3600, device_watts=250, memory_gb=35) == pytest.approx(
        kwh, rel=0.005
    )


def test_formula_by_hand_and_its_errors():
    assert green_algorithms(7200, device_watts=100, memory_gb=0, pue=1) == pytest.approx(0.2)
    assert green_algorithms(
        3600, device_watts=0, memory_gb=10, pue=2, memory_watts_per_gb=0.5
    ) == pytest.approx(0.01)
    with pytest.raises(UserError, match="seconds is -1"):
        green_algorithms(-1, device_watts=1, memory_gb=1)
    with pytest.raises(UserError, match="memory_gb is nan"):
        green_algorithms(1, device_watts=1, memory_gb=float("nan"))


def test_carbon():
    assert carbon_kg(2.0) == pytest.approx(0.95)
    assert carbon_kg(1.0, "France") == pytest.approx(0.05128)
    with pytest.raises(UserError, match="did you mean 'france'"):
        carbon_kg(1.0, "frence")


class Time:
    value = 50.0

    def __call__(self):
        return self.value


class Joules:
    name = "rapl"

    def __init__(self):
        self.total, self.read, self.trusted = 0.0, 0.0, True

    def joules(self, seconds):
        used, self.read = self.total - self.read, self.total
        return used if self.trusted else None


def test_meter_by_formula_and_its_state(monkeypatch):
    monkeypatch.setattr(energy, "find_counter", lambda device: None)
    now = Time()
    meter = EnergyMeter(CPU, now=now)
    with meter.span():
        now.value += 3600
    now.value += 9999
    assert (meter.kwh, meter.source) == (pytest.approx(meter(3600)), "green-algorithms")
    assert meter(3600) == pytest.approx(green_algorithms(3600, device_watts=250, memory_gb=35))
    resumed = EnergyMeter.from_state(meter.state(), CPU, now=now)
    resumed.start()
    now.value += 3600
    assert resumed.stop() == (pytest.approx(2 * meter(3600)), "green-algorithms")
    assert resumed.stop() == (resumed.kwh, resumed.source)
    with pytest.raises(UserError, match="expected kWh"):
        EnergyMeter.from_state({"rapl": "much"}, CPU)


def test_meter_by_counter_falls_back_where_the_counter_may_have_wrapped():
    now, counter = Time(), Joules()
    meter = EnergyMeter(CPU, counter=counter, now=now)
    counter.total += 1e9
    with meter.span():
        counter.total += 3.6e6
        meter.sample()
        counter.total += 3.6e6
    counter.total += 1e9
    assert (meter.kwh, meter.source) == (pytest.approx(2.0), "rapl")
    counter.trusted = False
    with meter.span():
        now.value += 3600
    assert meter.source == "green-algorithms+rapl"
    assert meter.kwh == pytest.approx(2 + meter(3600))


def zone(root, name, label, value, largest=262_143_328_850):
    path = root / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(label + "\n")
    (path / "energy_uj").write_text(f"{value}\n")
    (path / "max_energy_range_uj").write_text(f"{largest}\n")


def test_rapl_adds_packages_and_memory_once_and_follows_a_wrap(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 262_143_328_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 5)
    zone(tmp_path, "intel-rapl:0:1", "dram", 1_000_000)
    zone(tmp_path, "intel-rapl:1", "psys", 7)
    counter = Rapl(tmp_path)
    zone(tmp_path, "intel-rapl:0", "package-0", 9_999_149)
    zone(tmp_path, "intel-rapl:0:0", "core", 5_000_000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 3_000_000)
    assert counter.joules(10.0) == pytest.approx(12.0)
    assert counter.joules(10.0) == 0.0
    assert counter.joules(3600.0) is None
    with pytest.raises(OSError, match="no energy counters"):
        Rapl(tmp_path / "none")


def test_nvml_counts_all_gpus_or_refuses(monkeypatch):
    millijoules = [1_000, 2_000]
    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: millijoules[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    gpu = Hardware("NVIDIA A100", 2, "gpu", 400.0, 64.0, None, None, "cpu", 8)
    counter = find_counter(gpu)
    assert isinstance(counter, Nvml)
    millijoules[:] = [4_000, 4_000]
    assert counter.joules(1.0) == pytest.approx(5.0)
    assert find_counter(Hardware("NVIDIA A100", 1, "gpu", 400.0, 64.0, None, None, "cpu", 8)) is None
    sliced = Hardware("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 2, "gpu", 250.0, 64.0, None, None, "cpu", 8)
    assert find_counter(sliced) is None  # the counter is of the whole GPU
    assert find_counter(Hardware("TPU v4", 8, "tpu", 192.0, 64.0, None, None, "cpu", 8)) is None
