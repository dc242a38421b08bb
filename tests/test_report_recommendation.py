"""The first lines of a report never say more than the numbers support."""

import math

import pytest
from scipy import stats

from dapt_jax.records.ledger import Row
from dapt_jax.records.study_records import Records
from dapt_jax.records.vocabulary import BASELINE
from dapt_jax.report import claims, compare, main_table, narrative, recommendation, tables
from dapt_jax.report.chance import baseline_levels
from dapt_jax.report.patients import PatientError
from dapt_jax.report.recommendation import POWER, recommend, seeds_for
from dapt_jax.statistics import paired_t

LUCK = (0.004, -0.006, 0.002, 0.003, -0.003)


def study(levels, seeds=5, baseline=None, luck=LUCK):
    """A study of strategies with these levels, each with luck of its own."""
    rows = []
    for place, (name, level) in enumerate([*levels.items(), *([(BASELINE, baseline)] if baseline else [])]):
        for seed in range(seeds):
            protocol = "scalar" if name == BASELINE else "linear"
            value = level + (0 if name == BASELINE else luck[(seed + 2 * place) % 5])
            key = {"strategy": name, "seed": seed, "task": "t", "split": "development", "protocol": protocol}
            rows.append({**key, "metric": "auc", "value": value})
    return Records({"strategies": list(levels), "seeds": list(range(seeds)), "report": {}}, rows, [])


def said(records):
    found = recommend(records, "t")
    return found.headline, dict(found.lines)


def test_what_is_shown_to_be_better_is_recommended_with_its_runner_up():
    headline, lines = said(study({"full": 0.80, "none": 0.70, "partial": 0.90}))
    assert (
        headline == "Use partial: it is shown to be better than every other strategy on the development set."
    )
    assert lines["Runner-up"].startswith("full: 0.800")
    assert "above chance (0.5)" in lines["Score"]


@pytest.mark.parametrize(("error", "is_shown"), [(0.049, True), (0.052, False)])
def test_better_over_seeds_is_not_better_on_other_patients_unless_that_is_shown(
    monkeypatch, tmp_path, error, is_shown
):
    found = PatientError(0.1, error, 40)
    monkeypatch.setattr(
        recommendation, "error_of_difference", lambda *named: found if isinstance(named[5], str) else None
    )
    records = study({"full": 0.80, "none": 0.70, "partial": 0.90})
    shown = recommend(records, "t", tmp_path)
    assert ("not shown for other patients" in shown.headline) is not is_shown
    assert ("is shown to be better" in shown.headline) is is_shown
    assert shown.headline.startswith("Use partial")
    assert ("more patients" in dict(shown.lines)["What would change it"]) is not is_shown


def test_a_strategy_that_is_best_outside_is_shown_beside_the_one_that_is_best_inside():
    records = study({"full": 0.80, "none": 0.70, "partial": 0.60})
    rows = [
        {**row, "split": "external"} for row in study({"full": 0.60, "none": 0.55, "partial": 0.65}).results
    ]
    both = Records(records.config, [*records.results, *rows], [])
    headline, lines = said(both)
    assert headline.startswith("Use partial")
    assert "external" in headline
    assert lines["Development"].startswith("full has the best mean, 0.800 (95% interval")
    assert "; partial 0.600 (95% interval" in lines["Development"]
    assert "Development" not in said(records)[1]


def test_the_p_value_is_given_with_its_adjustment():
    values = study({"full": 0.80, "none": 0.803, "partial": 0.70})
    (_, lines) = said(values)
    assert "after Holm's method over 2 strategies)" in lines["How sure"]
    assert said(study({"full": 0.80, "none": 0.70}))[1]["How sure"].endswith("not adjusted).")


def test_what_is_not_shown_to_be_better_is_not_said_to_be():
    headline, lines = said(study({"full": 0.800, "none": 0.801}))
    assert headline.startswith("No strategy is shown to be better than")
    assert "seeds" in lines["What would change it"]


