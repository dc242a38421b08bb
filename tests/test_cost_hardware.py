import jax
import pytest

from dapt_jax.cost.hardware import describe, lookup, mfu
from dapt_jax.errors import UserError


def test_this_machine():
    here = describe()
    assert here.count == len(jax.devices())
    assert here.platform == jax.devices()[0].platform
    assert here.memory_gb > 0.5
    assert here.cores >= 1
    assert here.watts > 0
    if here.platform == "cpu":
        assert here.watts * here.count == pytest.approx(12 * here.cores)
        assert here.peak_flops is None
        assert "assumed" in here.note
        assert mfu(1e12, 1.0, here) is None


@pytest.mark.parametrize(
    ("kind", "platform", "peak", "watts"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu", 989.4e12, 700),
        ("NVIDIA H100 PCIe", "gpu", 756e12, 350),
        ("NVIDIA H200", "cuda", 989.4e12, 700),
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


def test_utilisation():
    v4 = lookup("TPU v4", 4, "tpu")
    assert mfu(275e12 * 4, 2.0, v4) == pytest.approx(0.5)
    with pytest.raises(UserError, match="did you mean 'bfloat16'"):
        mfu(1.0, 1.0, v4, "bfloat61")
    with pytest.raises(UserError, match="positive time"):
        mfu(1.0, 0.0, v4)
    assert lookup("Tesla T4", 1, "gpu").peak_flops["float16"] == 65e12
