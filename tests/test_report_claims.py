"""What a report marks and claims, against studies made so that the answer is known."""

import functools
import json

import pytest
from scipy import stats

from dapt_jax.errors import UserError
from dapt_jax.formatting import NONE
from dapt_jax.records.study_records import Records
from dapt_jax.report import build, claims, main_table, marks, narrative, page, tables
from dapt_jax.report.columns import Cell
from dapt_jax.runtime import atomic_files
from dapt_jax.settings import default, resolve
from dapt_jax.statistics import holm
from tests import test_report_example as report_example

SEEDS = (0, 1, 2, 3, 4)
WOBBLE = (0.001, -0.002, 0.003, 0.000, -0.002)
LEVELS = {"full": 0.900, "same": 0.901, "near": 0.894, "far": 0.840, "unsure": 0.905}


def records(metric="auc", tasks=("one",), report=None, seeds=SEEDS, levels=LEVELS):
    """A study whose strategies differ from full by what LEVELS says, and by as much luck as the name promises."""
    results = []
    for task in tasks:
        for index, (name, level) in enumerate(levels.items()):
            for seed in seeds:
                luck = WOBBLE[(seed + index) % 5] * (10 if name == "unsure" else 1)
                row = {
                    "strategy": name,
                    "seed": seed,
                    "task": task,
                    "split": "development",
                    "protocol": "linear",
                }
                results.append({**row, "metric": metric, "value": level + WOBBLE[seed] + luck})
    config = {
        "strategies": list(levels),
        "seeds": list(seeds),
        "report": {"metric": metric, **(report or {})},
    }
    return Records(config, results, [])


def differences(found, name):
    values = [
        found.values(each, "one", "development", "linear", found.metric("one")) for each in (name, "full")
    ]
    return [a - b for a, b in zip(*values, strict=True)]


def test_claims_are_shifted_t_tests_adjusted_over_the_strategies():
    found = records(report={"margin": 0.01})
    of = claims.claims(found, "one", "development")
    names = list(of)
    assert names == ["same", "near", "far", "unsure"]
    by_hand = [
        stats.ttest_1samp(differences(found, name), -0.01, alternative="greater").pvalue for name in names
    ]
    assert [of[name].non_inferiority for name in names] == pytest.approx(holm(by_hand))
    above = [stats.ttest_1samp(differences(found, name), 0.01, alternative="less").pvalue for name in names]
    assert [of[name].equivalence for name in names] == pytest.approx(holm(list(map(max, by_hand, above))))
    assert {name: claim.verdict for name, claim in of.items()} == {
        "same": "equivalent",
        "near": "inconclusive",
        "far": "inferior",
        "unsure": "inconclusive",
    }


def test_a_wider_margin_lets_more_through_and_0_makes_no_claim():
    assert (
        claims.claims(records(report={"margin": 0.02}), "one", "development")["near"].verdict == "equivalent"
    )
    assert claims.claims(records(report={"margin": 0.0}), "one", "development") == {}
    assert claims.table(records(report={"margin": 0.0}), "one") is None
    assert records().margin == default().report.margin == 0.01
    config = default()
    config.report.margin = -0.1
    with pytest.raises(UserError, match=r"report.margin is -0.1; expected 0 or more"):
        resolve(config)


def test_where_lower_is_better_the_other_side_is_worse():
    levels = {"full": 5.0, "greater": 5.4, "lower": 4.6}
    of = claims.claims(records("hd95", report={"margin": 0.1}, levels=levels), "one", "development")
    assert {name: claim.verdict for name, claim in of.items()} == {
        "greater": "inferior",
        "lower": "non-inferior",
    }
    table = tables.everything(records("hd95", levels=levels), "one")
    assert [row[1].text for row in table.rows if row[2].best] == ["lower"]


def test_one_seed_claims_nothing():
    found = records(seeds=(0,))
    assert claims.claims(found, "one", "development")["same"].verdict == NONE
    assert claims.table(found, "one") is None
    row = tables.everything(found, "one").rows
    assert [cell.not_significantly_worse for cells in row for cell in cells] == [False] * 18