def test_one_seed_recommends_nothing_as_better():
    headline, lines = said(study({"full": 0.8, "none": 0.9}, seeds=1))
    assert headline.startswith("No strategy is shown to be better than")
    assert "tests nothing" in lines["How sure"]


def test_scores_at_chance_recommend_nothing_and_are_not_above_a_baseline():
    records = study({"full": 0.501, "none": 0.498}, baseline=0.46)
    headline, _ = said(records)
    assert (
        headline == "No strategy is recommended: none is shown to score above chance on the development set."
    )
    words = " ".join(narrative.summary(records, "t"))
    assert "Not shown to be above chance (0.5): full and none." in words
    assert "better than the one-feature baseline scalar" not in words.replace("not better", "")


@pytest.mark.parametrize(("seeds", "words"), [(5, ""), (1, " in one seed, which tests nothing")])
def test_text_and_box_agree_on_what_exceeds_a_baseline(seeds, words):
    records = study({"full": 0.80, "none": 0.6005, "partial": 0.55}, seeds=seeds, baseline=0.6)
    sentences = narrative.summary(records, "t")
    level = "the one-feature baseline scalar (0.600)"
    assert f"Better than {level}{words}: full{'' if seeds > 1 else ' and none'}." in sentences
    assert f"partial is not better than {level}." in sentences
    assert (f"none is not shown to be better than {level}." in sentences) is (seeds > 1)
    assert (words in said(records)[1]["Score"]) is True


@pytest.mark.parametrize(("level", "is_beyond"), [(0.99, True), (0.8, False)])
def test_an_interval_beyond_the_range_of_its_metric_is_said_to_rest_on_too_few_seeds(level, is_beyond):
    records = study({"full": level, "none": 0.7}, seeds=2, luck=(0.005, -0.005, 0, 0, 0))
    assert ("beyond the range of AUC" in main_table.table(records, "t").note) is is_beyond


def test_a_feature_that_works_reversed_counts_as_its_better_direction():
    (level,) = baseline_levels(study({"full": 0.7}, baseline=0.2), "t", "development")
    assert (level.value, level.is_reversed) == (pytest.approx(0.8), True)
    assert "full is not better than the one-feature baseline scalar (0.800, reversed)." in narrative.summary(
        study({"full": 0.7}, baseline=0.2), "t"
    )


def of_values(values, split="development", metric="auc", config=None, counts=None):
    """A study of strategies with these values of their seeds; None where a seed has none."""
    rows = [
        {"strategy": name, "seed": seed, "task": "t", "split": split, "protocol": "linear", "metric": metric, "value": value,
         "n": (counts or {}).get(name)}
        for name, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
        if value is not None
    ]  # fmt: skip
    seeds = list(range(max(map(len, values.values()))))
    return Records(
        {"strategies": list(values), "seeds": seeds, "report": {"metric": metric}, **(config or {})}, rows, []
    )


def test_what_is_worse_than_the_best_is_no_candidate_however_many_others_there_are():
    full = [0.90, 0.94, 0.91, 0.93, 0.92]
    values = {
        "full": full,
        "none": [each - 0.03 + luck / 5 for each, luck in zip(full, LUCK, strict=True)],
        "hybrid": [0.99, 0.99, 0.99, 0.99, 0.78],
    }
    found = recommendation._Comparisons.of(of_values(values), "t")
    assert found.best == "hybrid"
    assert [found.is_worse(name) for name in values] == [False, True, False]
    many = {f"other{number}": [value + 0.002 * number for value in values["hybrid"]] for number in range(40)}
    among = recommendation._Comparisons.of(of_values({"full": full, **many, "none": values["none"]}), "t")
    assert among.is_worse("none")
    assert not among.is_worse("full")


