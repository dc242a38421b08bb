"""What a report says of strategies that competed for compute."""

import json

import pytest

from dapt_jax import report
from dapt_jax.errors import UserError
from dapt_jax.records import Records, competitions
from dapt_jax.records.competitions import Competition, Round
from dapt_jax.report import competition
from dapt_jax.runtime import atomic_files
from tests import test_report_example as report_example

FIRST = Round(
    {"full": 4, "partial": 6, "hybrid": 5},
    {"full": 0.5, "partial": 0.25, "hybrid": None},
    {"full": 3e12, "partial": 2e12, "hybrid": 1e12},
)
LAST = Round(
    {"full": 9, "partial": 8}, {"full": 0.5, "partial": 0.125}, {**FIRST.flops, "full": 7e12, "partial": 5e12}
)


@pytest.fixture
def workdir(tmp_path):
    """A study of two seeds that partial wins once and full once."""
    workdir = report_example.write(tmp_path, seeds=(0, 1), strategies=("none", "full", "partial", "hybrid"))
    config = json.loads((workdir / "config.json").read_text())
    config |= {"compute_budget": 0.5, "checkpoint_selection": {"score": "robustness"}}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "checkpoints").mkdir()
    for seed, winner in enumerate(("partial", "full")):
        competitions.write(
            competitions.path_of(workdir, seed), Competition(winner, 9, 20 * 10**12, [FIRST, LAST])
        )
    return workdir


def test_a_competition_is_read_as_it_was_written(workdir):
    (first, second) = competitions.read_all(workdir, (0, 1, 2))
    assert first == Competition("partial", 9, 20 * 10**12, [FIRST, LAST])
    assert first.lost == {"full": 7e12, "hybrid": 1e12}
    assert second.lost == {"partial": 5e12, "hybrid": 1e12}


def test_the_report_says_who_competed_what_came_and_what_choosing_cost(workdir):
    report.build(workdir)
    text = (workdir / "report.md").read_text()
    section = text.split("## The competition for compute")[1].split("\n## ")[0]
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for line in section.splitlines()
        if len(cells := line.split("|")) > 3
    }
    assert set(rows) == {"strategy", "---", "full", "partial", "hybrid"}
    assert rows["full"] == ["2 of 2", "4", "0.500", "2 of 2", "9", "0.500", "1 of 2", "7"]
    assert rows["partial"] == ["2 of 2", "6", "0.250", "2 of 2", "8", "0.125", "1 of 2", "5"]
    assert rows["hybrid"] == ["2 of 2", "5", "\u2013", "0 of 2", "\u2013", "\u2013", "0 of 2", "1"]
    assert "50% of what full adaptation takes, 20 TFLOP a seed" in section
    assert "What they took, 7 TFLOP a seed, is a cost of the choice" in section
    assert "The competition for compute" in (workdir / "report.html").read_text()


def test_a_study_without_a_budget_has_no_competition(tmp_path):
    workdir = report_example.write(tmp_path, seeds=(0, 1), strategies=("none", "full"))
    assert competition.table(workdir, Records.read(workdir)) is None


def test_the_reference_is_a_strategy_with_scores(workdir):
    assert Records.read(workdir).reference == "full"
    results = [row for row in atomic_files.read(workdir / "results.jsonl") if row["strategy"] != "full"]
    atomic_files.write(workdir / "results.jsonl", results)
    assert Records.read(workdir).reference == "none"
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**config, "compute_budget": 0.0}))
    assert Records.read(workdir).reference == "full", "which has not run yet"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"winner": 3}, "winner is 3; expected text"),
        ({"winner": "other"}, "winner is 'other'; expected a strategy of the last round"),
        ({"rounds": [{"epochs": {}, "scores": {}}]}, "round 1: no key 'flops'"),
        (
            {"rounds": [{"epochs": {"a": -1}, "scores": {}, "flops": {}}]},
            "round 1: epochs: a is -1; expected a whole",
        ),
        ({"rounds": 2}, "rounds is 2; expected a list"),
    ],
)
def test_a_damaged_competition_is_one_line(change, said, workdir):
    path = competitions.path_of(workdir, 0)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as refused:
        report.build(workdir)
    assert str(refused.value).startswith(f"{path}: ")
    assert said in str(refused.value)
