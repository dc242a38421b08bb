"""Kills a tiny study again and again, starts it again, and compares what it ends with, byte by byte, with a quiet run.

    python -m benchmarks.chaos --kills=200 --two=50 --log=chaos.jsonl --csv=benchmarks/results/chaos.csv
    python -m benchmarks.chaos --kills=10 --where=files,push

A study in a folder of its own is started, killed with SIGKILL, started by the same command and killed again, up to
five times, and then taken to its end. Kills come

- `random`: at a moment drawn from the duration of the quiet run;
- `files`: before, inside or after a drawn file operation (creation, write, fsync, rename, removal, new or removed
  folder) of all that the study does;
- `preparation`: the same among those before the first checkpoint;
- `cache`: the same among those below the folder of cached activations, which are kept on disk alone;
- `compilation`: the same among those below the folder of compiled programs, which is empty at first;
- `export`: the same while a finished study is exported;
- `push`: the same among those of a remote workdir (`file://`), of which the remote copy is compared; half of them are
  started again on a machine without the local copy;
- `full` and `read-only`: from a drawn file operation below the workdir on, all fail with ENOSPC or EROFS, upon which a
  study must end by itself, with one line and exit code 2, or with 0 if it can do without;
- `two`: a study in two processes, of which one is killed at a random moment or at a file operation.

Compared are results.jsonl, all weights, predictions, exported weights, and of the ledger the steps, images and curves
of every row, and that its FLOPs are no fewer than those of the quiet run. A study is a fork of one process that has
imported everything, which makes a start cheap. Studies that are in the file of `--log` already are not
repeated. The
exit code is 1 if anything differs.
"""

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import chaos_child
from benchmarks.chaos_child import STAGES, Kill, fault

ALONE = ("random", "files", "preparation", "cache", "compilation", "export", "push", "full", "read-only")
WHERE = (*ALONE, "two")
CONFIG = Path(__file__).with_name("chaos_config.py")
COUNTED = ("strategy", "seed", "stage", "phase", "steps", "images", "curve")
CHAIN = 5
"""Most kills of one study."""

Row = dict[str, Any]
_MOST_S = 900
_LEAST_MOMENTS = 10
_PEER_S = 60
"""Seconds in which the other of two processes may end by itself."""


def digests(workdir: Path) -> dict[str, Any]:
    """Return what a workdir's results consist of, by name of the file: bytes, arrays and counts."""
    found: dict[str, Any] = {}
    for path in sorted(workdir.rglob("*")):
        name = path.relative_to(workdir).as_posix()
        if name == "results.jsonl" or (path.suffix == ".safetensors" and path.is_file()):
            found[name] = path.read_bytes()
        elif path.suffix == ".npz" and name.startswith("predictions/"):
            with np.load(path) as arrays:
                found[name] = [(key, arrays[key].dtype, arrays[key].tobytes()) for key in sorted(arrays)]
        elif name == "ledger.jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[name] = [{key: row[key] for key in COUNTED} for row in rows]
    return found


def model_flops(workdir: Path) -> int:
    """Return the FLOPs on the rows of a ledger."""
    lines = (workdir / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line)["model_flops"] for line in lines)


