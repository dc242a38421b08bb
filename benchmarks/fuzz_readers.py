"""Feeds damaged weight and image files to the readers and counts what they make of them.

    python -m benchmarks.fuzz_readers --count=100000
    python -m benchmarks.fuzz_readers --kind=images --count=100000

Every input is a well-formed small file of one format (written here, without the framework that it belongs to)
after one of
these: bits flipped, a run of bytes overwritten, cut, a piece removed, doubled or swapped, a number that looks
like a length set to an extreme, or, for pickles, instructions inserted. A reader may return arrays or raise
`UserError` of one line. All else is a finding: another exception, a dead process, more than `--seconds` for
one file, or more memory than twice the file and the allowance: of weights `weights.source.SPARE`, of images
the limit for decoded data (`benchmarks.fuzz_images.LIMIT`); the worst ratio of memory to that is printed for
each format. Inputs follow from (seed, number) alone, so that each can be made
again: `--first=NUMBER --count=1`.

HDF5 files are read here without the process that the readers try them out in (`weights.keras_hdf5`): one for
each would take hours. Where the HDF5 library hangs or crashes, the file is read once more as users read it,
and counted as *guarded* if that gives one line.

Found so far, and mended: NumPy's parser of array headers raises `TokenError`; HDF5 2.0 loops without end on
some damaged attributes; zipfile reserves what a damaged size claims (a gigabyte for a file of a kilobyte,
LZMA likewise), cannot decode some names, and repeats long ones in its errors; a pickle may make an array and
never fill it.
"""

import argparse
import collections
import dataclasses
import io
import json
import multiprocessing
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import safetensors.numpy

from dapt_jax.errors import UserError
from dapt_jax.weights import keras_hdf5, readers
from dapt_jax.weights.source import SPARE
from tests import onnx_files
from tests.torch_files import tensor, write_old, write_zip

SUFFIXES = {
    "torch": ".pth",
    "torch_old": ".pth",
    "safetensors": ".safetensors",
    "npz": ".npz",
    "npz_packed": ".npz",
    "h5": ".h5",
    "weights_h5": ".h5",
    "keras": ".keras",
    "haiku": ".pkl",
    "onnx": ".onnx",
}
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)
_BATCH = 5000
_HDF5 = ("h5", "weights_h5", "keras")


def arrays() -> dict[str, np.ndarray]:
    """What every well-formed file holds."""
    rng = np.random.default_rng(0)
    return {
        "conv/kernel": rng.standard_normal((3, 3, 2, 4)).astype(np.float32),
        "norm/gamma": np.ones(4, np.float16),
        "norm/beta": np.zeros(4, ml_dtypes.bfloat16),
        "head/bias": rng.standard_normal(3),
    }


def write_seeds(folder: Path) -> dict[str, bytes]:
    """A well-formed file of every format."""
    flat = {key: a for key, a in arrays().items() if a.dtype != ml_dtypes.bfloat16}
    runs = {str(number): a for number, a in enumerate(flat.values())}
    content = {"epoch": 3, "state_dict": {key: tensor(a, str(n)) for n, (key, a) in enumerate(flat.items())}}
    write_zip(folder / "torch", content, {key: a.tobytes() for key, a in runs.items()})
    write_old(folder / "torch_old", content, runs)
    safetensors.numpy.save_file(arrays(), folder / "safetensors")
    with (folder / "npz").open("wb") as file:
        np.savez(file, **flat)
    with (folder / "npz_packed").open("wb") as file:
        np.savez_compressed(file, **flat)
    _write_legacy(folder / "h5", flat)
    _write_keras3(folder / "weights_h5", flat)
    with zipfile.ZipFile(folder / "keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Functional", "config": {"layers": []}}))
        archive.writestr("model.weights.h5", (folder / "weights_h5").read_bytes())
    nested = {
        "net/~/conv": {"w": flat["conv/kernel"]},
        "net/~/norm": {"scale": np.ones((1, 1, 1, 4), np.float32)},
    }
    (folder / "haiku").write_bytes(pickle.dumps((nested, {"ema": {"average": np.zeros(4)}}), protocol=4))
    (folder / "onnx").write_bytes(onnx_files.model({"onnx::MatMul_1": np.ones((2, 3), np.float32), **flat}))
    return {name: (folder / name).read_bytes() for name in SUFFIXES}


