"""Full disks, torn checkpoints, reads that hang and clocks that jump: a line each, and the run goes on."""

import asyncio
import errno
import gc
import os
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dapt_jax.data import decode, stalls
from dapt_jax.runtime import preemption
from dapt_jax.training import checkpoint, loop
from tests import tiny
from tests.studies import ROOT
from tests.test_training_loop import DATA, ENCODER, SAVE_ALWAYS, context, leaves


def part(step, n=1000):
    values = np.random.default_rng(step).normal(size=n)
    return {"params": {"conv": {"w": jnp.asarray(values, jnp.float32)}}, "step": np.int32(step)}


def layout(n=1000):
    return lambda step: jax.eval_shape(lambda: jax.tree.map(jnp.asarray, part(step, n)))


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1 to 3 of which two are kept, and what they say."""
    said = []
    saver = checkpoint.CheckpointFolder(tmp_path / "state", say=said.append)
    for step in (1, 2, 3):
        saver.save(step, part(step), {"at": step})
    saver.wait()
    yield saver, tmp_path / "state", said
    saver.close()


def truncate(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


TEARS = {
    "every file cut in half": truncate,
    "nothing in it": empty,
    "no arrays": lambda folder: shutil.rmtree(folder / "state"),
    "no position": lambda folder: shutil.rmtree(folder / "meta"),
    "an empty position": lambda folder: os.truncate(folder / "meta" / "metadata", 0),
    "no manifest": lambda folder: [path.unlink() for path in folder.rglob("manifest.ocdbt")],
}


# The reader under orbax may leave a promise that nobody waits for when what it reads is torn; when it is told
# of is chance.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_skipped_with_a_line_and_replaced_when_training_comes_there_again(saved, tear):
    saver, folder, said = saved
    TEARS[tear](folder / "3")
    step, found, meta = saver.restore(layout())
    assert (step, meta) == (2, {"at": 2})
    np.testing.assert_array_equal(found["params"]["conv"]["w"], part(2)["params"]["conv"]["w"])
    (line,) = said
    assert f"{folder / '3'}: a checkpoint that cannot be read" in line
    assert line.endswith("the one before is used")
    saver.save(3, part(3), {"at": 3})
    saver.wait()
    assert saver.restore(layout())[0] == 3
    assert len(said) == 1


def test_checkpoints_of_later_steps_are_forgotten_and_the_kept_ones_stay(tmp_path):
    saver = checkpoint.CheckpointFolder(tmp_path, keep=(1,))
    for step in (1, 2, 3, 4):
        saver.save(step, part(step), {})
    saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "4"]
    assert saver.restore(layout(), at_most=3)[0] == 3
    saver.forget_after(1)
    assert saver.restore(layout())[0] == 1
    saver.save(2, part(2), {})
    saver.wait()
    assert saver.restore(layout())[0] == 2
    saver.close()


CROWDED = """
import pathlib, resource, sys
from dapt_jax.training import checkpoint
from tests.test_survive import layout, part

folder, said = pathlib.Path(sys.argv[1]), []
saver = checkpoint.CheckpointFolder(folder, say=said.append)
saver.save(1, part(1), {})
saver.wait()
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
saver.save(2, part(2, 1_000_000), {})
saver.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
assert said == [f"{folder}: no room for a checkpoint: training goes on, and the last good one stays"], said
assert not list(folder.glob("*tmp*"))
assert saver.restore(layout())[0] == 1
saver.save(3, part(3), {})
saver.wait()
assert saver.restore(layout())[0] == 3
assert len(said) == 1
saver.close()
"""


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(tmp_path):
    """A largest file size stands for the disk: tensorstore meets it in its own threads, so a process of its own."""
    subprocess.run([sys.executable, "-c", CROWDED, str(tmp_path)], check=True, cwd=ROOT, timeout=120)


READ_ONLY = """
import pathlib, sys
from benchmarks.chaos_child import Kill, Operations
from dapt_jax.training import checkpoint
from tests.test_survive import part

operations = Operations(None)
operations.watch()
for number in (6, 8, 12, 35):
    folder = pathlib.Path(sys.argv[1]) / str(number) / "run"
    operations._kill, operations._count = Kill(f"/{number}/", number, "EROFS"), 0
    try:
        saver = checkpoint.CheckpointFolder(folder)
        for step in (1, 2, 3):
            saver.save(step, part(step), {})
        saver.wait()
    except OSError as error:
        print(error.strerror)
