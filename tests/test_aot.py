"""Ahead of time: the programs of a run, compiled for TPUs that are not there, need what they must."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_jax.aot import compile, report, topology
from dapt_jax.aot.compile import Compiled, Memory
from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.runtime import sharding
from dapt_jax.training import loop
from dapt_jax.training.cache.disk import DiskCache
from dapt_jax.training.cache.policy import Caching
from dapt_jax.training.cache.store import ActivationCache
from dapt_jax.training.context import RunContext
from tests import tiny
from tests.command import ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
]  # the first test that needs them waits for all compilations

# ---- what is compiled
# ---------------------------------------------------------------------------------------------

HEAD = dataclasses.replace(tiny.HEAD, epochs=3)
RUNS = {
    "train_step": ([tiny.FULL], "off"),
    "cached_epochs": ([HEAD], "on"),
    "cached_step": ([tiny.PARTIAL], "on"),
    "activation_step": ([tiny.PARTIAL], Caching("on", memory_bytes=0)),
}


@functools.cache
def tiny_run(function):
    phases, cache = RUNS[function]
    return tiny.make_run(phases, encoder=tiny.encoder(), data=tiny.dataset(), cache=cache)


@pytest.mark.parametrize("function", RUNS)
def test_a_phase_is_compiled_as_a_run_compiles_it(function, tmp_path):
    run, called = tiny_run(function), []

    class Watched(RunContext):
        def compiled(self, key, function, *arguments):
            called.append((function.__name__, shapes_of(arguments)))
            return super().compiled(key, function, *arguments)

    files = DiskCache(tmp_path / "cache", 1 << 28, print)
    loop.train(run, *run.model.init(0), Watched(cache=ActivationCache(1 << 28, files)))
    with_shapes = compile.abstract_arguments(run, 0, sharding.make_mesh())
    assert called == [(function, shapes_of(with_shapes))]
    assert compile.phase_function(run, 0).__name__ == function


def shapes_of(arguments):
    def of(leaf):
        return jax.numpy.shape(leaf), jax.dtypes.canonicalize_dtype(leaf.dtype)

    return str(jax.tree.map(of, arguments))


def test_a_step_for_a_tpu_has_a_tpu_s_convolutions_on_a_machine_without_one():
    encoder, mesh = registry.build("efficientnet_lite0").truncate("stage1/block1"), sharding.make_mesh()
    run = tiny.make_run([tiny.FULL], encoder=encoder, data=tiny.dataset())
    arguments = compile.abstract_arguments(run, 0, mesh)
    here = sharding.jit_step(run.programs[0].train_step, *arguments, mesh=mesh).lower(*arguments).as_text()
    text = compile.lower(run, 0, mesh).as_text()
    kernels = [leaf for leaf in jax.tree.leaves(run.programs[0].model.abstract()[0]) if leaf.ndim == 4]
    # Each forward, with its weight gradient, and all but the first with the gradient of its input.
    assert text.count("stablehlo.convolution") == 3 * len(kernels) - 1
    assert here.count("stablehlo.convolution") < len(kernels) * 3 - 1


def test_whether_a_prefix_is_kept_on_disk_is_decided_for_a_tpu():
    run = tiny_run("activation_step")
    own = dataclasses.replace(run, caching=Caching("auto", memory_bytes=0))
    assert not compile.for_tpus(own, 8).cache_decision(own.programs[0]).cached
    assert "less than 10000" in compile.for_tpus(own, 8).cache_decision(own.programs[0]).reason
    told = dataclasses.replace(run, caching=Caching("auto", memory_bytes=0, flops_per_byte=1e-9))
    assert compile.for_tpus(told, 8).cache_decision(told.programs[0]).tier == "disk"


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        (
            "total memory required for HLO temporaries (187.96G) exceeds available HBM (15.75G).",
            187.96,
            15.75,
        ),
        ("Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded by 4.75G.", 20.5, 15.75),
        ("Ran out of memory in memory space hbm. Used 16385M of 15.75G hbm.", 16385 / 1024, 15.75),
        ("out of memory", 0, 0),
    ],
)
def test_what_a_compiler_refuses_is_read_off_its_message(message, needed, available):
    assert compile.exhausted(f"RESOURCE_EXHAUSTED: {message}") == (
        int(needed * 2**30),
        int(available * 2**30),
    )


# ---- the largest batch
# --------------------------------------------------------------------------------------------


def fake(batch, needed, capacity):
    memory = Memory(needed, 0, 0, 0) if needed <= capacity else None
    return Compiled(0.0, 8, needed, 0 if memory else capacity, memory)


@given(
    unit=st.sampled_from([1, 4, 8, 24, 64]),
    first=st.integers(1, 40),
    fixed=st.integers(0, 1 << 33),
    slope=st.integers(1 << 16, 1 << 28),
    capacity=st.integers(1 << 30, 1 << 35),
)
def test_what_grows_linearly_is_found_exactly_in_five_compilations(unit, first, fixed, slope, capacity):
    def measure(batch):
        return fake(batch, fixed + slope * batch, capacity)

    found = report.largest_batch(measure, first * unit, unit, capacity, 5)
    most = report.MOST_IMAGES // unit * unit
    best = min(max(0, capacity - fixed) // slope // unit * unit, most)
    assert found.batch_size == best
    assert found.compilations <= 5
    if best < most:
        assert found.refused == best + unit


@given(
    unit=st.sampled_from([1, 8, 64]),
    first=st.integers(1, 40),
    growth=st.lists(st.integers(0, 1 << 24), min_size=1, max_size=400),
    capacity=st.integers(1 << 20, 1 << 32),
)
@settings(max_examples=200)
def test_whatever_grows_is_found_with_compilations_enough(unit, first, growth, capacity):
    needs = [0]
    for each in growth:
        needs.append(needs[-1] + each)

    def measure(batch):
        assert batch % unit == 0
        place = batch // unit
        return fake(
            batch, needs[min(place, len(needs) - 1)] + max(0, place - len(growth)) * (1 << 24), capacity
        )

    found = report.largest_batch(measure, first * unit, unit, capacity, 64)
    assert not found.batch_size or measure(found.batch_size).fits
    if found.refused:
        assert not measure(found.refused).fits
        assert found.refused == found.batch_size + unit


def test_few_compilations_give_bounds_that_hold():
    def measure(batch):
        return fake(batch, batch**2, 10**8)

    found = report.largest_batch(measure, 8, 8, 10**8, 2)
    assert found.compilations == 2
    assert found.batch_size <= 10_000
    assert not found.refused or found.refused > 10_000


# ---- bad input
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "no shape": ("v5e", "CHIP:SHAPE, such as v5e:2x4"),
        "a cloud's name": ("v5litepod-8", "CHIP:SHAPE"),
        "an unknown chip": ("v5x:2x4", "no chip 'v5x'; did you mean 'v5p' or 'v5e'?"),
        "a flat chip deep": (
            "v5e:2x2x2",
            "which no slice of v5e has; expected v5e:1x1 or v5e:2x2 or v5e:2x4",
        ),
        "a deep chip flat": ("v4:2x2", "expected v4:2x2x1 or v4:2x2x2"),
        "too many": ("v6e:32x32", "which no slice of v6e has"),
        "none": ("v6e:0x4", "which no slice of v6e has"),
    }.values(),
    ids=lambda value: value if ":" in str(value) and len(value) < 12 else "",
)
def test_a_topology_that_there_is_not(name, words):
    with pytest.raises(UserError, match="topology is") as refused:
        topology.devices(name)
    assert words in str(refused.value)


def test_without_libtpu_the_line_says_how_to_get_it(refused, monkeypatch):
    config = ROOT / "tests" / "configs" / "aot.py"
    monkeypatch.setenv("TPU_LIBRARY_PATH", "nowhere/libtpu.so")
    refused(
        f"--config={config}",
        "--config.mode=aot",
        words=("'nowhere/libtpu.so', which is no file", topology.LIBTPU),
    )
    monkeypatch.delenv("TPU_LIBRARY_PATH")
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    refused(
        f"--config={config}",
        "--config.mode=aot",
        words=("libtpu, which is not installed", "pip install --no-deps"),
    )


# ---- eight chips
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def libtpu():
    """The environment of a process that finds libtpu: by TPU_LIBRARY_PATH, or in the folder that `.ci/run` fills."""
    found = Path(os.environ.get("TPU_LIBRARY_PATH") or ROOT / ".libtpu" / "libtpu" / "libtpu.so")
    if not found.is_file():
        pytest.skip(f"no libtpu: pip install --no-deps --target .libtpu '{topology.LIBTPU}'")
    return {**os.environ, "TPU_LIBRARY_PATH": str(found)}


def start(libtpu, config, workdir, *flags):
    command = [
        sys.executable,
        "-m",
        "dapt_jax.main",
        f"--config={config}",
        "--config.mode=aot",
        f"--workdir={workdir}",
    ]
    return subprocess.Popen(
        [*command, *flags], env=libtpu, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def figures(process, workdir):
    out, err = process.communicate()
    assert process.returncode == 0, err + out
    return json.loads((workdir / report.FILE).read_text())


@pytest.fixture(scope="module")
def steps(libtpu, tmp_path_factory):
    """The figures of each model's steps by strategy and phase, and those of full DAPT with its state spread."""
    config = ROOT / "tests" / "configs" / "aot.py"
    wanted = {
        # With its cache, a partial step starts from what has been kept; without it, it runs its frozen
        # prefix.
        "vit_small": (f"{config}:vit_small", "--config.strategies=partial,hybrid"),
        "resnet18": (f"{config}:resnet18", "--config.cache.mode=off"),
        "spread": (f"{config}:resnet18", "--config.runtime.fsdp=8", "--config.strategies=full"),
    }
    folders = {name: tmp_path_factory.mktemp(name) for name in wanted}

    def made(name):
        found = figures(start(libtpu, wanted[name][0], folders[name], *wanted[name][1:]), folders[name])
        return {f"{each['strategy']}/{each['phase']}": each for each in found["steps"]}

    with ThreadPoolExecutor(2) as pool:  # a compilation keeps one core busy
        return dict(zip(wanted, pool.map(made, wanted), strict=True))


