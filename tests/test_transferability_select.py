"""Selection: the rules do what they say, and the benchmark on released results prints the known rows."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import checkpoint_selection, score_cost
from benchmarks.released_scores import DEFAULT, LENGTHS, Variant, load
from dapt_jax.errors import UserError
from dapt_jax.transferability.select import CheckpointRule, best, length_prior, patience

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
SCORES = st.lists(st.floats(-10, 10), min_size=1, max_size=12).map(np.asarray)


def test_best_is_the_earliest_of_the_highest_and_skips_what_is_undefined():
    assert best(np.array([1.0, 3, 3, 2])) == 1
    assert best(np.array([np.nan, 1, np.nan])) == 1
    assert best(np.array([np.nan, np.nan])) == 1
    assert CheckpointRule("best").choose([3.0, 1.0, 2.0], [0.3, 0.6, 1.0], higher_is_better=False) == (
        1,
        False,
    )


def test_patience_stops_where_nothing_better_came_and_keeps_the_best():
    assert patience(np.array([1.0, 2, 1, 1, 9]), 2) == (1, True)
    assert patience(np.array([1.0, 2, 1]), 2) == (1, False)
    assert patience(np.array([np.nan, np.nan, 1.0, np.nan]), 1) == (2, True)
    # 1, 1.5, 2.5, 2, 1: one bad score among good ones does not end it.
    assert patience(np.array([1.0, 2, 3, 1, 1]), 2, window=2) == (2, True)


@given(SCORES, st.integers(1, 4), st.integers(1, 3))
def test_patience_never_looks_past_where_it_stops(scores, wait, window):
    for now in range(1, len(scores) + 1):
        index, stops = patience(scores[:now], wait, window)
        if stops:
            assert patience(scores, wait, window) == (index, True)
            assert index == now - 1 - wait
            break


@given(SCORES, st.sampled_from([0.25, 4.0, 1024.0]), st.sampled_from([-8.0, 0.0, 8.0]))
def test_the_length_prior_sees_neither_unit_nor_origin(scores, scale, shift):
    scores = np.round(scores)  # so that units and origin change without rounding, and ties stay ties
    shares = np.arange(1, len(scores) + 1) / len(scores)
    assert length_prior(scores, shares, 0.777) == length_prior(scores * scale + shift, shares, 0.777)
    assert length_prior(scores, shares, 1e6) == len(scores) - 1
    if len(set(scores.tolist())) > 1:
        assert scores[length_prior(scores, shares, 0.0)] == pytest.approx(scores.max())


def test_the_length_prior_weighs_deviations_against_the_share_of_the_length():
    scores, shares = np.array([0.0, 2.0, 1.0]), [0.0, 0.5, 1.0]
    spread = scores.std()
    turn = (scores[1] - scores[2]) / spread / 0.5
    assert length_prior(scores, shares, turn - 0.01) == 1
    assert length_prior(scores, shares, turn + 0.01) == 2
    assert length_prior(np.array([1.0, 1.0]), [0.5, 1.0], 0.1) == 1
    assert length_prior(np.array([np.nan, 1.0, 0.0]), [0.1, 0.5, 1.0], 0.1) == 1


def test_bad_rules_are_one_line():
    for arguments, line in {
        ("bets",): "unknown selection rule 'bets'; did you mean 'best'",
        ("patience", 0): "selection patience is 0; expected 1 or more",
        ("length_prior", 3, 1, -1.0): "selection weight is -1.0; expected 0 or more",
    }.items():
        with pytest.raises(UserError, match=line):
            CheckpointRule(*arguments)


@pytest.fixture(scope="module")
def released():
    if not REFERENCE.is_dir():
        pytest.skip(f"no released results at {REFERENCE}")
    return load(REFERENCE)


def test_the_released_files_are_read_whole(released):
    assert len(released.cells) == 18
    assert released.dice.shape == (18, 2, 9)
    assert len(released.goodness) == 3 * 5 * 2 * 4  # Swin has four levels
    with (REFERENCE / "medseg_robustness_scores.csv").open() as file:
        first = next(
            row
            for row in csv.DictReader(file)
            if (row["encoder"], row["pretraining_length"], row["level"]) == ("resnet50", "150", "4")
        )
    scheme = first["pretraining_scheme"].removesuffix("_training")
    cell = released.cells.index((first["encoder"], first["dataset"], scheme))
    variant = Variant(
        first["metric"], float(first["margin"]), first["pooled"] == "True", 6 - int(first["level"])
    )
    where = LENGTHS.index(int(first["pretraining_length"]))
    assert released.goodness[variant][cell, where] == -float(first["robustness"])


KNOWN = [
    (DEFAULT, ".33", ".17", ".47", 135, 55, "-0.27"),
    (Variant("cosine_distance", 0.5, True, 1), ".42", ".24", ".59", 165, 45, "-0.33"),
    (Variant("cosine_distance", 0.5, False, 1), ".53", ".35", ".70", 203, 32, "-0.41"),
    (Variant("inv_pearson_corr", 0.5, False, 1), ".51", ".33", ".68", 233, 22, "-0.26"),
]


@pytest.mark.parametrize(("variant", "r", "low", "high", "kept", "saved", "points"), KNOWN, ids=str)
def test_known_rows_of_the_published_rules_are_reproduced_to_the_digit(
    released, variant, r, low, high, kept, saved, points
):
    judge = checkpoint_selection.Judge(released, 4000)
    row = judge.row("", checkpoint_selection.arg_best(released.goodness[variant]))
    assert (round(row["kept"]), f"{row['saved']:.0%}", f"{row['points']:.2f}") == (kept, f"{saved}%", points)
    assert row["run"] == 300
    found = checkpoint_selection.mean_correlation(
        judge, checkpoint_selection.correlations(released, variant), "pearson"
    )
    assert f"{found[0]:.2f}".lstrip("0") == r
    # Their resamples are other ones (and of 36 cells): the ends agree to a few hundredths.
    assert found[1:] == pytest.approx((float(low), float(high)), abs=0.035)


def test_known_rows_of_fixed_lengths_and_of_the_oracle_are_reproduced(released):
    judge = checkpoint_selection.Judge(released, 100)
    for length, points in {150: "-0.42", 200: "-0.20", 250: "-0.05", 300: "0.00"}.items():
        row = judge.row("", checkpoint_selection.fixed(released, LENGTHS.index(length)))
        assert (f"{row['points']:.2f}", row["kept"]) == (points, length)
    assert f"{released.gain.max(2).mean():+.2f}" == "+0.40"


def test_what_is_held_out_has_no_say(released):
    """Scores and results of one dataset are replaced by noise: what is chosen for it stays."""
    judge = checkpoint_selection.Judge(released, 200)
    names = released.group("dataset")
    candidates = {
        str(w): checkpoint_selection.with_prior(released.goodness[DEFAULT], w) for w in (0.0, 0.9, 3.0)
    }
    _, chosen = checkpoint_selection.out_of_sample(judge, candidates, "dataset")
    noisy = released.dice.copy()
    noisy[names == "IDRiD"] += 10 * np.random.default_rng(0).normal(size=noisy[names == "IDRiD"].shape)
    other = checkpoint_selection.Judge(type(released)(released.cells, released.goodness, noisy), 200)
    _, again = checkpoint_selection.out_of_sample(other, candidates, "dataset")
    assert chosen["IDRiD"] == again["IDRiD"]
    assert set(chosen) == {"ACDC", "COVID-QU", "IDRiD"}


def test_the_rule_that_stops_at_200_never_needs_a_later_score(released):
    good = released.goodness[DEFAULT].copy()
    picks = checkpoint_selection.with_prior(good, 0.9, 7)
    good[:, 7:] = math.inf
    np.testing.assert_array_equal(checkpoint_selection.with_prior(good, 0.9, 7).kept, picks.kept)
    assert picks.kept.max() <= picks.run.max() == LENGTHS.index(200)


def test_a_folder_without_the_files_is_one_line(tmp_path, capsys):
    assert checkpoint_selection.main([f"--reference={tmp_path}"]) == 2
    assert "no such file; expected the released results in --reference" in capsys.readouterr().err
    (tmp_path / "medseg_robustness_scores.csv").write_text("encoder,dataset\nresnet50,ACDC\n")
    assert checkpoint_selection.main([f"--reference={tmp_path}"]) == 2
    assert "no column 'pretraining_length'" in capsys.readouterr().err


def test_the_benchmark_of_costs_computes_the_same_on_both_sides(tmp_path):
    """Folds of the probe and signs of PARC's components differ; everything else is one number twice."""
    out = tmp_path / "out.json"
    score_cost.main(["--images=150", "--features=40", "--classes=3", "--source=8", f"--json={out}"])
    for row in json.loads(out.read_text())["rows"]:
        if row["score"] not in ("linear_probe", "parc"):
            assert row["value"] == pytest.approx(row["textbook_value"], rel=1e-5), row["score"]
        assert row["seconds"] > 0