class Kind:
    """Studies that are killed at one kind of moment, and the quiet one.

    Attributes:
        seconds: Duration of the quiet study.
        moments: Number of file operations that count.
    """

    def __init__(self, where: str, folder: Path):
        """Run the quiet study, or take the one that another kind of moment has run.

        Args:
            where: One of `WHERE`.
            folder: Folder of all studies.

        Raises:
            RuntimeError: The quiet study fails, or does not do what is to be killed.
        """
        self.where, self.folder, self._xla = where, folder / where, folder / "xla"
        quiet = folder / f"quiet-{where if where in ('cache', 'compilation', 'push', 'two') else 'alone'}"
        if not (quiet / "seconds").exists():
            for _ in range(1 if where == "compilation" else 2):  # the first start compiles
                shutil.rmtree(quiet, ignore_errors=True)
                quiet.mkdir(parents=True)
                begun = time.monotonic()
                self._whole(quiet)
            (quiet / "seconds").write_text(str(time.monotonic() - begun))
        self.seconds = float((quiet / "seconds").read_text())
        self.folder.mkdir(exist_ok=True)
        if where == "export":
            shutil.copytree(quiet, self.folder / "quiet", dirs_exist_ok=True)
            quiet = self.folder / "quiet"
            shutil.copytree(quiet / "work", self.folder / "finished", dirs_exist_ok=True)
            self._whole(quiet, "--config.mode=export")
        self.expected, self._flops = digests(quiet / "work"), model_flops(quiet / "work")
        paths = [line.partition(" ")[2] for line in json.loads((quiet / "log0.json").read_text())]
        self._pattern = {
            "cache": "/work/cache/", "compilation": "/xla/", "push": "/work(/|$)", "export": "/work/",
            "full": "/work/", "read-only": "/work/",
        }.get(where, ".")  # fmt: skip
        self.moments = sum(bool(re.search(self._pattern, path)) for path in paths)
        if where == "preparation":
            self.moments = next(number for number, path in enumerate(paths) if "checkpoint" in path)
        if self.moments < _LEAST_MOMENTS and where not in ("random", "two"):
            raise RuntimeError(f"{self.moments} file operations of the kind {where}: the study does none")

    def _start(self, folder: Path, number: int, more: tuple[str, ...], port: int, kill: Kill | None) -> int:
        remote = self.where == "push"
        place = f"file://{folder}/work" if remote else str(folder / "work")
        # Reading the activations of so small a network back takes longer than computing them.
        disk = ("--config.cache.memory_mb=0", "--config.cache.flops_per_byte=1e-9")
        cache = disk if self.where == "cache" else ()
        xla = folder / "xla" if self.where == "compilation" else self._xla
        environment = {"XDG_CACHE_HOME": str(folder / "home")}
        if self.where == "two":
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number)
            }  # fmt: skip
        arguments = [f"--config={CONFIG}", f"--workdir={place}", *cache, *more]
        return chaos_child.start(arguments, xla, folder / f"log{number}", environment, kill)

    def _run(
        self, folder: Path, *more: str, victim: int = 0, kill: Kill | None = None, after: float | None = None
    ) -> list[int]:
        """Run a study, kill one of its processes, and return all exit codes; signals are negative."""
        port, count = _free_port(), 2 if self.where == "two" else 1
        running = {
            self._start(folder, number, more, port, kill if number == victim else None): number
            for number in range(count)
        }
        killed = next(pid for pid, number in running.items() if number == victim)
        codes, deadline = [0] * count, time.monotonic() + _MOST_S
        moment = time.monotonic() + after if after is not None else None
        while running:
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    number = running.pop(pid)
                    codes[number] = os.waitstatus_to_exitcode(status)
                    if codes[number]:
                        deadline = min(deadline, time.monotonic() + _PEER_S)
            if moment is not None and time.monotonic() > moment and killed in running:
                os.kill(killed, signal.SIGKILL)
                moment = None
            if time.monotonic() > deadline:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        return codes

    def _whole(self, folder: Path, *more: str) -> None:
        codes = self._run(folder, *more)
        if any(codes):
            said = " | ".join((folder / f"log{number}").read_text()[-600:] for number in range(len(codes)))
            raise RuntimeError(f"exit codes {codes}: {said}")

    def kill(self, draw: random.Random, number: int) -> tuple[list[str], str]:
        """Kill one study up to `CHAIN` times, take it to its end, and compare.

        Returns:
            The moments at which it was killed, and the finding; empty for none.
        """
        folder = self.folder / str(number)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        more: tuple[str, ...] = ()
        if self.where == "export":
            shutil.copytree(self.folder / "finished", folder / "work")
            more = ("--config.mode=export",)
        killed: list[str] = []
        for start in range(CHAIN):
            share = draw.random() * (1 if start == 0 else 0.3)  # a study that goes on has less to do
            victim = draw.randrange(2) if self.where == "two" else 0
            by_time = self.where == "random" or (self.where == "two" and (victim or draw.random() < 0.5))
            stage = {"full": "ENOSPC", "read-only": "EROFS"}.get(self.where) or draw.choice(STAGES)
            kill = Kill(self._pattern, int(share * self.moments), stage)
            if by_time:
                codes = self._run(folder, *more, victim=victim, after=share * self.seconds)
                moment = f"{share * self.seconds:.2f} s"
            else:
                codes = self._run(folder, *more, victim=victim, kill=kill)
                moment = f"{kill.stage} {kill.number}"
            if stage not in STAGES:
                killed.append(moment)
                if said := fault(codes[0], (folder / "log0").read_text(encoding="utf-8")):
                    return killed, said
                continue
            if codes[victim] != -signal.SIGKILL:
                break
            killed.append(f"process {victim} {moment}" if self.where == "two" else moment)
            if self.where == "push" and draw.random() < 0.5:
                shutil.rmtree(folder / "home", ignore_errors=True)
                killed[-1] += " with its disk"
        try:
            self._whole(folder, *more)
            found = digests(folder / "work")
            names = sorted({*found, *self.expected})
            differing = [name for name in names if found.get(name) != self.expected.get(name)]
            finding = f"differs: {', '.join(differing[:4])}" if differing else ""
            if (flops := model_flops(folder / "work")) < self._flops:
                finding += f" {self._flops - flops:,} FLOPs are on no row"
        except RuntimeError as error:
            finding = str(error)
        if not finding:
            shutil.rmtree(folder)
        return killed, finding.strip()


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("localhost", 0))
        return int(asked.getsockname()[1])