def full_of(steps, model):
    """The step that trains all: the transformer's, which takes longest to compile, is that of hybrid."""
    return steps[model]["full/full" if "full/full" in steps[model] else "hybrid/full"]


MODELS = ("resnet18", "vit_small")
POSITIONS = 4 * 197 * 384
"""Bytes of the position embeddings of `vit_small`."""


def bytes_by_kind(step):
    return {each["kind"]: each["bytes"] for each in step["compiled"]["collectives"]}


@pytest.mark.parametrize("model", MODELS)
def test_the_gradients_of_what_trains_are_reduced_and_nothing_else_is_said(steps, model):
    for step in steps[model].values():
        said = bytes_by_kind(step)
        assert set(said) == {"all-reduce"}  # with whole copies on every chip nothing is gathered
        # Beside the gradients, the sums of losses and of weights: a few numbers. The gradient of position
        # embeddings is reduced at the size to which the images' own grid has them resized.
        resized = POSITIONS if step["trainable"] > step["frozen"] and model == "vit_small" else 0
        assert step["trainable"] - resized <= said["all-reduce"] <= step["trainable"] + 64
    assert steps[model]["partial/partial"]["frozen"] > 0


@pytest.mark.parametrize("model", MODELS)
def test_partial_computes_less_by_what_we_count(steps, model):
    partial, full = steps[model]["partial/partial"], full_of(steps, model)
    counted = partial["model_flops"] / full["model_flops"]
    compiled = partial["compiled"]["flops"] / full["compiled"]["flops"]
    assert counted < 0.5
    assert compiled == pytest.approx(counted, rel=0.02)  # elementwise operations are counted by XLA alone


