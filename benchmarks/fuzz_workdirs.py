"""Damages each record of a finished study and asks for its report, its status and a new start.

    python -m benchmarks.fuzz_workdirs --count=20 --csv=benchmarks/results/fuzz_workdirs.csv

Damage is that of `benchmarks.fuzz_damage`, or the file is empty, absent, a folder, a link to nowhere, or `[]`.
The study is that of `benchmarks.chaos` with three seeds and two strategies. A command may end with 0, or with 2 and
one line; all else is a finding.
"""

import argparse
import contextlib
import csv
import io
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import chaos_child
from benchmarks.chaos import CONFIG
from benchmarks.chaos_child import fault
from benchmarks.fuzz_damage import damage
from dapt_jax import main as cli

COMMANDS = ("report", "status", "run")
WIDER = ("--config.seeds=0,1,2", "--config.strategies=none,switching")
"""Settings with which the study of `benchmarks.chaos` leaves more files."""


def files_of(workdir: Path) -> list[str]:
    """Return the names of the records of a study; reports, which are made of them, are none."""
    names = [path.relative_to(workdir).as_posix() for path in sorted(workdir.rglob("*")) if path.is_file()]
    return [name for name in names if not name.startswith(("report.", "figures/"))]


def spoil(path: Path, number: int, rng: random.Random) -> None:
    """Damage a file; the first five numbers are not random."""
    content = path.read_bytes()
    if number in (1, 2, 3):
        path.unlink()
    if number == 0:
        path.write_bytes(b"")
    elif number == 2:
        path.mkdir()
    elif number == 3:
        path.symlink_to("nowhere")
    elif number == 4:
        path.write_bytes(b"[]\n")
    elif number > 4:
        path.write_bytes(damage(content, rng))


def shown(workdir: Path, command: str) -> tuple[int, str]:
    """Run a mode that reads records alone, in this process; return its exit code and what it said of errors."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli.main(["dapt_jax", f"--config.mode={command}", f"--workdir={workdir}"])
        except Exception:
            traceback.print_exc()
            code = 1
    return code, said.getvalue()


def started(workdir: Path, folder: Path) -> tuple[int, str]:
    """Start the study of `benchmarks.chaos` in a fork of this process; return its exit code and what it said."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    arguments = [f"--config={CONFIG}", f"--workdir={workdir}", *WIDER]
    pid = chaos_child.start(arguments, folder / "xla", log, {"XDG_CACHE_HOME": str(folder / "home")})
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, log.read_text(encoding="utf-8", errors="replace")


def measure(
    good: Path, folder: Path, count: int, *, seed: int = 0, commands: Sequence[str] = COMMANDS
) -> tuple[list[dict[str, Any]], list[str]]:
    """Damage every record of a finished study.

    Args:
        good: Folder of the study, which stays as it is.
        folder: Folder for damaged copies.
        count: Number of ways in which each file is damaged.
        seed: Seed of the damage.
        commands: Some of `COMMANDS`.

    Returns:
        A row for each file and command, and the findings, a line each.
    """
    work, rows, findings = folder / "work", [], []
    for name in files_of(good):
        for command in commands:
            ends: Counter[str] = Counter()
            for number in range(count):
                shutil.rmtree(work, ignore_errors=True)
                shutil.copytree(good, work)
                spoil(work / name, number, random.Random(f"{seed}/{name}/{number}"))
                code, said = started(work, folder) if command == "run" else shown(work, command)
                wrong = fault(code, said)
                ends["findings" if wrong else "refused" if code else "shown"] += 1
                if wrong:
                    findings.append(f"{name}, damage {number}, mode={command}: {wrong}")
            counts = {each: ends[each] for each in ("shown", "refused", "findings")}
            rows.append({"file": name, "mode": command, "tried": count, **counts})
            print(
                f"{name:<50}{command:>10}{count:>10}" + "".join(f"{each:>10}" for each in counts.values()),
                flush=True,
            )
    return rows, findings


def main() -> int:
    """Print a table of the files and what came of them, and the findings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=20, help="ways in which each file is damaged")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--workdir", help="folder of such a study, finished; it is run by default")
    parser.add_argument("--csv", help="file of the table")
    options = parser.parse_args()
    commands = options.commands.split(",")
    chaos_child.quicken_report()
    with tempfile.TemporaryDirectory() as name:
        folder, good = Path(name), Path(options.workdir or f"{name}/good")
        if not options.workdir or "run" in commands:
            chaos_child.warm_up()
        if not options.workdir and (end := started(good, folder))[0]:
            print(end[1], file=sys.stderr)
            return 1
        rows, findings = measure(good, folder, options.count, seed=options.seed, commands=commands)
    print(*findings, f"{sum(row['tried'] for row in rows)} commands, {len(findings)} findings", sep="\n")
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
