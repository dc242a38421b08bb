"""One study at a time runs in a workdir: a second start says who is there, and what a kill left is taken over."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import fsspec
import pytest

from dapt_jax.errors import UserError
from dapt_jax.monitoring import status
from dapt_jax.runtime import lock, storage
from tests.command import run, small
from tests.studies import ROOT, assert_same_bits, complete, copied_cache, shared_cache, started, wait_until


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "RENEW_S", 0.02)
    monkeypatch.setattr(lock, "STALE_S", 0.4)
    monkeypatch.setattr(lock, "SETTLE_S", 0.05)


@pytest.fixture(params=["disk", "disk without links", "bucket"])
def file(request, tmp_path, monkeypatch):
    if request.param == "bucket":
        files = fsspec.filesystem("memory")
        files.store.clear()
        yield lock.RemoteLockFile(files, "/bucket/study")
        files.store.clear()
        return
    if request.param == "disk without links":

        def no_link(*_):
            raise OSError(lock.errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_link)
    yield lock.LocalLockFile(tmp_path / "workdir")


def held(file, said=None, lost=None):
    return lock.held(file, "WORKDIR", (said if said is not None else []).append, lost)


def other(pid=None, host="elsewhere", process=""):
    return dataclasses.replace(
        lock.Holder.this_process(), pid=pid or os.getpid(), host=host, process=process, token="theirs"
    )


def refused(file):
    with pytest.raises(UserError) as caught, held(file):
        pass
    return str(caught.value)


def test_a_held_lock_names_its_holder_to_the_second_and_is_gone_afterwards(file):
    with held(file):
        mine = lock.Holder.from_bytes(file.read())
        line = refused(file)
        assert f"WORKDIR: process {os.getpid()} on {mine.host}, started {mine.started}, runs a study" in line
        assert "another --workdir" in line
        assert lock.Holder.from_bytes(file.read()).token == mine.token
    assert file.read() is None
    with held(file):
        pass


def test_a_lock_that_is_read_while_it_is_written_still_names_its_holder(file, monkeypatch):
    assert file.create(lock.Holder.this_process().to_bytes())
    whole, lengths = file.read, iter([0, 9])
    monkeypatch.setattr(file, "read", lambda: whole()[: next(lengths, None)])
    assert f"WORKDIR: process {os.getpid()} on " in refused(file)


def test_a_lock_left_by_a_kill_on_this_machine_is_taken_over_at_once(file):
    code = "from dapt_jax.runtime import lock; print(lock.Holder.this_process().to_bytes().decode())"
    command = [sys.executable, "-c", f"{code}; import time; time.sleep(60)"]
    process = subprocess.Popen([command[0], "-u", *command[1:]], stdout=subprocess.PIPE, cwd=ROOT)
    assert file.create(process.stdout.readline())
    assert f"process {process.pid} on" in refused(file)
    process.send_signal(signal.SIGKILL)
    while lock._identity(process.pid):  # a process that nobody has waited for is dead too
        time.sleep(0.01)
    begun, said = time.monotonic(), []
    with held(file, said):
        assert time.monotonic() - begun < lock.STALE_S
        assert lock.Holder.from_bytes(file.read()).pid == os.getpid()
    assert f"the lock of process {process.pid} on" in said[0]
    process.wait()
    process.stdout.close()


def test_a_process_number_given_to_another_process_is_another_process(file):
    boot = lock._identity(os.getpid()).rpartition(":")[0]
    assert file.create(other(process=f"{boot}:1").to_bytes())
    with held(file):
        pass


@pytest.mark.parametrize("content", [other().to_bytes(), b"", b"{", b"[1]", b'{"host": 1}'])
def test_a_lock_of_elsewhere_is_watched_and_taken_over_if_nobody_renews_it(file, content):
    assert file.create(content)
    begun, said = time.monotonic(), []
    with held(file, said):
        assert time.monotonic() - begun >= lock.STALE_S
    assert "was left behind; taken over" in said[-1]


def test_a_lock_of_elsewhere_that_is_renewed_is_held_whatever_the_clocks_say(file, monkeypatch):
    theirs, ended = other(host="cluster-7"), threading.Event()
    assert file.create(theirs.to_bytes())

    def renew():
        number = 0
        while not ended.wait(0.05):
            number += 1
            file.replace(dataclasses.replace(theirs, renewals=number).to_bytes())

    thread = threading.Thread(target=renew)
    thread.start()
    monkeypatch.setattr(time, "time", lambda: 1.0)
    assert f"on cluster-7, started {theirs.started}, runs a study here" in refused(file)
    ended.set()
    thread.join()


def test_a_holder_whose_lock_was_taken_over_ends(file):
    lines = []
    with held(file, lost=lines.append):
        file.replace(other(host="thief").to_bytes())
        deadline = time.monotonic() + 10
        while not lines and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "on thief" in lines[0]
    assert lock.Holder.from_bytes(file.read()).host == "thief"  # not removed by the one who lost it


def test_of_many_that_start_at_once_one_has_the_lock(file):
    inside, most, refusals = [], [], []

    def start():
        with contextlib.suppress(UserError):
            with held(file):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.4)
                inside.pop()
            return
        refusals.append(1)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) + len(refusals) == 6


def test_a_second_start_of_a_study_is_one_line_and_reading_needs_no_lock(tmp_path, capsys, monkeypatch):
    flags = small("--config.strategies=none", "--config.seeds=0", "--config.transfer.protocols=linear")
    workdir = tmp_path / "workdir"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run(*flags, f"--workdir={workdir}") == 0
    names = sorted(path.name for path in workdir.iterdir())
    assert lock.LOCK not in names
    with lock.held(lock.LocalLockFile(workdir), str(workdir), print):
        capsys.readouterr()
        assert run(*flags, f"--workdir={workdir}") == 2
        assert f"error: {workdir}: process {os.getpid()} on " in capsys.readouterr().err
        assert (workdir / lock.LOCK).exists()
        for mode in ("plan", "status", "report"):
            assert run(*flags, f"--config.mode={mode}", f"--workdir={workdir}") == 0
    place, mirror = f"file://{workdir}", storage.Mirror(f"file://{workdir}", tmp_path / "mirror")
    with lock.held(mirror.lock_file, place, print):
        capsys.readouterr()
        assert run(*flags, f"--workdir={place}") == 2
        assert f"error: {place}: process {os.getpid()} on " in capsys.readouterr().err
        for mode in ("plan", "status", "report"):
            assert run(*flags, f"--config.mode={mode}", f"--workdir={place}") == 0
    assert run(*flags, f"--workdir={place}") == 0
    assert sorted(path.name for path in workdir.iterdir()) == names


@pytest.mark.long
def test_a_second_process_ends_with_2_and_the_first_with_the_same_results(tmp_path, tmp_path_factory):
    flags = ("--config.transfer.protocols=linear",)
    complete(tmp_path / "quiet", shared_cache(), *flags)
    cache = copied_cache(tmp_path_factory.mktemp("cache"))
    with started(tmp_path / "study", cache, *flags, pause=0.1) as first:
        wait_until(lambda: (tmp_path / "study" / status.STATUS).exists(), first)
        with started(tmp_path / "study", cache, *flags) as second:
            assert second.wait(120) == 2
            line = second.stderr.read()
        assert f"process {first.pid} on" in line
        assert "Traceback" not in line
        wait_until(lambda: any((tmp_path / "study" / "checkpoints").rglob("state/*")), first)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (tmp_path / "study" / lock.LOCK).exists()
    assert "was left behind; taken over" in complete(tmp_path / "study", cache, *flags).stderr
    assert not (tmp_path / "study" / lock.LOCK).exists()
    assert_same_bits(tmp_path / "study", tmp_path / "quiet")
