"""Feeds damaged weight and image files to the readers and counts what they make of them.

    python -m benchmarks.fuzz_readers --count=100000 --csv=benchmarks/results/fuzz_weights.csv
    python -m benchmarks.fuzz_readers --kind=images --count=100000 --csv=benchmarks/results/fuzz_images.csv
    python -m benchmarks.fuzz_readers --formats=npz --first=NUMBER --count=1

Every input is a well-formed small file of one format (written here, without the framework that it belongs to)
after one of these: bits flipped, a run of bytes overwritten, cut, a piece removed, doubled or swapped, a
number that looks like a length set to an extreme, or, for pickles, instructions inserted. A reader may return
arrays or raise `UserError` of one line. All else is a finding: another exception, a dead process, more than
`--seconds` of processor time for one file (or two minutes of any time), or more memory than twice the file and
the allowance: of weights `weights.source.SPARE`, of images the limit for decoded data
(`benchmarks.fuzz_images.LIMIT`). Memory is the growth of the process's resident set, measured anew for each
file; for the first 500 files of a format the allocations of Python as well. The worst ratio to what is
allowed is in the table.

Inputs follow from (seed, format, number) alone, and the table's `corpus` is a checksum of all of them. Formats
take turns of 5,000 inputs, each of which is entered in the file of `--csv`: a long run continues where it was
interrupted, and a larger `--count` adds to a smaller one. Inputs lie in memory (/dev/shm) where the system has
it: to replace a small file on a disk takes four times as long as to read it.

Found so far, and mended: NumPy's parser of array headers raises `TokenError`; HDF5 2.0 loops without end on
some damaged attributes; zipfile reserves what a damaged size claims (a gigabyte for a file of a kilobyte,
LZMA likewise), cannot decode some names, and repeats long ones in its errors; a pickle may make an array and
never fill it.
"""

import argparse
import csv
import dataclasses
import hashlib
import importlib
import itertools
import multiprocessing
import operator
import random
import resource
import signal
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_BLOCK = 5000
"""Inputs of a format after which the next one takes its turn."""

_MEMORY = Path("/dev/shm")
_TRACED = 500
"""Files of a format of which Python's allocations are measured, which takes half the time."""

_SILENT_S = 120
"""Seconds after which a process that says nothing is ended."""


@dataclasses.dataclass
class Outcomes:
    """What readers made of the inputs of one format.

    Attributes:
        format: Name of the format.
        seed: Seed of the inputs.
        tried: Number of inputs.
        read: Inputs that gave arrays.
        refused: Inputs that gave one line.
        guarded: Inputs on which a library failed, and that give one line where they are tried in another process.
        findings: All others.
        memory: Greatest ratio of memory to what is allowed.
        slowest_s: Longest time for one input, in seconds.
        wall_s: Time for all of them, in seconds.
        corpus: Checksum of all inputs.
    """

    format: str
    seed: int
    tried: int = 0
    read: int = 0
    refused: int = 0
    guarded: int = 0
    findings: int = 0
    memory: float = 0.0
    slowest_s: float = 0.0
    wall_s: float = 0.0
    corpus: int = 0

    def with_more(self, more: "Outcomes") -> "Outcomes":
        """Return the outcomes of these and more inputs of the same format."""
        best = {"memory", "slowest_s"}
        summed = [field.name for field in dataclasses.fields(self) if field.name not in ("format", "seed")]
        values = {
            name: (max if name in best else operator.add)(getattr(self, name), getattr(more, name))
            for name in summed
        }
        return dataclasses.replace(self, **values)


def target(kind: str) -> ModuleType:
    """Return the module of the weight or the image formats."""
    return importlib.import_module(f"benchmarks.fuzz_{kind}")


def _reset_peak() -> None:
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Return the most bytes that were resident since `_reset_peak`, or ever where the system cannot say."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def make(module: ModuleType, name: str, seeds: dict[str, bytes], seed: int, number: int) -> bytes:
    """Return an input."""
    made: bytes = module.damaged(name, seeds[name], random.Random(f"{seed}/{name}/{number}"))
    return made