def test_seeds_that_only_some_strategies_have_do_not_turn_a_test_round():
    values = {"full": [0.82, 0.83, 0.841, None, None], "partial": [0.80, 0.811, 0.82, 0.96, 0.97]}
    headline, lines = said(of_values(values))
    assert headline == "Use full: it is shown to be better than every other strategy on the development set."
    assert lines["How sure"].startswith("AUC differs by +0.020 from partial")


def test_scores_that_do_not_vary_with_the_seed_test_nothing_and_are_not_called_equal():
    records = of_values({"full": [0.8] * 3, "none": [0.7] * 3})
    headline, lines = said(records)
    assert headline.startswith("No strategy is shown to be better than every other")
    assert "none" not in headline
    assert recommendation._Comparisons.of(records, "t").is_worse("none")
    assert "in each of 3 seeds, which tests nothing" in lines["How sure"]
    assert "more seeds would tell nothing" in lines["What would change it"]
    words = " ".join(narrative.summary(records, "t"))
    assert "Not significantly different" not in words
    assert (
        "Different from full by the same in every seed, so that seeds test nothing: none by -0.100." in words
    )
    assert "the same in 3 seeds" in words


def test_a_score_above_chance_over_seeds_may_not_be_above_it_on_other_patients(monkeypatch, tmp_path):
    records = of_values({"full": [0.521, 0.522, 0.523], "none": [0.512, 0.511, 0.513]})
    errors = {"full": PatientError(0.02, 0.09, 39), "none": PatientError(0.02, 0.09, 39)}
    monkeypatch.setattr(
        recommendation,
        "error_of_difference",
        lambda *named: None if isinstance(named[5], str) else errors[named[4]],
    )
    shown = recommend(records, "t", tmp_path)
    assert shown.headline == (
        "No strategy is recommended: none is shown to score above chance on other patients than those of the development set."
    )
    assert "39 patients leave ±0.176 of AUC to chance." in dict(shown.lines)["Patients, development"]
    errors |= dict.fromkeys(errors, PatientError(0.02, 0.005, 39, "images"))
    assert recommend(records, "t", tmp_path).headline.startswith("Use full")
    errors["full"] = PatientError(0.02, 0.09, 39, "images")
    assert recommend(records, "t", tmp_path).headline.startswith(
        "No strategy is shown to be better than every other"
    )


def test_what_is_cheapest_is_said_where_all_costs_are_known():
    records = study({"full": 0.80, "none": 0.799})
    rows = [Row(name, seed, "dapt", "all", model_flops=9) for name in ("full", "none") for seed in range(5)]
    every, some = (Records(records.config, records.results, each) for each in (rows, rows[:5]))
    assert "Use full, the cheapest of 2" in said(every)[0]
    assert said(some)[0] == "No strategy is shown to be better than every other on the development set."


def test_chance_is_that_of_the_classes_which_a_split_has():
    values = {"full": [0.5, 0.5, 0.51], "none": [0.49, 0.5, 0.5]}
    inside = of_values({name: [0.9, 0.8, 0.85] for name in values}, metric="balanced_accuracy")
    outside = of_values(values, metric="balanced_accuracy", split="external")
    results = [
        {**row, "classes": ["a", "b", "c"][: 3 - (row["split"] == "external")]}
        for row in (*inside.results, *outside.results)
    ]
    records = Records(inside.config, results, [])
    assert said(records)[0].startswith("No strategy is recommended: none is shown to score above chance")
    assert "Not shown to be above chance (0.5): full and none." in narrative.summary(records, "t")
    assert [cell.text for cell in main_table.table(records, "t").rows[-1]][:3] == ["chance", "0.333", "0.500"]
    assert [cell.text for cell in tables.everything(records, "t").rows[-1]][1:] == [
        "chance",
        "0.333",
        "0.500",
    ]