def measure(
    where: str, kills: int, folder: Path, *, seed: int = 0, log: Path | None = None, rows: Sequence[Row] = ()
) -> list[Row]:
    """Kill studies at one kind of moment.

    Args:
        where: One of `WHERE`.
        kills: Number of kills at least.
        folder: Folder for the studies; those with findings stay there.
        seed: Seed of the moments.
        log: File that takes a line for each study.
        rows: Rows of studies of an earlier start.

    Returns:
        A row for each study.
    """
    mine = [row for row in rows if (row["where"], row["seed"]) == (where, seed)]
    kind = None
    while sum(len(row["killed"]) for row in mine) < kills:
        kind = kind or Kind(where, folder)
        begun, number = time.monotonic(), len(mine)
        killed, finding = kind.kill(random.Random(f"{seed}/{where}/{number}"), number)
        seconds = round(time.monotonic() - begun, 1)
        mine.append({"where": where, "seed": seed, "killed": killed, "finding": finding, "seconds": seconds})
        if log:
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(mine[-1]) + "\n")
    return mine


def table(rows: Sequence[Row]) -> list[Row]:
    """Return how many kills there were of each kind, and what came of them."""
    return [
        {
            "where": where,
            "kills": sum(len(row["killed"]) for row in mine),
            "studies": len(mine),
            "same": sum(not row["finding"] for row in mine),
            "findings": sum(bool(row["finding"]) for row in mine),
            "minutes": round(sum(row["seconds"] for row in mine) / 60, 1),
        }
        for where in WHERE
        if (mine := [row for row in rows if row["where"] == where])
    ]


def main() -> int:
    """Print a table of kills and outcomes, and the findings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=35, help="of one process, of all kinds together")
    parser.add_argument("--two", type=int, default=0, help="of one of two processes")
    parser.add_argument("--where", default=",".join(ALONE))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="folder for the studies, of which those with findings stay")
    parser.add_argument("--log", type=Path, help="file with a line for each kill, to continue from")
    parser.add_argument("--csv", help="file of the table")
    options = parser.parse_args()
    rows = []
    if options.log and options.log.exists():
        rows = [json.loads(line) for line in options.log.read_text(encoding="utf-8").splitlines()]
    chosen = options.where.split(",")
    shares = {
        where: options.kills // len(chosen) + (number < options.kills % len(chosen))
        for number, where in enumerate(chosen)
    } | ({"two": options.two} if options.two else {})
    folder = Path(options.folder or tempfile.mkdtemp(prefix="chaos-"))
    chaos_child.warm_up()
    before, rows = rows, []
    for where, kills in shares.items():
        rows += measure(where, kills, folder, seed=options.seed, log=options.log, rows=before)
        print(*(f"{row['where']}, killed {', '.join(row['killed'])}: {row['finding']}"
                for row in rows if row["where"] == where and row["finding"]), sep="\n", flush=True)  # fmt: skip
    lines = table(rows)
    print("".join(f"{name:>12}" for name in lines[0]))
    for line in lines:
        print("".join(f"{value:>12}" for value in line.values()))
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    return 1 if any(row["finding"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
