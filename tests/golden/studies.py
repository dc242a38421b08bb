"""Four tiny studies: `results.jsonl` as it is, and of `ledger.jsonl` what is counted and the curves.

Counts and words agree exactly, always. Floats agree to the bit in the environment that the golden files were
made in, and to `TOLERANCE` elsewhere. Measured on the studies of tests/configs/golden_study.py: runs of one
machine, whether compiled anew or read from the compilation cache, agree to the bit, AVX-512 with AVX2 but for
one metric; two cores with one to 3e-7, AVX-512 with SSE 4.2 to 7e-7.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.command import rows
from tests.golden import FOLDER, environment, interface

STUDIES = ("classification", "segmentation", "scored", "halved")
TOLERANCE = 1e-5
"""Relative, in another environment."""
ALMOST_0 = 1e-8
COUNTS = (
    "strategy",
    "seed",
    "stage",
    "phase",
    "steps",
    "images",
    "model_flops",
    "hardware_flops",
    "trainable_params",
    "total_params",
    "cached",
    "reused_flops",
    "curve",
)
"""Of a row of the ledger: neither seconds, nor energy, nor memory, nor the device."""
FILES = ("results", "ledger")
PLACE = FOLDER / "studies"
ENVIRONMENT = PLACE / "environment.json"

Records = dict[str, list[dict[str, Any]]]


def run(study: str, workdir: Path) -> Records:
    """Run a study and return its records."""
    code = interface.run_study(f"tests/configs/golden_study.py:{study}", workdir)
    assert code == 0, f"the study {study!r} ended with {code}"
    # How many examples are explained is no count that strategies are compared by: tests/test_predict.py has it.
    counted = (row for row in rows(workdir / "ledger.jsonl") if not row["phase"].endswith("/saliency"))
    ledger = [{name: row[name] for name in COUNTS} for row in counted]
    return {"results": rows(workdir / "results.jsonl"), "ledger": ledger}


def golden(study: str) -> Records:
    """Read the golden records of a study."""
    return {name: rows(PLACE / f"{study}.{name}.jsonl") for name in FILES}


def write(study: str, records: Records) -> None:
    """Write the golden records of a study, one row a line."""
    PLACE.mkdir(exist_ok=True)
    for name in FILES:
        lines = (json.dumps(row, ensure_ascii=False) for row in records[name])
        (PLACE / f"{study}.{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def is_same_environment() -> bool:
    """Tell whether floats have to agree to the bit."""
    return json.loads(ENVIRONMENT.read_text()) == environment.fingerprint()


def differences(found: Records, expected: Records, tolerance: float) -> list[str]:
    """Return a line for each place where records differ.

    Args:
        found: Records of this run.
        expected: Golden records.
        tolerance: Relative difference that floats may have; 0 for none. Everything else has to be the same.
    """
    lines = []
    for name in FILES:
        if len(found[name]) != len(expected[name]):
            lines.append(f"{name}: {len(found[name])} rows, expected {len(expected[name])}")
        for number, pair in enumerate(zip(found[name], expected[name], strict=False), start=1):
            lines += _differences(f"{name}:{number}", *pair, tolerance)
    return lines


def _differences(place: str, found: Any, expected: Any, tolerance: float) -> Iterable[str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*found, *expected}):
            missing = "nothing"
            yield from _differences(
                f"{place} {key}", found.get(key, missing), expected.get(key, missing), tolerance
            )
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, pair in enumerate(zip(found, expected, strict=True)):
            yield from _differences(f"{place}[{number}]", *pair, tolerance)
    elif not _agree(found, expected, tolerance):
        yield f"{place}: {found!r}, expected {expected!r}"


def _agree(found: Any, expected: Any, tolerance: float) -> bool:
    if tolerance and isinstance(found, float) and isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=tolerance, abs_tol=ALMOST_0)
    return bool(type(found) is type(expected) and found == expected)


def shown(lines: Sequence[str], most: int = 12) -> str:
    """Join the first differences, and say how many there are."""
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join([f"{len(lines)} differences from the golden records:", *lines[:most], *more])
