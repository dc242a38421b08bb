"""The tables of docs/efficiency.md are those of benchmarks/results."""

import doctest
import shutil

import pytest

from benchmarks import common, efficiency_page


@pytest.fixture
def drawn(tmp_path, capsys):
    """Function that draws a page from a copy of the results; returns the exit code, the page, and the error."""
    results = tmp_path / "results"
    shutil.copytree(efficiency_page.RESULTS, results)

    def draw(text):
        page = tmp_path / "page.md"
        page.write_text(text)
        code = efficiency_page.main(["--results", str(results), "--page", str(page)])
        return code, page.read_text(), capsys.readouterr().err

    return results, draw


def test_page_and_files_agree(drawn):
    _, draw = drawn
    text = efficiency_page.PAGE.read_text(encoding="utf-8")
    assert draw(text) == (0, text, ""), "run python -m benchmarks.efficiency_page"


def test_a_figure_of_a_file_reaches_its_row_and_no_other_line(drawn):
    results, draw = drawn
    before = efficiency_page.PAGE.read_text(encoding="utf-8")
    file = results / "train_step.csv"
    file.write_text(file.read_text().replace("19.5583", "98.7654"))
    _, after, _ = draw(before)
    (changed,) = set(after.splitlines()) - set(before.splitlines())
    assert changed.startswith("| ResNet-50 | float32 | all | 98.8 |")


@pytest.mark.parametrize("spoil", ["file", "column", "mark"])
def test_what_is_missing_is_said_in_one_line_and_the_page_stays(spoil, drawn):
    results, draw = drawn
    text, file = efficiency_page.PAGE.read_text(encoding="utf-8"), results / "scaling.csv"
    if spoil == "file":
        file.unlink()
    elif spoil == "column":
        file.write_text(file.read_text().replace("exponent", "slope"))
    else:
        text = text.replace(efficiency_page.begin("scaling.csv"), "")
    code, after, error = draw(text)
    assert (code, after, error.count("\n")) == (2, text, 1)
    assert {"file": "--csv", "column": "'exponent'", "mark": common.END}[spoil] in error


def test_the_examples_of_its_functions_hold():
    assert doctest.testmod(efficiency_page).failed == 0
