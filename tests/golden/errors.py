"""The line that each wrong input of tests/test_main_bad_*.py gives, compared where those tests see it.

`hold` is called by the fixture `refused`, so the tests of wrong input hold the golden lines as they run, at
no further cost. A case that the golden file does not know is new and holds nothing; tests/test_golden.py sees
to it that none is lost.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tests.command import ROOT
from tests.golden import FOLDER, renamed

FILE = FOLDER / "errors.json"
MODULES = ("tests/test_main_bad_input.py", "tests/test_main_bad_manifest.py")
RECORD = "DAPT_JAX_GOLDEN_ERRORS"
"""In the environment: the file that lines are added to instead of being compared."""

_calls: Counter[str] = Counter()


def case_of(nodeid: str) -> str:
    """Return the case of a test: `test_main_bad_input::test_name[parameters]`."""
    return nodeid.rpartition("/")[2].replace(".py::", "::")


def hold(nodeid: str, line: str, folders: Mapping[str, Path]) -> None:
    """Compare an error line with the golden one of its case.

    Args:
        nodeid: Of the test that saw it; the second line that a test sees is a case of its own.
        line: As printed, without `error: `.
        folders: By the word that stands for it in the golden line, a path that changes from run to run; inner
            ones first.
    """
    _calls[nodeid] += 1
    case = case_of(nodeid) + (f" ({_calls[nodeid]})" if _calls[nodeid] > 1 else "")
    for word, folder in {**folders, "ROOT": ROOT}.items():
        line = line.replace(str(folder), word)
    if os.environ.get(RECORD):
        with open(os.environ[RECORD], "a") as file:
            file.write(json.dumps({case: line}) + "\n")
        return
    expected = golden().get(case)
    assert expected is None or line == renamed.line(expected), (
        f"{case}: the error line has changed; if on purpose, say so in tests/golden/renamed.py\n"
        f"  found:    {line}\n  expected: {renamed.line(expected)}"
    )


def golden() -> dict[str, str]:
    """Read the golden lines, by case."""
    return json.loads(FILE.read_text())


def write(lines: Mapping[str, str]) -> str:
    """Write the golden lines; return a summary of what changed in them beside the names of cases."""
    before = Counter(golden().values()) if FILE.exists() else Counter[str]()
    now = Counter(lines.values())
    FILE.write_text(json.dumps(lines, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    changes = [f"  - {line}" for line in (before - now).elements()] + [
        f"  + {line}" for line in (now - before).elements()
    ]
    return "\n".join([f"{len(lines)} error lines, {len(changes)} changes", *changes])