def _write_legacy(path: Path, flat: dict[str, np.ndarray]) -> None:
    with h5py.File(path, "w") as file:
        layers = sorted({key.partition("/")[0] for key in flat})
        file.attrs["layer_names"] = layers
        for layer in layers:
            names = [key for key in flat if key.startswith(layer)]
            file.create_group(layer).attrs["weight_names"] = names
            for name in names:
                file[layer][name] = flat[name]


def _write_keras3(path: Path, flat: dict[str, np.ndarray]) -> None:
    with h5py.File(path, "w") as file:
        variables = file.create_group("layers/conv2d/vars")
        variables.attrs["name"] = "conv"
        variables["0"] = flat["conv/kernel"]
        # A packed array too: filters are code of HDF5 that damaged files reach.
        variables.create_dataset("1", data=np.zeros(512, np.float32), compression="gzip", shuffle=True)


def damage(data: bytes, rng: random.Random) -> bytes:
    """One to four random changes."""
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not spoilt:
            break
        at, length = rng.randrange(len(spoilt)), rng.choice((1, 2, 4, 8, 16, 64))
        match rng.randrange(9):
            case 0:
                spoilt[at] ^= 1 << rng.randrange(8)
            case 1:
                spoilt[at : at + length] = rng.randbytes(length)
            case 2:
                del spoilt[at:]
            case 3:
                del spoilt[at : at + length]
            case 4:
                spoilt[at:at] = spoilt[at : at + length]
            case 5:
                other = rng.randrange(len(spoilt))
                spoilt[at : at + length] = spoilt[other : other + length]
            case 6 | 7:
                wide = rng.choice((1, 2, 4, 8))
                value = rng.choice(_EXTREMES) & ((1 << 8 * wide) - 1)
                spoilt[at : at + wide] = value.to_bytes(wide, rng.choice(("little", "big")))
            case 8:
                known = [
                    code.encode("latin1")
                    for code in vars(pickle).values()
                    if isinstance(code, str) and len(code) == 1
                ]
                known += [
                    code for code in vars(pickle).values() if isinstance(code, bytes) and len(code) == 1
                ]
                spoilt[at:at] = b"".join(rng.choice(known) for _ in range(rng.randrange(1, 5)))
    return bytes(spoilt)


def damaged(name: str, seed: bytes, rng: random.Random) -> bytes:
    """A damaged file; the pickle inside a PyTorch zip is spoilt before it is packed, else its checksum hides it."""
    if name in ("torch", "npz", "keras") and rng.random() < 0.6:
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(seed)) as old, zipfile.ZipFile(buffer, "w") as new:
            names = old.namelist()
            chosen = rng.choice(
                [each for each in names if each.endswith((".pkl", ".npy", ".h5", ".json"))] or names
            )
            for member in names:
                content = old.read(member)
                new.writestr(member, damage(content, rng) if member == chosen else content)
        return buffer.getvalue()
    if (
        name == "safetensors" and rng.random() < 0.5
    ):  # the header's length kept true, so that its text is reached
        (length,) = struct.unpack("<Q", seed[:8])
        header = damage(seed[8 : 8 + length], rng)
        return struct.pack("<Q", len(header)) + header + seed[8 + length :]
    return damage(seed, rng)


def read_all(path: Path) -> str:
    """What the readers make of a file: `read`, `refused`, or what went wrong."""
    try:
        weights = readers.read(path)
        for key in weights:
            weights.like(key)
            weights[key]
    except UserError as error:
        if "\n" in str(error) or len(str(error)) > 1500:
            return f"a line of {len(str(error))} characters: {str(error)[:80]!r}"
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "read"


