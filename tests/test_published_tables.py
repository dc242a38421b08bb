"""The code that marks tables, given a published table, says what closed formulas say."""

from pathlib import Path

import pytest
from scipy import stats

from benchmarks import published_tables
from dapt_jax.statistics import Summary

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"


@pytest.fixture(scope="module")
def rows():
    if not (REFERENCE / published_tables.FILE).is_file():
        pytest.skip(f"no published table in {REFERENCE}")
    found = published_tables.read(REFERENCE)
    return {
        (row["task"], row["init"]): row for task in found for row in published_tables.check(task, found[task])
    }


def test_p_values_are_those_of_scipy_from_summaries(rows):
    for (task, init), row in rows.items():
        best = max((r for (t, _), r in rows.items() if t == task), key=lambda r: r["mean"])
        if init == best["init"]:
            assert row["student"] is None
            continue
        numbers = (row["mean"], row["sd"], 10, best["mean"], best["sd"], 10)
        assert row["student"] == pytest.approx(stats.ttest_ind_from_stats(*numbers).pvalue, rel=1e-6)
        assert row["welch"] == pytest.approx(
            stats.ttest_ind_from_stats(*numbers, equal_var=False).pvalue, rel=1e-6
        )


def test_three_shaded_cells_are_not_supported(rows):
    p = {
        ("Montgomery", "chexpert"): 0.008,
        ("Montgomery", "imagenet"): 0.014,
        ("Montgomery", "imagenet_chestxray14"): 0.044,
        ("CheXpert", "imagenet"): 0.047,
    }
    for cell, value in p.items():
        assert rows[cell]["student"] == pytest.approx(value, abs=5e-4)
    unsupported = {
        cell for cell, row in rows.items() if row["says"].startswith("shaded, but significantly worse")
    }
    assert unsupported == {("Montgomery", "chexpert"), ("Montgomery", "imagenet"), ("CheXpert", "imagenet")}
    assert not [row for row in rows.values() if row["says"].startswith("not shaded, but")]
    # Adjusted for the comparisons of its column, or with deviations of divisor n, one of the three is as
    # shaded.
    assert {cell for cell in unsupported if rows[cell]["holm"] >= 0.05} == {("CheXpert", "imagenet")}
    assert {cell for cell in unsupported if rows[cell]["divisor_n"] >= 0.05} == {("CheXpert", "imagenet")}


def test_verdicts_of_a_made_up_column():
    cells = {
        "chexpert": Summary(80.0, 0.2, 10),
        "imagenet": Summary(79.9, 0.2, 10),
        "imagenet_chexpert": Summary(79.0, 0.2, 10),
    }
    says = {row["init"]: row["says"] for row in published_tables.check("ChestX-ray14", cells)}
    assert says == {
        "chexpert": "best, and not shaded",
        "imagenet": "not shaded, but not significantly worse",
        "imagenet_chexpert": "shaded, but significantly worse; so after Holm",
    }


def test_a_file_that_is_not_there_or_not_so_is_one_line(tmp_path, capsys):
    assert published_tables.main([f"--reference={tmp_path}"]) == 2
    assert "no such file; expected the published table in --reference" in capsys.readouterr().err
    (tmp_path / published_tables.FILE).write_text("init,task,mean,sd\nscratch,SIIM,67.54,much\n")
    assert published_tables.main([f"--reference={tmp_path}"]) == 2
    assert f"{published_tables.FILE}:2: expected init, task, mean and sd" in capsys.readouterr().err


def test_the_command_counts_what_is_not_supported(tmp_path, capsys):
    if not (REFERENCE / published_tables.FILE).is_file():
        pytest.skip(f"no published table in {REFERENCE}")
    assert published_tables.main([f"--reference={REFERENCE}", f"--csv={tmp_path / 'out.csv'}"]) == 0
    assert "3 of 12 shaded cells are not supported by the table's own numbers." in capsys.readouterr().out
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 27
