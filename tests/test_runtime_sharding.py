"""Devices and processes change nothing but the time: the same losses on one device, on eight, and in two processes."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dapt_jax import ops
from dapt_jax.cost.memory import tree_bytes
from dapt_jax.errors import UserError
from dapt_jax.losses.cross_entropy import CrossEntropy
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.runtime import processes, sharding
from dapt_jax.settings import StudySettings
from dapt_jax.training import accounting, freezing
from dapt_jax.training.run import TrainData, TrainingRun
from tests import device_runs, tiny
from tests.device_runs import LABEL_FREE, RUNS
from tests.studies import ROOT, free_port

STRATEGIES = "partial-cached+hybrid+hybrid-cached"
"""A hybrid has the phases and the programs of full and of partial, and the switches between them."""


def started(meshes, devices, *group):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.device_runs", meshes, *group],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def lines(processes):
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=500)
            assert process.returncode == 0, err[-2000:]
            found += [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return found


@pytest.fixture(scope="module")
def found():
    alone = started(f"1,4:hybrid-cached,8,8/4:{STRATEGIES}+norm+accumulated", 8)
    address = f"localhost:{free_port()}"
    two = [
        started(f"8:{STRATEGIES}+head-cached+uneven,8/8:hybrid", 4, address, "2", str(n)) for n in range(2)
    ]
    return {(run["devices"], run["fsdp"], run["processes"], run["name"]): run for run in lines([alone, *two])}


@pytest.mark.long
def test_losses_and_weights_do_not_depend_on_devices_and_processes(found):
    """Over 104 steps (52 of twice the size where they are cut), each strategy, across its mask switch, cached and not."""
    layouts = {(devices, fsdp, count) for devices, fsdp, count, _ in found}
    assert layouts == {(1, 1, 1), (4, 1, 1), (8, 1, 1), (8, 4, 1), (8, 1, 2), (8, 8, 2)}
    assert {name for devices, _, _, name in found if devices == 1} == set(RUNS)
    for (*layout, name), run in found.items():
        alone = found[1, 1, 1, name]
        about = f"{name} on {layout}"
        assert (run["steps"], run["images"], run["flops"]) == (
            alone["steps"],
            alone["images"],
            alone["flops"],
        ), about
        assert run["steps"] == (52 if name == "accumulated" else 104)
        assert len(run["loss"]) == len(run["val_loss"]) == 26
        for key in ("loss", "val_loss"):
            np.testing.assert_allclose(run[key], alone[key], rtol=1e-5, err_msg=about)
        np.testing.assert_allclose(run["total"], alone["total"], rtol=1e-4, atol=1e-5, err_msg=about)
        assert (run["split"] > 0) == (run["fsdp"] > 1), about
    # What trains is told from what is frozen: the runs differ from one another.
    assert len({tuple(np.round(found[1, 1, 1, name]["loss"], 4)) for name in RUNS}) >= 7


@pytest.mark.long
def test_objectives_without_labels_do_not_depend_on_devices_and_processes():
    """One device, and two processes of four, or eight of one process for one whose views are compared across devices."""
    names = "+".join(LABEL_FREE)
    alone, address = started(f"1:{names},8:two_views", 8), f"localhost:{free_port()}"
    two = [started(f"8:{names}", 4, address, "2", str(number)) for number in range(2)]
    by_layout = {}
    for run in lines([alone, *two]):
        by_layout.setdefault((run["devices"], run["processes"]), {})[run["name"]] = run
    assert set(by_layout) == {(1, 1), (8, 1), (8, 2)}
    for layout, of_layout in by_layout.items():
        assert set(of_layout) == ({"two_views"} if layout == (8, 1) else set(LABEL_FREE))
        for name, run in of_layout.items():
            one = by_layout[1, 1][name]
            assert (run["steps"], run["images"], run["flops"]) == (one["steps"], one["images"], one["flops"])
            for key in ("loss", "val_loss", "rankme"):
                np.testing.assert_allclose(run[key], one[key], rtol=1e-5, err_msg=f"{name} {key} on {layout}")
            np.testing.assert_allclose(run["total"], one["total"], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.long
def test_only_the_gradients_of_what_trains_are_sent(found):
    """Of each compiled program: bytes all-reduced are those of the trained parameters, and three numbers of four bytes.

    They are the weight of the batch, its loss, and both again for the epoch, of which one is the same. Batch
    norm that trains adds mean and variance of its 18 channels; a batch in parts sends the gradient of each.
    """
    for (*layout, name), run in found.items():
        if layout != [8, 1, 1]:
            continue
        steps = [
            5 if name.endswith("cached") and trained == 108 else 1 for trained in run["trained"]
        ]  # of one program: those of an epoch of a head, of which the last one of five is skipped
        norms = 2 * 18 * 4 if name in ("norm", "ghost") else 0
        for sent, trained, times in zip(run["sent"], run["trained"], steps, strict=True):
            expected = 2 * trained + 16 if name == "accumulated" else times * (trained + 12)
            expected += norms if trained == max(run["trained"]) else 0
            assert sent == {"all-reduce": expected}, (name, run["sent"], run["trained"])
        assert run["trained"] == sorted(run["trained"])
    spread = found[8, 4, 1, "hybrid"]["sent"]
    assert all(each["all-gather"] > 0 for each in spread)


@pytest.mark.long
def test_a_batch_in_parts_is_the_batch(found):
    """Twice the batch in two parts gives the losses of twice the batch in one; frozen batch norm sees no batch."""

    mesh = sharding.make_mesh(jax.devices())
    whole = device_runs.train("doubled", mesh, 1)
    np.testing.assert_allclose(found[1, 1, 1, "accumulated"]["loss"], whole["loss"], rtol=1e-5)
    np.testing.assert_allclose(found[1, 1, 1, "accumulated"]["total"], whole["total"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "parts", "devices", "words"),
    [
        (32, 1, 3, "batch_size 32 does not divide among 3 devices; 30 does"),
        (4, 1, 8, "batch_size 4 does not divide among 8 devices; 8 does"),
        (24, 2, 8, "batch_size 24 does not divide among 8 devices and there into 2 parts; 16 does"),
        (24, 0, 8, "grad_accum_steps is 0; expected 1 or more"),
    ],
)
def test_a_batch_that_cannot_be_divided(size, parts, devices, words):
    with pytest.raises(UserError, match=words):
        sharding.check_batch(size, parts, devices)
    sharding.check_batch(48, 2, 8)


def test_a_mesh_that_does_not_divide_the_devices():
    with pytest.raises(UserError, match=r"runtime\.fsdp is 3, which does not divide 8 devices; 2 does"):
        sharding.make_mesh([None] * 8, 3)


@pytest.mark.parametrize(
    ("settings", "environment", "words"),
    [
        ({"coordinator_address": "here:1"}, {}, "runtime.num_processes, runtime.process_id is not set"),
        (
            {"num_processes": 2, "process_id": 2, "coordinator_address": "here:1"},
            {},
            "runtime.process_id is 2; expected 0 to 1",
        ),
        ({}, {"JAX_COORDINATOR_ADDRESS": "here:1", "JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'"),
        ({}, {"JAX_NUM_PROCESSES": "2"}, "runtime.coordinator_address, runtime.process_id is not set"),
    ],
)
def test_processes_that_are_half_described(settings, environment, words):
    with pytest.raises(UserError, match=words):
        processes.Group(**settings).completed(environment)


def test_who_finds_whom(monkeypatch):
    """Three variables or settings describe a group; clusters that JAX knows describe themselves; one process is alone."""
    three = {"JAX_COORDINATOR_ADDRESS": "here:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert StudySettings().runtime.group().completed(three) == processes.Group("auto", "here:1", 4, 3)
    for name in processes._CLUSTERS:
        monkeypatch.delenv(name, raising=False)
    assert not processes.Group().is_several
    assert processes.Group("on").is_several
    assert processes.Group("auto", "here:1", 4, 3).is_several
    assert not processes.Group("off", "here:1", 4, 3).is_several
    assert not processes.Group("auto", "here:1", 1, 0).is_several
    for name, one, two in (("SLURM_STEP_NUM_TASKS", "1", "2"), ("TPU_WORKER_HOSTNAMES", "a", "a,b")):
        monkeypatch.setenv(name, one)
        assert not processes.Group().is_several
        monkeypatch.setenv(name, two)
        assert processes.Group().is_several
        monkeypatch.delenv(name)


def test_a_plan_knows_what_one_device_needs_and_what_fits():
    """Peak memory falls with the state's spread and with the parts of a batch; the largest batch is the last that fits."""
    run = tiny.make_run([tiny.FULL], encoder=tiny.encoder(), data=tiny.dataset())
    (program,) = run.programs
    whole = accounting.peak_bytes(program, 16, 8)
    assert accounting.peak_bytes(program, 16, 1) < whole < accounting.peak_bytes(program, 16, 64)
    cut = accounting.peak_bytes(dataclasses.replace(program, grad_accum_steps=4), 16, 8)
    assert accounting.peak_bytes(program, 16, 2) < cut < whole
    averaged = dataclasses.replace(program, optimizer=dataclasses.replace(program.optimizer, ema=0.9))
    average = 4 * freezing.count(freezing.partition(run.model.abstract()[0], program.mask.trainable)[0])
    assert accounting.peak_bytes(averaged, 16, 8) == whole + average
    (above,) = tiny.make_run([tiny.PARTIAL], encoder=tiny.encoder(), data=tiny.dataset()).programs
    for each in (program, above):
        for batch in (1, 7, 200):
            most = accounting.peak_bytes(each, 16, batch)
            assert accounting.largest_batch(each, 16, most) == batch
            assert accounting.largest_batch(each, 16, most - 1) == batch - 1


