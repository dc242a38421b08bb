"""The guide runs from its first cell to its last."""

import json
from pathlib import Path

import matplotlib as mpl
import pytest

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "guide.ipynb"


@pytest.mark.long
def test_the_guide_runs():
    mpl.use("Agg")
    cells = json.loads(GUIDE.read_text())["cells"]
    names: dict = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{GUIDE.name} cell {number}", "exec"), names)
    assert names["chosen"] in names["scores"]
    assert all(0 <= value <= 1 for score in names["scores"].values() for value in score.values())