def test_a_baseline_that_varies_is_compared_seed_by_seed():
    records = of_values({"full": [0.70, 0.71, 0.69, 0.70, 0.705]})
    for seed, value in enumerate([0.60, 0.78, 0.55, 0.79, 0.62]):
        row = {"strategy": BASELINE, "seed": seed, "task": "t", "split": "development", "protocol": "scalar"}
        records.results.append({**row, "metric": "auc", "value": value})
    records = Records(records.config, records.results, [])
    assert (
        "full is not shown to be better than the one-feature baseline scalar (0.668)."
        in narrative.summary(records, "t")
    )
    assert "not shown to be better than the one-feature baseline" in said(records)[1]["Score"]


def test_distances_that_are_means_over_other_images_are_not_compared():
    values = {"full": [3.0, 3.1, 2.9], "none": [0.0, 0.1, 0.1]}
    records = of_values(values, metric="hd95", counts={"full": 10, "none": 1})
    assert said(records)[0].startswith("No strategy is recommended: HD95 is a mean over the images")
    assert "seed 0: full 10, none 1" in " ".join(narrative.summary(records, "t"))
    table = main_table.table(records, "t")
    assert "Nothing is marked or tested" in table.note
    assert not any(cell.best or cell.not_significantly_worse for row in table.rows for cell in row)
    same = of_values(values, metric="hd95", counts={"full": 10, "none": 10})
    assert said(same)[0].startswith("Use none")


def test_secondary_distances_over_other_images_are_not_marked_in_any_table():
    distances = of_values(
        {"full": [3.0, 3.1, 2.9], "none": [0.0, 0.1, 0.1]}, metric="hd95", counts={"full": 10, "none": 1}
    )
    dice = of_values({"full": [0.8, 0.9, 0.8], "none": [0.1, 0.2, 0.1]}, metric="dice")
    results = [*dice.results, *distances.results]
    found = tables.everything(Records({**dice.config, "report": {"metric": "dice"}}, results, []), "t")
    assert [[cell.best for cell in row[2:]] for row in found.rows] == [[True, False], [False, False]]
    assert "Not marked: linear, development: HD95 is a mean over the images" in found.note
    assert not any(cell.small.count("p ") for row in found.rows for cell in row[3:])
    other = [{**row, "task": "u"} for row in distances.results]
    both = Records(distances.config, [*distances.results, *other], [])
    assert claims.over_tasks(both) == []
    part = compare.Part("w", both)
    (overview,) = compare._tables(compare.CombinedRecords([part]))
    assert not any(cell.best or cell.small.count("p ") for row in overview.rows for cell in row)


def test_a_distance_that_grows_outside_is_the_one_that_worsens():
    inside = of_values({"full": [5.0, 5.1], "none": [5.0, 5.2]}, metric="hd95")
    outside = of_values({"full": [6.0, 6.1], "none": [20.0, 20.2]}, split="external", metric="hd95")
    both = Records(inside.config, [*inside.results, *outside.results], [])
    assert any(
        "worsens least for full" in each and "most for none" in each for each in narrative.summary(both, "t")
    )


def test_one_adaptation_for_all_seeds_is_said_to_be_one():
    values = {"full": [0.82, 0.83, 0.841], "none": [0.72, 0.70, 0.741]}
    assert "adapt.seed" in said(of_values(values, config={"adapt": {"seed": 3}}))[1]["Adaptations"]
    assert "Adaptations" not in said(of_values(values))[1]


def test_the_seeds_that_would_do_have_the_power_that_is_promised():
    values = [0.81, 0.79, 0.83, 0.80, 0.78, 0.82], [0.80, 0.79, 0.80, 0.80, 0.79, 0.80]
    test = paired_t(*values)
    found = seeds_for(test)
    differences = [a - b for a, b in zip(*values, strict=True)]
    mean, deviation = (
        sum(differences) / 6,
        math.sqrt(sum((d - sum(differences) / 6) ** 2 for d in differences) / 5),
    )

    def power(count):
        critical = stats.t.ppf(0.975, count - 1)
        return stats.nct.sf(critical, count - 1, mean / deviation * math.sqrt(count))

    assert power(found) == pytest.approx(POWER, abs=0.06)
    assert power(found - 2) < POWER
