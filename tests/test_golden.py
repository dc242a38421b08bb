"""Nothing has moved that was not announced: the golden files of tests/golden, and that they hold anything at all."""

import copy
import re

import pytest

from tests.golden import errors, interface, plans, renamed, studies


@pytest.mark.long
@pytest.mark.parametrize("name", studies.STUDIES)
def test_a_study_leaves_the_golden_records(name, tmp_path):
    if not interface.is_on_cpu():
        pytest.skip("golden records are those of a CPU")
    found = studies.run(name, tmp_path / "run")
    tolerance = 0.0 if studies.is_same_environment() else studies.TOLERANCE
    lines = studies.differences(found, studies.golden(name), tolerance)
    assert not lines, studies.shown(lines)


@pytest.mark.parametrize("name", plans.PLANS)
def test_a_plan_prints_the_golden_numbers(name, capsys):
    assert interface.print_plan(plans.PLANS[name]) == 0
    assert plans.parse(capsys.readouterr().out) == plans.golden()[name]


def test_no_case_of_a_golden_error_line_is_lost(request):
    """The lines themselves are compared where they are seen: by the fixture `refused`."""
    option = request.config.option
    collected = {errors.case_of(item.nodeid) for item in request.session.items}
    is_whole = all(
        any(case.startswith(f"{module[6:-3]}::") for case in collected) for module in errors.MODULES
    )
    if not is_whole or option.keyword or option.markexpr or any("::" in each for each in request.config.args):
        pytest.skip(f"runs with all of {' and '.join(errors.MODULES)}")
    assert {re.sub(r" \(\d+\)$", "", case) for case in errors.golden()} <= collected


def test_every_rename_translates_something():
    lines = errors.golden().values()
    assert [old for old in renamed.RENAMED if not any(old in line for line in lines)] == []


# ---- the golden files can fail
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", studies.STUDIES)
def test_golden_records_differ_from_what_is_off_by_one_or_by_a_bit(name):
    expected = studies.golden(name)
    assert studies.differences(expected, expected, 0.0) == []
    row = next(number for number, row in enumerate(expected["ledger"]) if row["curve"])
    found = copy.deepcopy(expected)
    found["ledger"][row]["model_flops"] += 1
    assert len(studies.differences(found, expected, studies.TOLERANCE)) == 1
    for factor, tolerance, count in [(1 + 1e-7, 0.0, 1), (1 + 1e-7, 1e-5, 0), (1 + 1e-4, 1e-5, 1)]:
        found = copy.deepcopy(expected)
        found["ledger"][row]["curve"][0]["loss"] *= factor
        assert len(studies.differences(found, expected, tolerance)) == count
    found = copy.deepcopy(expected)
    del found["results"][-1]
    assert studies.differences(found, expected, studies.TOLERANCE)


def test_golden_studies_show_each_part_at_work():
    """A golden file of parts that were never used would hold nothing."""
    of = {name: studies.golden(name) for name in studies.STUDIES}
    cached = {row["cached"] for records in of.values() for row in records["ledger"]}
    assert cached == {"off", "filled", "reused"}
    assert {row["protocol"] for row in of["classification"]["results"]} >= {"linear", "mlp_small", "finetune"}
    assert {row["protocol"] for row in of["segmentation"]["results"]} >= {"frozen", "finetune"}
    assert any("@" in row["strategy"] for row in of["scored"]["results"])
    assert len({row["strategy"] for row in of["halved"]["ledger"] if row["stage"] == "dapt"}) > 1
    losses = [point["loss"] for row in of["classification"]["ledger"] for point in row["curve"]]
    assert len(set(losses)) == len(losses)


def test_an_error_line_that_changes_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(errors, "_calls", errors.Counter())
    monkeypatch.delenv(errors.RECORD, raising=False)
    case, line = "test_main_bad_input::test_a_setting_that_cannot_be[a model]", "no model 'resnet5'"
    golden = errors.golden()[case]
    nodeid = f"tests/{case.replace('::', '.py::')}"
    errors.hold(nodeid, golden, {"TMP": tmp_path})
    monkeypatch.setattr(errors, "_calls", errors.Counter())
    with pytest.raises(AssertionError, match="the error line has changed"):
        errors.hold(nodeid, line, {"TMP": tmp_path})
    monkeypatch.setattr(errors, "_calls", errors.Counter())
    monkeypatch.setattr(renamed, "RENAMED", {golden: line})
    errors.hold(nodeid, line, {"TMP": tmp_path})