@pytest.mark.parametrize("model", MODELS)
def test_a_chip_holds_a_state_of_what_we_count(steps, model):
    for step in steps[model].values():
        # Parameters, and two moments of those that train; a batch's images, or what is cached of a frozen
        # prefix.
        state = step["frozen"] + 3 * step["trainable"]
        given = step["compiled"]["memory"]["arguments"]
        assert state <= given <= 1.02 * state + 2**20 * (8 if step["function"].startswith("cached") else 1)
    partial, full = steps[model]["partial/partial"], full_of(steps, model)
    assert partial["compiled"]["needed"] < full["compiled"]["needed"]
    assert partial["compiled"]["memory"]["temporaries"] < full["compiled"]["memory"]["temporaries"]


@pytest.mark.parametrize(
    ("model", "phase"), [("resnet18", "partial"), ("resnet18", "full"), ("vit_small", "partial")]
)
def test_hybrid_is_partial_and_then_full(steps, model, phase):
    hybrid, alone = steps[model][f"hybrid/{phase}"], steps[model][f"{phase}/{phase}"]
    assert hybrid["function"] == alone["function"]
    assert hybrid["model_flops"] == alone["model_flops"]
    assert bytes_by_kind(hybrid) == bytes_by_kind(alone)
    assert hybrid["compiled"]["needed"] == pytest.approx(alone["compiled"]["needed"], rel=0.02)


