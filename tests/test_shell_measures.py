"""The figures of benchmarks/shell_measures.py, on a library so small that they can be counted by hand."""

import pytest

from benchmarks import rooms, shell_measures
from tests.command import ROOT

FILES = {
    "CONTRIBUTING.md": "```\ndapt_jax/\n  main.py  command   upper.py  above\n  middle/  a room\n  lower.py  below\n```\n",
    "dapt_jax/__init__.py": '"""Face."""\n\nfrom dapt_jax.middle import part\n',
    "dapt_jax/main.py": '"""Main."""\n\nfrom dapt_jax import lower, middle\nfrom dapt_jax.middle.part import first\n',
    "dapt_jax/upper.py": (
        '"""Upper.\n\n>>> 1\n1\n"""\n\nfrom typing import TYPE_CHECKING, Any\n\n'
        "if TYPE_CHECKING:\n    from dapt_jax import main\n\n\n"
        "class Seven:\n    def method(self, a: Any, b, c, d, e, f, *, g: int, **more: Any):\n        def inner(x: Any): ...\n"
    ),
    "dapt_jax/middle/__init__.py": "",
    "dapt_jax/middle/part.py": (
        'def first(seed: int, rate: float):\n    """First.\n\n    Args:\n        seed: of the run.\n'
        "        rate: Learning rate.\n\n"
        '    Returns:\n        of: nothing that counts.\n    """\n    from dapt_jax import upper\n'
    ),
    "dapt_jax/lower.py": f'"""Lower."""\n\nfrom .middle import part\n\n# {"x" * 120}\n',
}  # fmt: skip


@pytest.fixture
def figures(tmp_path):
    def measured(**more):
        for name, text in {**FILES, **more}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        library = rooms.modules(tmp_path)
        found = [
            *shell_measures.sizes(library),
            *shell_measures.signatures(library),
            *shell_measures.architecture(tmp_path, library),
            *shell_measures.documentation(library),
        ]
        return {measure.name: measure for measure in found}

    (tmp_path / "tests").mkdir()
    return measured


def test_figures_counted_by_hand(figures):
    found = {name: measure.value for name, measure in figures().items()}
    assert found["library files"] == "6"
    assert found["modules in the package root"] == "3"
    assert found["lines over 110 columns"].startswith("1 ")
    assert found["functions"] == "3"
    assert found["parameters typed bare `Any`"].startswith("2 of 10 ")
    assert found["functions with 7 or more parameters"].startswith("1 ")
    assert found["public functions with a docstring"].startswith("1 of 2 ")
    assert found["docstrings with an example"] == "1"
    assert found["argument docs that begin with a preposition"].startswith("1 of 2 ")


def test_edges_those_that_run_up_and_circles(figures):
    found = figures()
    edges = ["lower -> middle", "main -> lower", "main -> middle", "middle -> upper"]
    assert list(found["import edges between rooms"].places) == edges
    assert found["edges that run up"].value == "2 (2 imports)"
    assert found["circles of rooms"].value == "0"
    assert found["rooms"].value == "4 on 4 floors"
    again = figures(**{"dapt_jax/upper.py": "from dapt_jax.middle import part\n"})
    assert list(again["circles of rooms"].places) == ["middle <-> upper"]


def test_an_order_in_a_test_comes_before_the_map(figures):
    found = figures(**{"tests/test_layout.py": 'ROOMS = ("main", "lower", ("middle", "upper"))\n'})
    assert found["order of the rooms"].value == "3 levels in tests/test_layout.py"
    assert found["edges that run up"].value == "0 (0 imports)"


def test_the_library_itself_can_be_measured(capsys):
    shell_measures.main(["--root", str(ROOT), "--no-imports", "--places", "circles"])
    out = capsys.readouterr().out
    assert "circles of rooms" in out
    assert "parameters typed bare `Any`" in out
