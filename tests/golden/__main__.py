"""`python -m tests.golden`: see tests/golden/__init__.py."""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.command import ROOT
from tests.golden import environment, errors, interface, plans, studies

WARNING = """\
************************************************************************************************************************
*  REGENERATING GOLDEN FILES. They hold what must not change: whoever regenerates them ANNOUNCES A CHANGE of results,   *
*  counts, plans, error lines or defaults. Look at `git diff tests/golden`, say in the commit what changed and why, and  *
*  empty the tables of tests/golden/renamed.py for the parts that were regenerated.                                      *
************************************************************************************************************************"""


def of_studies() -> None:
    """Write the records of all studies, and the environment that they were made in."""
    for name in studies.STUDIES:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            records = studies.run(name, Path(folder) / "run")
        studies.write(name, records)
    studies.ENVIRONMENT.write_text(json.dumps(environment.fingerprint(), indent=1) + "\n")


def of_plans() -> None:
    """Write the tables of all plans."""
    made = {}
    for name, config in plans.PLANS.items():
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = interface.print_plan(config)
        assert code == 0, f"the plan of {config} ended with {code}"
        made[name] = plans.parse(printed.getvalue())
    plans.write(made)


def of_errors() -> None:
    """Write the error lines that the tests of wrong input see."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "lines.jsonl"
        environ = {**os.environ, errors.RECORD: str(record)}
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *errors.MODULES], cwd=ROOT, env=environ, check=True
        )
        lines: dict[str, str] = {}
        for line in record.read_text().splitlines():
            lines |= json.loads(line)
    print(errors.write(lines))


PARTS = {"studies": of_studies, "plans": of_plans, "errors": of_errors}


def main() -> int:
    """Compare or regenerate; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden", description="Compare with the golden files."
    )
    parser.add_argument(
        "--regenerate", nargs="+", choices=PARTS, metavar="PART", help=f"any of {', '.join(PARTS)}"
    )
    chosen = parser.parse_args().regenerate
    if not chosen:
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_golden.py", *errors.MODULES]
        return subprocess.run(command, cwd=ROOT).returncode
    print(WARNING, flush=True)
    for part in chosen:
        PARTS[part]()
        print(f"written: {part}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