def test_a_state_that_is_spread_takes_an_eighth_of_each_chip_and_is_gathered(steps):
    spread, whole = steps["spread"]["full/full"], steps["resnet18"]["full/full"]
    given = [each["compiled"]["memory"]["arguments"] for each in (spread, whole)]
    assert given[0] == pytest.approx(given[1] / 8, rel=0.1)
    assert spread["compiled"]["needed"] < whole["compiled"]["needed"]
    assert "all-gather" in bytes_by_kind(spread)
    assert spread["model_flops"] == whole["model_flops"]


@pytest.mark.parametrize("model", MODELS)
def test_a_step_takes_at_least_what_its_longest_part_takes(steps, model):
    for step in steps[model].values():
        assert step["roofline_s"] == max(step["times"].values()) == step["times"][step["bound"]]
        chips = step["compiled"]["devices"]
        # The maker's figures of a v5e chip: 197 TFLOP/s, 819 GB/s, 200 GB/s out; an all-reduce sends 2 x 7/8
        # of itself.
        assert step["times"]["arithmetic"] == pytest.approx(step["hardware_flops"] / chips / 197e12)
        assert step["times"]["memory"] == pytest.approx(step["compiled"]["traffic"] / 819e9)
        reduced = bytes_by_kind(step)["all-reduce"]
        assert step["times"]["interconnect"] == pytest.approx(1.75 * reduced / 200e9)
        # Whatever else a step reads and writes, it reads and writes all that trains, and its moments.
        assert step["compiled"]["traffic"] > 2 * 3 * step["trainable"]


def test_the_largest_batch_fits_and_the_next_one_tried_does_not(libtpu, tmp_path):
    config = ROOT / "tests" / "configs" / "aot.py"
    flags = (
        "--config.strategies=simplified", "--config.model.name=efficientnet_lite0", "--config.model.image_size=224",
        "--config.adapt.cut_after=stage1/block1", "--config.aot.topology=v5e:1x1", "--config.aot.compilations=5",
    )  # fmt: skip
    (step,) = figures(start(libtpu, config, tmp_path, *flags), tmp_path)["steps"]
    largest, needed = step["largest"], step["compiled"]["needed"]
    assert step["fits"]
    assert largest["compilations"] <= 5
    assert 64 < largest["batch_size"] < largest["refused"] <= 1.1 * largest["batch_size"]
    assert not step["compiled"]["collectives"]  # one chip has nobody to talk to
    # Some of what 64 images need does not grow with them, and an image takes its pixels at least.
    assert 0.9 * 64 * 2**34 / needed < largest["batch_size"] < 2**34 / (3 * 224**2)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("aot.topology=v5e:3x3", "aot.topology is 'v5e:3x3', which libtpu refuses (Topology layout"),
        ("adapt.batch_size=30", "adapt.batch_size 30 does not divide among 8 devices; 24 does"),
        ("runtime.fsdp=3", "runtime.fsdp is 3, which does not divide 8 devices"),
        ("strategies=none", "none adapts"),
    ],
)
def test_what_the_chips_do_not_take_is_one_line(libtpu, tmp_path, flag, words):
    process = start(libtpu, ROOT / "tests" / "configs" / "aot.py", tmp_path, f"--config.{flag}")
    _, err = process.communicate()
    assert process.returncode == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
