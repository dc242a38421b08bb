"""Terminals, pipes, disks and limits as they come: a line and exit code 2, or no harm, and never a traceback."""

import errno
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from safetensors import SafetensorError

from dapt_jax import main
from dapt_jax.errors import is_full, of_machine
from dapt_jax.monitoring import status
from dapt_jax.runtime import preemption, user_cache
from tests.studies import ROOT

PRINTS = """
import os, sys
from dapt_jax.runtime import streams
streams.guard()
opened = os.open(os.devnull, os.O_RDONLY)
for number in range(3000):
    streams.say(f"{number} \\u00e9 \\x1b[2J \\udcff")
print("still here", opened, file=sys.stderr)
sys.exit(streams.finish(0))
"""


def shell(line, **environment):
    command = line.replace("PRINTS", f'"{sys.executable}" -c "$CODE"')
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env={**os.environ, "CODE": PRINTS, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("where", [">&-", ">&- 2>&-", "<&- >&- 2>&-", "| head -1", "2>&- | head -1"])
def test_a_stream_that_is_closed_or_unread_does_no_harm(where):
    told = shell(f"PRINTS {where}")
    assert told.returncode == 0
    assert "Traceback" not in told.stderr
    assert "ignored" not in told.stderr
    # No file that is opened later takes the place of a closed stream.
    assert not told.stderr or int(told.stderr.split()[-1]) > 2


def test_a_narrow_encoding_and_control_characters_are_escaped():
    narrow = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    told = shell("PRINTS", **narrow)
    assert told.returncode == 0
    assert told.stdout.splitlines()[7] == r"7 \xe9 \x1b[2J \udcff"


def test_a_full_disk_under_the_output_is_one_line():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    code = PRINTS.replace("range(3000)", "range(0)").replace("print(", "print('once'); print(")
    told = shell("PRINTS > /dev/full", CODE=code)
    assert (told.returncode, told.stderr.splitlines()[1:]) == (
        2,
        ["error: standard output cannot be written (No space left on device); make room"],
    )


def test_an_error_that_nobody_can_be_told_still_has_its_exit_code(tmp_path):
    """A log that meets the largest size of a file: `ulimit -f` counts kilobytes."""
    code = "\n".join(
        [*PRINTS.splitlines()[:4], "streams.say('e' * 2000, sys.stderr); sys.exit(streams.finish(2))"]
    )
    for where in (f"> {tmp_path}/log 2>&1", f"2> {tmp_path}/log"):
        assert shell(f"ulimit -f 1; PRINTS {where}", CODE=code).returncode == 2


def caused(error, by):
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/w/a"), "/w/a: No space left on device: make room"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "File too large: raise the limit .*ulimit -f"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/w"), "/w: Read-only file system: make the disk writable"),
        (OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "n"), "n: File name too long; .* shorter"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "Too many open files: raise .*ulimit -n"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "make room"),
        (caused(ValueError("write"), OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))), "Disk quota exceeded"),
        (MemoryError(), "not enough memory: free some"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), "not enough memory .RESOURCE"),
        (RuntimeError("can't start new thread"), "not enough memory"),
    ],
)  # fmt: skip
def test_an_error_of_the_machine_is_one_line(error, line):
    found = of_machine(error)
    assert re.search(line, found)
    assert "\n" not in found
    assert is_full(error) == any(each in found for each in ("make room", "ulimit -f"))


@pytest.mark.parametrize("error", [KeyError("name"), ValueError("a mistake"), OSError("no number")])
def test_an_error_of_the_code_is_not(error):
    assert of_machine(error) == ""
    during = KeyError("name")
    during.__context__ = FileNotFoundError(errno.ENOENT, "No such file", "/w")
    assert of_machine(during) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not enforce ulimit -v")
def test_too_little_address_space_is_one_line_before_xla_waits_for_ever_in_it():
    told = shell(
        "ulimit -v 1300000; PYTHON -m dapt_jax.main --workdir=none".replace("PYTHON", sys.executable)
    )
    assert told.returncode == 2
    assert re.fullmatch(
        r"error: ulimit -v: an address space of 1.24 GiB; expected at least .*\n", told.stderr
    )


def test_without_a_home_caches_are_in_a_folder_of_the_user_alone(tmp_path, monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(user_cache.Path, "home", nobody)
    monkeypatch.setattr(user_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = user_cache.folder("xla")
    home = tmp_path / f"dapt_jax-home-{os.getuid()}"
    assert folder == home / ".cache" / "dapt_jax" / "xla"
    assert home.stat().st_mode & 0o777 == 0o700
    home.chmod(0o777)
    with pytest.raises(ValueError, match="others may write to it; set HOME or XDG_CACHE_HOME"):
        user_cache.folder("xla")


def test_a_closed_terminal_stops_a_study_that_a_restart_resumes_unless_nohup_has_it_ignored():
    with preemption.PreemptionHandler(), pytest.raises(preemption.Stopped) as stopped:
        os.kill(os.getpid(), signal.SIGHUP)
    assert (stopped.value.code, str(stopped.value)) == (preemption.RESTART_CODE, "SIGHUP")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with preemption.PreemptionHandler():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"arms": 1}', "\\xff", '{"arms": {}, "flops": {}, "at": {}}']
)
def test_a_damaged_heartbeat_is_one_line(tmp_path, text):
    (tmp_path / status.STATUS).write_bytes(text.encode().replace(b"\\xff", b"\xff"))
    with pytest.raises(ValueError, match=r"status\.json: not (JSON|a heartbeat)"):
        status.lines(tmp_path, 0.0)


def test_a_signal_inside_a_destructor_stops_all_the_same(capfd):
    class Signals:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def work():
        del_me = Signals()
        del del_me
        time.sleep(10)

    with preemption.PreemptionHandler(), pytest.raises(preemption.Stopped, match="SIGTERM"):
        work()
    assert capfd.readouterr().err == ""


def test_a_signal_that_a_library_turns_into_its_own_error_is_a_stop(monkeypatch, capsys):
    def import_jax():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except preemption.Stopped as error:
            raise ImportError("Encountered an error while initializing the extension.") from error

    monkeypatch.setattr(main, "_show_records", lambda *_: import_jax())
    assert main.main(["dapt_jax", "--config.mode=status"]) == preemption.STOPPED_CODE
    assert capsys.readouterr().err == "stopped by SIGINT; the same command goes on from the last checkpoint\n"