def test_the_best_and_those_not_significantly_worse_are_marked_and_the_test_is_named():
    found = records()
    values = {n: found.values(n, "one", "development", "linear", "auc") for n in LEVELS}
    expected = {
        n for n in LEVELS if n != "unsure" and stats.ttest_rel(values[n], values["unsure"]).pvalue >= 0.05
    }
    assert expected == {"full", "same", "near"}
    for table in (main_table.table(found, "one"), tables.everything(found, "one")):
        column = table.columns.index("development")
        name = table.columns.index("strategy")
        assert {row[name].text for row in table.rows if row[column].best} == {"unsure"}
        assert {row[name].text for row in table.rows if row[column].not_significantly_worse} == expected
        assert "two-sided paired t-test over seeds (p ≥ 0.05, not adjusted)" in table.note


def test_both_tests_against_the_best_are_named_after_holm_and_on_the_test_split_too():
    own = records()
    found = Records(own.config, [*own.results, *({**row, "split": "test"} for row in own.results)], [])
    table = main_table.table(found, "one")
    assert {"p test, paired", "p test, Welch", "p development, Welch"} <= set(table.columns)
    assert claims.table(found, "one").flat.count("test AUC verdict") == 1
    values = {n: found.values(n, "one", "test", "linear", "auc") for n in LEVELS}
    tests = {
        name: {n: test(values[n], values["full"]).pvalue for n in LEVELS if n != "full"}
        for name, test in {
            "paired": stats.ttest_rel,
            "Welch": functools.partial(stats.ttest_ind, equal_var=False),
        }.items()
    }
    for name, p in tests.items():
        adjusted = dict(zip(p, holm(list(p.values())), strict=True))
        shown = main_table.comparisons(found, "one", "test", name)
        assert {n: q for n, (_, q) in shown.items()} == pytest.approx(adjusted)
    cell = marks.over_seeds({"a": [0.9, 0.91, 0.93], "b": [0.88, 0.91, 0.90], "c": [0.5, 0.4, 0.5]})
    rest = [
        stats.ttest_ind([0.9, 0.91, 0.93], x, equal_var=False).pvalue
        for x in ([0.88, 0.91, 0.90], [0.5, 0.4, 0.5])
    ]
    assert [cell.adjusted[n][1] for n in "bc"] == pytest.approx(holm(rest))
    assert ", Welch " in cell.mark(Cell("0.897"), "b").small
    assert "paired t-test over seeds, then Welch's t-test of independent runs" in table.note


def test_means_that_print_alike_are_both_the_best():
    marked = marks.over_seeds({"a": [0.90001, 0.91], "b": [0.90003, 0.91], "c": [0.80, 0.81]})
    assert marked.best == {"a", "b"}
    assert marked.not_significantly_worse == set()
    assert marks.over_seeds({"a": [0.9], "b": [None]}).best == frozenset()


def test_words_say_what_was_shown():
    text = " ".join(narrative.summary(records(report={"margin": 0.01}), "one"))
    assert "Non-inferiority to full with a margin of 0.01 AUC was shown for same (p = 0.0" in text
    assert "it was not shown for near, far and unsure." in text
    text = " ".join(narrative.summary(records(levels={"full": 0.9, "far": 0.8}), "one"))
    assert "Non-inferiority to full with a margin of 0.01 AUC was not shown for any strategy." in text


def test_ranks_need_several_tasks_and_tell_when_they_can_tell_nothing():
    assert claims.over_tasks(records()) == []
    (table,) = claims.over_tasks(records(tasks=("one", "two")))
    assert {row[0].text: row[-1].text for row in table.rows} == {
        "unsure": "1.00", "same": "2.00", "full": "3.00", "near": "4.00", "far": "5.00",
    }  # fmt: skip
    assert "on 2 tasks: no two strategies can be told apart" in table.note
    (table,) = claims.over_tasks(records(tasks=[f"task {k}" for k in range(12)]))
    # q(0.05, 5) = 2.728; 2.728 * sqrt(5 * 6 / (6 * 12)) = 1.76.
    assert "critical difference of it at 0.05, 1.76." in table.note
    assert [row[0].text for row in table.rows if row[-1].not_significantly_worse] == ["same"]
    assert [row[0].text for row in table.rows if row[-1].best] == ["unsure"]