"""


def test_a_disk_that_turns_read_only_during_a_checkpoint_is_one_error_and_the_process_ends(tmp_path):
    """No traceback of a thread or a callback, and no thread that the exit would wait for."""
    command = [sys.executable, "-c", READ_ONLY, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == [os.strerror(errno.EROFS)] * 4


def test_of_writes_that_fail_together_only_the_error_that_is_raised_is_told(tmp_path, caplog):
    """On a disk without inodes several arrays fail at once, and orbax waits for the first alone."""
    checkpoint.CheckpointFolder(tmp_path).close()

    async def write():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def save():
        tasks = [asyncio.ensure_future(write()) for _ in range(2)]
        await tasks[0]

    with pytest.raises(OSError, match="No space left"):
        asyncio.run(save())
    gc.collect()
    assert not caplog.records


@pytest.mark.parametrize(
    "lacking", ["room", "time"]
)  # a wall clock that is set forward looks to orbax like a time-out
def test_a_run_whose_checkpoints_cannot_be_saved_ends_with_the_same_bits(tmp_path, monkeypatch, lacking):
    run = tiny.make_run([tiny.FULL], encoder=ENCODER, data=DATA)
    quiet = loop.train(run, *run.model.init(1), context(tmp_path / "quiet"))

    def full(self, step, **_):
        if lacking == "time":
            raise TimeoutError("timed out after 0.00 seconds")
        raise ValueError("write failed") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", full)
    crowded = loop.train(run, *run.model.init(1), context(tmp_path / "full", **SAVE_ALWAYS))
    assert all(np.array_equal(a, b) for a, b in zip(leaves(quiet), leaves(crowded), strict=True))


def test_an_error_that_is_no_full_disk_is_not_swallowed(saved, monkeypatch):
    saver, _, _ = saved

    def broken(self, step, **_):
        raise ValueError("a programming error")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", broken)
    with pytest.raises(ValueError, match="a programming error"):
        saver.save(4, part(4), {})


def test_a_read_that_hangs_is_told_of_once_with_its_file(tmp_path, monkeypatch):
    path, other = tmp_path / "slow.png", tmp_path / "quick.png"
    for each in (path, other):
        Image.new("RGB", (8, 8)).save(each)
    said, go_on, read = [], threading.Event(), decode._decode

    def hanging(file, *others):
        if file == path:
            go_on.wait(20)
        return read(file, *others)

    monkeypatch.setattr(decode, "_decode", hanging)
    images = decode.ImageStore.from_files([path, other], 8)
    reader = threading.Thread(target=images.batch, args=([1, 0],))
    with stalls.told(0.05, said.append):
        reader.start()
        deadline = time.monotonic() + 10
        while not said:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        go_on.set()
        reader.join()
        before = len(said)
        time.sleep(0.1)
        assert len(said) == before == 1
    assert said[0].startswith(f"{path}: has been read for")
    assert "data.stall_s 0.05" in said[0]
    assert not stalls._reads


@pytest.mark.parametrize("direction", ["back", "to and fro"])
def test_a_wall_clock_that_jumps_does_the_ledger_no_harm(tmp_path, monkeypatch, direction):
    jumps = iter(range(10**9))
    monkeypatch.setattr(
        time, "time", lambda: -1e6 * next(jumps) if direction == "back" else 1e9 * (-1) ** next(jumps)
    )
    run = tiny.make_run([tiny.HEAD, tiny.PARTIAL], encoder=ENCODER, data=DATA, cache="auto")
    used, began = context(tmp_path if direction == "back" else None, every_s=0.0), time.monotonic()
    rows = loop.train(run, *run.model.init(1), used).costs
    real = time.monotonic() - began
    assert 0 < sum(row.wall_s for row in rows) <= real
    for row in rows:
        parts = {name: getattr(row, name) for name in vars(row) if name.endswith("_s") and name != "wall_s"}
        assert all(0 <= seconds <= real for seconds in parts.values()), parts
        assert 0 <= row.energy_kwh < 1


def test_a_notice_ends_what_has_nothing_to_save_at_once_and_waits_for_what_has():
    with preemption.PreemptionHandler() as notice:
        with pytest.raises(preemption.Stopped) as stopped:
            os.kill(os.getpid(), preemption.signal.SIGTERM)
        assert stopped.value.code == preemption.RESTART_CODE == 75
    reached = []

    def work(notice):
        with notice.deferred():
            os.kill(os.getpid(), preemption.signal.SIGINT)
            reached.append(notice.signal_received)

    with preemption.PreemptionHandler() as notice, pytest.raises(preemption.Stopped) as stopped:
        work(notice)
    assert reached == [preemption.signal.SIGINT]
    assert stopped.value.code == preemption.STOPPED_CODE == 130
    assert preemption.signal.getsignal(preemption.signal.SIGTERM) is not notice._on_signal
    assert sys.exc_info() == (None, None, None)