def test_a_frozen_prefix_and_the_backward_pass_above_it_do_not_need_memory_at_once():
    """The prefix's two largest neighbours are gone when the suffix, here one small layer, keeps its first residual."""
    (program,) = tiny.make_run([tiny.HEAD], encoder=tiny.encoder(), data=tiny.dataset()).programs
    batch, model = 64, program.model
    sizes = [
        tree_bytes(shape) for shape in accounting.boundary_shapes(model, 16)[: program.mask.boundary + 1]
    ]
    pair = batch * max(a + b for a, b in itertools.pairwise(sizes))
    params, statistics = model.abstract()
    state = tree_bytes((params, statistics, jax.eval_shape(program.tx.init, params)))
    assert accounting.peak_bytes(program, 16, batch) == state + pair + batch * 16 * 16 * 3


def test_a_spread_state_takes_its_share_of_each_device():
    """Of ResNet-50 with Adam, all but what is small: parameters, gradients and two moments, an eighth of each."""
    model = Classifier(registry.build("resnet50"), 2)
    (program,) = TrainingRun(model, (tiny.FULL,), TrainData(tiny.dataset(), [0]), CrossEntropy(2)).programs
    once, spread = (accounting.peak_bytes(program, 64, 1, fsdp) for fsdp in (1, 8))
    state = 4 * 4 * freezing.count(model.abstract()[0])
    assert once - spread == pytest.approx(state * 7 / 8, rel=0.01)


def test_statistics_of_a_device_are_those_of_its_own_examples():
    """Ghost batch norm of 4 groups is batch norm of each quarter; running statistics are the groups' mean."""
    x = np.random.default_rng(0).normal(2, 3, (8, 4, 4, 5)).astype(np.float32)
    scale, bias = np.linspace(1, 2, 5, dtype=np.float32), np.zeros(5, np.float32)
    apart = [ops.batch_norm(jnp.asarray(part), scale, bias, 1e-5) for part in np.split(x, 4)]
    with ops.batch_norm_groups(4):
        y, mean, var = ops.batch_norm(jnp.asarray(x), scale, bias, 1e-5)
    np.testing.assert_allclose(y, np.concatenate([part[0] for part in apart]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mean, np.mean([part[1] for part in apart], 0), rtol=1e-5)
    np.testing.assert_allclose(var, np.mean([part[2] for part in apart], 0), rtol=1e-5)
    assert not np.allclose(y, ops.batch_norm(jnp.asarray(x), scale, bias, 1e-5)[0], atol=1e-3)