def test_every_protocol_shows_its_classes_in_the_primary_metric_where_it_has_them():
    strategies, segments = ("full", "scratch"), ("nucleus", "cytoplasm")
    seeds, splits = range(3), ("development", "external")
    results = [
        {"strategy": name, "seed": seed, "task": "cells", "split": split, "protocol": protocol, "metric": metric,
         "value": 0.9 - 0.2 * (name == "scratch") - 0.1 * (protocol == "frozen") - 0.3 * (metric == "dice/cytoplasm")
         - 0.05 * (split == "external") + 0.01 * seed}
        for protocol in ("frozen", "finetune") for name in strategies for seed in seeds for split in splits
        for metric in ("iou/nucleus", "dice", *(f"dice/{segment}" for segment in segments))
    ]  # fmt: skip
    pixels = {
        "strategy": "baseline",
        "seed": 0,
        "task": "cells",
        "split": "external",
        "protocol": "pixel_colour",
    }
    results.append({**pixels, "metric": "dice/nucleus", "value": 0.5})
    config = {"strategies": list(strategies), "seeds": list(seeds), "report": {"metric": "dice"}}
    table = tables.per_class(Records(config, results, []), "cells")
    assert table.title == "Dice by class of pixels"
    assert table.groups == [("", 2), ("nucleus", 2), ("cytoplasm", 2)]
    assert table.flat[2:] == [
        "nucleus development",
        "nucleus external",
        "cytoplasm development",
        "cytoplasm external",
    ]
    half = stats.t.ppf(0.975, 2) * 0.01 / 3**0.5
    means = {
        ("frozen", "full"): (0.81, 0.76, 0.51, 0.46),
        ("frozen", "scratch"): (0.61, 0.56, 0.31, 0.26),
        ("finetune", "full"): (0.91, 0.86, 0.61, 0.56),
        ("finetune", "scratch"): (0.71, 0.66, 0.41, 0.36),
    }
    *arms, baseline = table.rows
    for (protocol, name), row in zip(means, arms, strict=True):
        assert [cell.text for cell in row] == [
            protocol,
            name,
            *(f"{mean:.3f}" for mean in means[protocol, name]),
        ]
        assert {cell.small for cell in row[2:]} == {f"±{half:.3f}"}
        assert all(cell.best == (name == "full") for cell in row[2:])
    assert [cell.text for cell in baseline] == ["pixel_colour", "baseline", "–", "0.500", "–", "–"]


def test_classes_of_images_are_no_segments_and_a_task_without_them_has_no_such_table():
    found = records("f1")
    row = {"strategy": "full", "seed": 0, "task": "one", "split": "development", "protocol": "linear"}
    assert tables.per_class(found, "one") is None
    by_class = Records(found.config, [*found.results, {**row, "metric": "f1/benign", "value": 0.9}], [])
    assert tables.per_class(by_class, "one").title == "F1 by class"


def test_both_pages_show_the_marks(tmp_path):
    workdir = report_example.write(tmp_path, seeds=range(6))
    rows = atomic_files.read(workdir / "results.jsonl")
    atomic_files.write(workdir / "results.jsonl", rows + [{**row, "task": "grade"} for row in rows])
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(
        json.dumps({**config, "report": {**config["report"], "margin": 0.02}})
    )
    build(workdir)
    page, text = (workdir / "report.html").read_text(), (workdir / "report.md").read_text()
    assert '<td class="close">0.964<sup>†</sup><small>' in page
    assert "0.964† [" in text
    for word in (
        "Non-inferiority to full",
        "Margin: 0.02 AUC",
        "Ranks over the tasks, external",
        "not significantly worse",
    ):
        assert word in page
        assert word in text


def test_checkpoints_that_a_seed_did_not_reach_are_no_unfinished_arms():
    found = records(levels={"full": 0.9, "same": 0.8})
    reached = [{**row, "strategy": "full@3"} for row in found.results if row["seed"] < 2]
    both = Records(found.config, [*found.results[:-1], *reached], [])
    assert both.missing() == ["same 4"]
    assert page._warnings(both)[0].startswith("Unfinished: 1 of 10 arms have no result yet")