@dataclasses.dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
        suffixes: Suffix of each format's files.
        write_seeds: Writes and returns a well-formed file of each.
        damaged: Damages one.
        read_all: Reads a file.
        prepare: What a process does first.
        spare: Bytes of memory that reading may take beside twice the file.
    """

    suffixes: dict[str, str]
    write_seeds: Callable[[Path], dict[str, bytes]]
    damaged: Callable[[str, bytes, random.Random], bytes]
    read_all: Callable[[Path], str]
    prepare: Callable[[], None]
    spare: int


def target(kind: str) -> Target:
    """The weight or the image formats."""
    if kind == "images":
        from benchmarks import fuzz_images as images

        return Target(
            images.SUFFIXES, images.write_seeds, images.damaged, images.read_all, images.prepare, images.LIMIT
        )
    return Target(SUFFIXES, write_seeds, damaged, read_all, _without_trial, SPARE)


def _without_trial() -> None:
    keras_hdf5._try_out = lambda path: None


def _resident() -> int:
    """Most bytes of this process that were ever in memory, those of C libraries too."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _work(
    kind: str, seeds: dict[str, bytes], seed: int, numbers: range, folder: str, seconds: int, channel: Any
) -> None:
    """Reads a batch; tells of each number before it is read, so that a crash has a name."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, even inside a library's loop
    fuzzed = target(kind)
    fuzzed.prepare()
    tracemalloc.start()
    names = list(fuzzed.suffixes)
    highest = _resident()
    for number in numbers:
        rng = random.Random(f"{seed}/{number}")
        name = names[number % len(names)]
        data = fuzzed.damaged(name, seeds[name], rng)
        path = Path(folder) / f"input{fuzzed.suffixes[name]}"
        path.write_bytes(data)
        channel.send((number, name, "started", 0.0))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        signal.setitimer(signal.ITIMER_PROF, seconds)  # processor time: a busy machine is no finding
        outcome = fuzzed.read_all(path)
        signal.setitimer(signal.ITIMER_PROF, 0)
        peak = max(tracemalloc.get_traced_memory()[1] - before, _resident() - highest)
        highest = max(highest, _resident())
        allowed = 2 * len(data) + fuzzed.spare
        if peak > allowed:
            outcome = f"{peak:,} bytes of memory for a file of {len(data):,}"
        channel.send((number, name, outcome, peak / allowed))
    channel.send(None)


def run(
    count: int,
    *,
    seed: int = 0,
    first: int = 0,
    seconds: int = 5,
    kind: str = "weights",
    worst: dict[str, float] | None = None,
) -> tuple[collections.Counter, list[str]]:
    """Reads `count` inputs in processes of their own.

    Args:
        count: number of inputs.
        seed: of all of them.
        first: number of the first.
        seconds: that one input may take.
        kind: "weights" or "images".
        worst: takes, for each format, the greatest ratio of memory to what is allowed.

    Returns:
        How many there were of each (format, outcome), and the findings, a line each.
    """
    outcomes: collections.Counter = collections.Counter()
    findings = []
    context = multiprocessing.get_context("fork" if "jax" not in sys.modules else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        fuzzed = target(kind)
        seeds = fuzzed.write_seeds(Path(folder))
        at, end = first, first + count
        while at < end:
            ours, theirs = context.Pipe()
            numbers = range(at, min(at + _BATCH, end))
            worker = context.Process(target=_work, args=(kind, seeds, seed, numbers, folder, seconds, theirs))
            worker.start()
            theirs.close()
            number, name, outcome = at, "", "started"
            try:
                while (told := ours.recv()) is not None:
                    number, name, outcome, ratio = told
                    if outcome == "started":
                        continue
                    if worst is not None:
                        worst[name] = max(worst.get(name, 0.0), ratio)
                    is_finding = outcome not in ("read", "refused")
                    outcomes[name, "finding" if is_finding else outcome] += 1
                    if is_finding:
                        findings.append(f"input {number} ({name}): {outcome}")
            except EOFError:
                worker.join()
                again = read_all(Path(folder) / f"input{fuzzed.suffixes[name]}") if name in _HDF5 else ""
                outcomes[name, "guarded" if again == "refused" else "finding"] += 1
                if again != "refused":
                    findings.append(
                        f"input {number} ({name}): the process ended with {worker.exitcode} {again}"
                    )
            worker.join()
            at = number + 1
    return outcomes, findings


def main() -> int:
    """Prints a table of outcomes and the findings; the exit code is 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--kind", choices=("weights", "images"), default="weights")
    options = parser.parse_args()
    worst: dict[str, float] = {}
    outcomes, findings = run(
        options.count,
        seed=options.seed,
        first=options.first,
        seconds=options.seconds,
        kind=options.kind,
        worst=worst,
    )
    columns = ("read", "refused", "guarded", "finding")
    print(f"{'format':<15}{'tried':>9}" + "".join(f"{each:>9}" for each in columns) + f"{'memory':>9}")
    for name in target(options.kind).suffixes:
        counts = [outcomes[name, each] for each in columns]
        print(
            f"{name:<15}{sum(counts):>9}"
            + "".join(f"{each:>9}" for each in counts)
            + f"{worst.get(name, 0):>9.2f}"
        )
    for finding in findings:
        print(finding)
    print(f"{sum(outcomes.values())} inputs, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
