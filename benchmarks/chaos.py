"""Kills a tiny study again and again, and compares what it ends with, byte by byte, with a quiet run.

    python -m benchmarks.chaos --kills=200
    python -m benchmarks.chaos --kills=10 --where=files,push

Each kill is a SIGKILL of a study in a folder of its own, which the same command then takes to its end:

- `random`: at a moment drawn from the duration of the quiet run;
- `files`: before a drawn file operation (rename, removal, new folder) of all that the study does;
- `preparation`: the same among those before the first checkpoint;
- `cache`: the same among those below the folder of cached activations, which are kept on disk alone;
- `export`: the same while a finished study is exported;
- `push`: the same with a remote workdir (`file://`), of which the remote copy is compared.

Compared are results.jsonl, the adapted weights, the arrays of predictions and, for `export`, the exported
weights. The exit code is 1 if anything differs.
"""

import argparse
import dataclasses
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WHERE = ("random", "files", "preparation", "cache", "export", "push")
STUDY = (
    f"--config={ROOT}/tests/configs/tiny_study.py",
    "--config.strategies=switching",
    "--config.transfer.protocols=linear",
    "--config.transfer.baseline=",
)
_CODE = """
import os, signal, sys
log, kill_at, count = open(sys.argv.pop(1), "a", encoding="utf-8"), int(sys.argv.pop(1)), 0

def watch(event, arguments):
    global count
    if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"):
        path = arguments[1 if event in ("os.rename", "os.link") else 0]
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        log.write(f"{event} {os.fspath(path)!r}\\n")
        log.flush()

from dapt_jax.runtime import storage
storage.PUSH_S = 0.05
from dapt_jax.main import main
sys.addaudithook(watch)
sys.exit(main(sys.argv))
"""


@dataclasses.dataclass
class Tally:
    """What came of the kills at one kind of moment.

    Attributes:
        killed: Kills that came before the end of the study.
        same: Studies that ended as the quiet one.
        findings: A line for each other one.
    """

    killed: int = 0
    same: int = 0
    findings: list[str] = dataclasses.field(default_factory=list)


def command(log: Path, kill_at: int, workdir: str, *more: str) -> list[str]:
    """Return the command of a study that is killed before a file operation; -1 for none."""
    return [sys.executable, "-c", _CODE, str(log), str(kill_at), *STUDY, f"--workdir={workdir}", *more]


def run(folder: Path, line: list[str], kill_after: float | None = None) -> tuple[int, str]:
    """Run a command; return its exit code and what it wrote to standard error."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "home"),
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "xla"),
    }
    process = subprocess.Popen(
        line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, told = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        _, told = process.communicate()
    return process.returncode, told


def digests(workdir: Path) -> dict[str, str]:
    """Return a checksum of every file that results consist of; of arrays, of their values."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        name = path.relative_to(workdir).as_posix()
        if name == "results.jsonl" or path.suffix == ".safetensors":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".npz" and name.startswith("predictions/"):
            with np.load(path) as arrays:
                values = [key.encode() + arrays[key].tobytes() for key in sorted(arrays)]
            found[name] = hashlib.sha256(b"".join(values)).hexdigest()
    return found


class Kind:
    """Studies that are killed at one kind of moment, and the quiet one."""

    def __init__(self, where: str, folder: Path):
        """Run the quiet study.

        Raises:
            RuntimeError: The quiet study fails.
        """
        self.where, self.folder = where, folder
        self.more = ("--config.cache.memory_mb=0", "--config.cache.mode=auto") if where == "cache" else ()
        quiet = folder / "quiet"
        begun = time.monotonic()
        self._whole(quiet)
        self.seconds = time.monotonic() - begun
        if where == "export":
            self._whole(quiet, "--config.mode=export")
        self.expected = digests(quiet / "work")
        operations = (quiet / "log").read_text(encoding="utf-8").splitlines()
        self.moments = self._moments(operations)

    def _place(self, folder: Path) -> str:
        return f"file://{folder}/work" if self.where == "push" else str(folder / "work")

    def _whole(self, folder: Path, *more: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log").write_text("", encoding="utf-8")
        code, told = run(folder, command(folder / "log", -1, self._place(folder), *self.more, *more))
        if code:
            raise RuntimeError(f"exit code {code}: {told[-400:]}")

    def _moments(self, operations: list[str]) -> list[int]:
        numbers = range(len(operations))
        if self.where == "cache":
            return [number for number in numbers if "/cache/" in operations[number]]
        if self.where == "push":
            return [number for number in numbers if "/work/" in operations[number]]
        if self.where == "preparation":
            first = next((n for n in numbers if "orbax-checkpoint-tmp" in operations[n]), len(operations))
            return list(range(first))
        return list(numbers)

    def kill(self, draw: random.Random, number: int, tally: Tally) -> None:
        """Kill one study, take it to its end, and compare."""
        folder = self.folder / f"kill{number}"
        more, after, moment = self.more, None, -1
        if self.where == "export":
            shutil.copytree(self.folder / "quiet" / "work", folder / "work")
            for exported in (folder / "work").glob("export*"):
                shutil.rmtree(exported)
            more = (*more, "--config.mode=export")
        if self.where == "random":
            after = draw.uniform(0.2, 0.95) * self.seconds
        else:
            moment = draw.choice(self.moments)
        folder.mkdir(parents=True, exist_ok=True)
        code, _ = run(folder, command(folder / "log", moment, self._place(folder), *more), after)
        tally.killed += code == -signal.SIGKILL
        try:
            self._whole(folder, *(("--config.mode=export",) if self.where == "export" else ()))
            found = digests(folder / "work")
            differing = sorted(
                name for name in {*found, *self.expected} if found.get(name) != self.expected.get(name)
            )
            failure = f"other values in {', '.join(differing[:4])}" if differing else ""
        except RuntimeError as error:
            failure = str(error)
        at = f"{after:.1f} s" if after else f"operation {moment}"
        if failure:
            tally.findings.append(f"{self.where}, killed at {at}: {failure}")
        else:
            tally.same += 1
            shutil.rmtree(folder)


def measure(where: str, kills: int, seed: int = 0) -> Tally:
    """Kill studies at one kind of moment.

    Args:
        where: One of `WHERE`.
        kills: Number of kills.
        seed: Seed of the moments.

    Returns:
        What came of them.
    """
    draw, tally = random.Random(f"{seed}/{where}"), Tally()
    with tempfile.TemporaryDirectory() as folder:
        kind = Kind(where, Path(folder) / where)
        for number in range(kills):
            kind.kill(draw, number, tally)
    return tally


def main() -> int:
    """Print a table of kills and outcomes, and the findings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="of all kinds together")
    parser.add_argument("--where", default=",".join(WHERE))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen = options.where.split(",")
    print(f"{'killed at':<13}{'runs':>6}{'killed':>8}{'same':>6}{'findings':>10}", flush=True)
    findings = []
    for number, where in enumerate(chosen):
        kills = options.kills // len(chosen) + (number < options.kills % len(chosen))
        tally = measure(where, kills, options.seed)
        findings += tally.findings
        print(f"{where:<13}{kills:>6}{tally.killed:>8}{tally.same:>6}{len(tally.findings):>10}", flush=True)
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