def _work(
    kind: str, jobs: Sequence[tuple[str, int]], seeds: dict[str, bytes], seed: int, folder: str,
    seconds: int, current: Any, channel: Any,
) -> None:  # fmt: skip
    """Read a batch; the place of each job is in `current` before it is read, so that a crash has a name."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, even inside a library's loop
    module = target(kind)
    module.prepare()
    for place, (name, number) in enumerate(jobs):
        data = make(module, name, seeds, seed, number)
        path = Path(folder) / f"input{module.SUFFIXES[name]}"
        path.write_bytes(data)
        current.value = place
        if number < _TRACED and not tracemalloc.is_tracing():
            tracemalloc.start()
        elif number >= _TRACED:
            tracemalloc.stop()
        traced = tracemalloc.is_tracing()
        if traced:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
        _reset_peak()
        resident, started = _peak(), time.perf_counter()
        signal.setitimer(signal.ITIMER_PROF, seconds)  # processor time: a busy machine is no finding
        outcome = module.read_all(path)
        signal.setitimer(signal.ITIMER_PROF, 0)
        duration = time.perf_counter() - started
        peak = _peak() - resident
        if traced:
            peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
        allowed = 2 * len(data) + module.LIMIT
        if peak > allowed:
            outcome = f"{peak:,} bytes of memory for a file of {len(data):,}"
        channel.send((place, outcome, peak / allowed, duration, _number(data)))
    channel.send(None)


def _number(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def fuzz(
    kind: str, names: Sequence[str], count: int, *, seed: int = 0, first: int = 0, seconds: int = 5
) -> tuple[dict[str, Outcomes], list[str]]:
    """Read inputs in processes of their own.

    Args:
        kind: "weights" or "images".
        names: Formats, of the module's `SUFFIXES`.
        count: Number of inputs of each.
        seed: Seed of all of them.
        first: Number of the first.
        seconds: Processor time that one input may take.

    Returns:
        How many there were of each outcome, by format, and the findings, a line each.
    """
    outcomes = {name: Outcomes(name, seed, count) for name in names}
    findings: list[str] = []
    context = multiprocessing.get_context("fork" if "jax" not in sys.modules else "spawn")
    current = context.Value("q", 0, lock=False)
    module = target(kind)
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        seeds = module.write_seeds(Path(folder))

        def judge(name: str, number: int, outcome: str) -> None:
            """Enter a finding, unless users are guarded from it: their readers refuse the same input."""
            again = ""
            if name in module.GUARDED:
                path = Path(folder) / f"again{module.SUFFIXES[name]}"
                path.write_bytes(make(module, name, seeds, seed, number))
                again = module.read_all(path)
            if again == "refused":
                outcomes[name].guarded += 1
            else:
                outcomes[name].findings += 1
                findings.append(f"{name}, input {number}: {outcome} {again}".strip())

        jobs = [(name, number) for name in names for number in range(first, first + count)]
        while jobs:
            ours, theirs = context.Pipe()
            batch, place, since = jobs[:_BLOCK], -1, time.perf_counter()
            worker = context.Process(
                target=_work, args=(kind, batch, seeds, seed, folder, seconds, current, theirs)
            )
            current.value = 0
            worker.start()
            theirs.close()
            try:
                while True:
                    if not ours.poll(_SILENT_S):
                        worker.kill()
                    if (said := ours.recv()) is None:
                        break
                    place, outcome, ratio, duration, digest = said
                    name, number = batch[place]
                    found, now = outcomes[name], time.perf_counter()
                    found.wall_s, since = found.wall_s + now - since, now
                    found.corpus += digest
                    found.memory = max(found.memory, ratio)
                    found.slowest_s = max(found.slowest_s, duration)
                    found.read += outcome == "read"
                    found.refused += outcome == "refused"
                    if outcome not in ("read", "refused"):
                        judge(name, number, outcome)
            except EOFError:
                worker.join()
                place = max(place + 1, current.value)
                name, number = batch[place]
                outcomes[name].corpus += _number(make(module, name, seeds, seed, number))
                judge(name, number, f"the process ended with {worker.exitcode}")
            worker.join()
            jobs = jobs[place + 1 :]
    return outcomes, findings


def _done(path: str | None, seed: int) -> dict[str, Outcomes]:
    """Return what the file of a table says of each format."""
    if not path or not Path(path).exists():
        return {}
    kinds = {field.name: field.type for field in dataclasses.fields(Outcomes)}
    with open(path, newline="", encoding="utf-8") as file:
        rows = [
            Outcomes(**{name: kind(row[name]) for name, kind in kinds.items() if name != "corpus"},  # type: ignore[operator, arg-type]
                     corpus=int(row["corpus"], 16))
            for row in csv.DictReader(file)
        ]  # fmt: skip
    return {row.format: row for row in rows if row.seed == seed}


def _texts(outcomes: Outcomes) -> dict[str, str]:
    texts = {
        field: f"{value:.3g}" if isinstance(value, float) else str(value)
        for field, value in dataclasses.asdict(outcomes).items()
    }
    return texts | {"corpus": f"{outcomes.corpus % (1 << 64):016x}"}


def _write(path: str, rows: Sequence[Outcomes]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Outcomes)])
        writer.writeheader()
        writer.writerows(_texts(row) for row in rows)


def main() -> int:
    """Print a table of outcomes and the findings; the exit code is 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="inputs of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--kind", choices=("weights", "images"), default="weights")
    parser.add_argument("--formats", default="", help="all by default")
    parser.add_argument("--csv", help="file of the table")
    options = parser.parse_args()
    rows = _done(options.csv, options.seed)
    shown = ("tried", "read", "refused", "guarded", "findings", "memory", "slowest_s", "wall_s")
    print(f"{'format':<15}" + "".join(f"{each:>10}" for each in shown) + f"{'corpus':>18}", flush=True)
    names = options.formats.split(",") if options.formats else list(target(options.kind).SUFFIXES)
    total = 0
    for end, name in itertools.product(range(_BLOCK, options.count + _BLOCK, _BLOCK), names):
        before = rows.get(name, Outcomes(name, options.seed))
        count = min(end, options.count) - before.tried
        if count <= 0:
            continue
        outcomes, findings = fuzz(
            options.kind,
            [name],
            count,
            seed=options.seed,
            first=options.first + before.tried,
            seconds=options.seconds,
        )
        rows[name] = before.with_more(outcomes[name])
        texts = _texts(rows[name])
        print(
            f"{name:<15}" + "".join(f"{texts[each]:>10}" for each in shown) + f"{texts['corpus']:>18}",
            flush=True,
        )
        for finding in findings:
            print(finding, flush=True)
        total += len(findings)
        if options.csv:
            _write(options.csv, list(rows.values()))
    print(f"{total} findings")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
