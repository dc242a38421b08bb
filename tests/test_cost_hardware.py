import jax
import pytest

from dapt_jax.cost import hardware, peak
from dapt_jax.cost.hardware import describe, lookup, utilisation


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A user's cache folder with nothing in it, and measurements that take no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in (("SIDE", 32), ("FLOATS", 1024), ("BUDGET_S", 0.01)):
        monkeypatch.setattr(peak, name, value)
    return tmp_path / "dapt_jax" / "peak.json"


def test_this_machine(cache):
    here = describe()
    assert here.count == len(jax.devices())
    assert here.platform == jax.devices()[0].platform
    assert here.memory_gb > 0.5
    assert here.cores >= 1
    assert here.watts > 0
    if here.platform == "cpu":
        assert here.watts * here.count == pytest.approx(12 * here.cores)
        assert here.peak_flops is None
        assert here.peak_for("float32") == 0.0
        assert "assumed" in here.note
        assert "python -m dapt_jax.cost.hardware" in here.note
    assert (describe(watts=33.0, pue=1.1).watts, describe(pue=1.1).pue) == (33.0, 1.1)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="makers publish what other devices can do")
def test_a_cpu_is_measured_once_and_then_known(cache, monkeypatch):
    here = describe(measure=True)
    assert here.bandwidth > 0
    assert here.peak_for("float32") > 0
    assert here.peak_for("bfloat16") > 0
    assert "not known" not in here.note
    monkeypatch.setattr(peak, "measure", lambda: pytest.fail("measured again"))
    assert describe() == describe(measure=True) == here
    assert peak.stored("another processor", here.cores) is None
    cache.write_text("{torn")
    assert describe().peak_flops is None


@pytest.mark.parametrize("damaged", ["{torn", "[1]", "null"])
def test_a_damaged_file_of_measurements_is_replaced(cache, monkeypatch, damaged):
    monkeypatch.setattr(peak, "measure", lambda: dict.fromkeys((*peak.DTYPES, "bandwidth"), 1.0))
    cache.parent.mkdir(parents=True)
    cache.write_text(damaged)
    assert peak.measured("a processor", 2) == peak.stored("a processor", 2)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="makers publish what other devices can do")
def test_a_measurement_that_cannot_be_kept_is_used_all_the_same(cache, monkeypatch, tmp_path, capsys):
    hardware.main()
    assert f"kept in {cache}" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert describe(measure=True).peak_for("float32") > 0
    hardware.main()
    assert "cannot be kept in" in capsys.readouterr().out


def test_a_device_that_says_nothing_of_its_memory_is_told_of(monkeypatch):
    class Silent:
        device_kind, platform = "TPU v9", "tpu"

        def memory_stats(self):
            raise NotImplementedError

    monkeypatch.setattr(jax, "devices", lambda: [Silent()])
    monkeypatch.setattr(jax, "local_devices", lambda: [Silent()])
    here = describe()
    assert (here.kind, here.peak_flops, here.watts) == ("TPU v9", None, 250.0)
    assert "'TPU v9' is not in the table" in here.note
    assert "reports no memory figures" in here.note


@pytest.mark.parametrize(
    ("kind", "platform", "peak", "watts"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu", 989.4e12, 700),
        ("NVIDIA H100 PCIe", "gpu", 756e12, 350),
        ("NVIDIA H200", "cuda", 989.4e12, 700),
        ("NVIDIA H100 NVL", "gpu", 835.5e12, 400),
        ("NVIDIA H200 NVL", "gpu", 835.5e12, 600),
        ("NVIDIA A100-SXM4-40GB", "gpu", 312e12, 400),
        ("NVIDIA A100 80GB PCIe", "gpu", 312e12, 300),
        ("NVIDIA L4", "gpu", 121e12, 72),
        ("TPU v2", "tpu", 22.5e12, 140),
        ("TPU v3", "tpu", 61.5e12, 225),
        ("TPU v4", "tpu", 275e12, 192),
        ("TPU v5 lite", "tpu", 197e12, 250),
        ("TPU v5p", "tpu", 459e12, 250),
        ("TPU v5", "tpu", 459e12, 250),
        ("TPU v6 lite", "tpu", 918e12, 250),
    ],
)
def test_table(kind, platform, peak, watts):
    found = lookup(kind, 4, platform)
    assert found.peak_flops["bfloat16"] == pytest.approx(peak)
    assert found.watts == watts
    assert ("assumed" in found.note) == (watts == 250)


def test_a_similar_name_is_not_the_same_chip():
    found = lookup("NVIDIA L40S", 1, "gpu")
    assert found.peak_flops is None
    assert "not in the table" in found.note


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb"])
def test_a_slice_of_a_gpu_has_not_the_peak_of_the_whole(kind):
    found = lookup(kind, 1, "gpu")
    assert (found.peak_flops, found.bandwidth, found.watts) == (None, None, 250)
    assert f"{kind!r} is a slice of a GPU" in found.note


@pytest.mark.parametrize(
    ("kind", "platform", "dtype", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu", "float32", 494.7),
        ("NVIDIA H100 80GB HBM3", "gpu", "bfloat16", 989.4),
        ("Tesla T4", "gpu", "float32", 8.1),
        ("Tesla T4", "gpu", "bfloat16", 65),
        ("TPU v4", "tpu", "float32", 275),
    ],
)
def test_the_peak_is_that_of_what_jax_multiplies_with(kind, platform, dtype, teraflops):
    assert lookup(kind, 2, platform).peak_for(dtype) == pytest.approx(2 * teraflops * 1e12)


def test_utilisation():
    v4 = lookup("TPU v4", 4, "tpu").peak_for("bfloat16")
    assert utilisation(275e12 * 4, 2.0, v4) == pytest.approx(0.5)
    assert utilisation(1.0, 0.0, v4) is None
    assert utilisation(1.0, 1.0, 0.0) is None


@pytest.mark.parametrize(
    ("kind", "gibibytes", "links"),
    [("TPU v4", 32, 300), ("TPU v5 lite", 16, 200), ("TPU v5", 95, 600), ("TPU v6 lite", 32, 400)],
)
def test_memory_and_links_of_tpus_are_published_ones(kind, gibibytes, links):
    found = lookup(kind, 8, "tpu")
    assert found.memory_bytes == gibibytes * 2**30
    assert found.interconnect == pytest.approx(links * 1e9)
    assert lookup("NVIDIA L4", 1, "gpu").interconnect is None
