"""The first lines of a report never say more than the numbers support."""

import math

import pytest
from scipy import stats

from dapt_jax.records.study_records import Records
from dapt_jax.records.vocabulary import BASELINE
from dapt_jax.report import narrative, recommendation
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
    monkeypatch.setattr(recommendation, "error_of_difference", lambda *_: found)
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
    assert headline == "No strategy is recommended: none scores above chance on the development set."
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


def test_a_feature_that_works_reversed_counts_as_its_better_direction():
    (level,) = baseline_levels(study({"full": 0.7}, baseline=0.2), "t", "development")
    assert (level.value, level.is_reversed) == (pytest.approx(0.8), True)
    assert "full is not better than the one-feature baseline scalar (0.800, reversed)." in narrative.summary(
        study({"full": 0.7}, baseline=0.2), "t"
    )


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
