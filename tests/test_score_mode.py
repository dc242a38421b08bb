"""`mode=score`: any checkpoint, every variant, one forward pass per view; intervals, ranks and correlation."""

import re
from collections import Counter

import numpy as np
import pytest

from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.records.scores import Downstream, Scores, read
from dapt_jax.report import scores as score_report
from dapt_jax.study import checkpoints, score
from dapt_jax.study.checkpoints import Checkpoint
from dapt_jax.transferability.robustness import robustness
from dapt_jax.transferability.variants import Features, Measure, ScoringGrid, random_halves
from tests.command import ROOT, run

CONFIG = ROOT / "tests" / "configs" / "pretraining.py"
RNG = np.random.default_rng(0)
VIEWS = RNG.normal(size=(3, 12, 2, 2, 5))


def test_the_grid_of_paper_2_is_the_arithmetic_of_the_score_on_the_same_views():
    """Every variant equals the score itself, whichever distances the grid has reused."""
    grid = ScoringGrid(
        distances=("cosine", "l2", "inverse_pearson"),
        margins=(0.25, 0.5, 1.0),
        pooling=("pooled", "dense"),
        views=(2, 3),
        negatives=(1, 0),
        levels=(1,),
        reference_compatible=(False, True),
    )
    variants = grid.variants(["robustness"])
    assert len(variants) == 3 * 3 * 2 * 2 * (2 + 1)
    measure = Measure(Features(VIEWS[0].mean((1, 2)), {(c, 1): VIEWS for c in (False, True)}), grid.margins)
    for variant in variants:
        expected = robustness(
            VIEWS[: variant.views],
            distance=variant.distance,
            margin=variant.margin,
            negatives=variant.negatives,
            pooled=variant.pooling == "pooled",
            reference_compatible=variant.reference_compatible,
        )
        assert measure.of(variant).value == pytest.approx(expected, rel=1e-9), variant.title


def test_halves_hold_whole_patients_of_every_class_and_spread_like_a_bootstrap_of_the_mean():
    groups, labels = np.repeat(np.arange(100), 2), np.repeat(np.arange(100) % 4, 2)
    halves = random_halves(groups, labels, 400, seed=0)
    for rows_of in halves[:20]:
        assert set(Counter(groups[rows_of]).values()) == {2}
        assert set(labels[rows_of]) == {0, 1, 2, 3}
    values = np.repeat(RNG.normal(size=100), 2)
    spread = np.std([values[rows_of].mean() for rows_of in random_halves(groups, None, 2000, seed=1)])
    assert spread == pytest.approx(values.std() / np.sqrt(100), rel=0.06)
    assert random_halves(np.arange(3), None, 5, seed=0) == []


def _rows(values, **others):
    common = {
        "task": "t",
        "split": "development",
        "variant_title": "s",
        "higher_is_better": False,
        "n": 9,
        **others,
    }
    return [
        {
            **common,
            "checkpoint": name,
            "value": value,
            "halves": [value + h for h in np.linspace(-0.1, 0.1, 20)],
        }
        for name, value in values.items()
    ]


def test_ranks_correlation_and_loss_follow_from_the_records():
    values = {"a": 0.4, "b": 0.1, "c": 0.3, "d": 0.2}
    good = {"a": 0.6, "b": 0.9, "c": 0.7, "d": 0.8}
    known = [Downstream(name, "t", "external", "linear auc", value, False) for name, value in good.items()]
    found = Scores(_rows(values), known)
    assert [each.row["checkpoint"] for each in found.ranking("t", "development", "s")] == ["b", "d", "c", "a"]
    first = found.ranking("t", "development", "s")[0]
    assert (first.rank, first.low, first.high) == (1, 1, 1)
    assert first.interval.low < 0.1 < first.interval.high
    agreement = found.correlation("t", "development", "s", "external")
    assert (agreement.kendall.mean, agreement.spearman, agreement.loss) == pytest.approx((1, 1, 0))
    worse = Scores(_rows(values, higher_is_better=True), known)
    turned = worse.correlation("t", "development", "s", "external")
    assert (turned.kendall.mean, turned.loss) == pytest.approx((-1, -0.3))


def test_checkpoints_of_one_value_are_not_told_apart_by_their_order():
    rows = _rows({"none": 0.1, "partial": 0.1, "full": 0.4}, variant={"level": 2})
    words = score_report._words(Scores(rows), "t", "development")
    assert "none, partial are the best of 3 checkpoints with the same value to the last digit" in words
    assert "none is the best" not in words
    assert "scoring.levels=2" in words


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    flags = ("--config.adapt.checkpoints=1,2", "--config.checkpoint_scoring.names=robustness,knn")
    passes = []
    batched = score._batched
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "_batched", lambda *args: passes.append(1) or batched(*args))
        assert run(f"--config={CONFIG}", f"--workdir={folder / 'pretraining'}", *flags) == 0
        downstream = folder / "known.csv"
        downstream.write_text("checkpoint,value\nown@1,0.7\nown@2,0.8\nown@3,0.75\nrandom,0.5\n")
        spec = f"run:{folder / 'pretraining'}@epoch=all"
        command = (
            f"--config={CONFIG}:target", f"--workdir={folder / 'scored'}", "--config.mode=score", *flags[1:],
            f"--config.scoring.checkpoints={spec},random,imagenet", "--config.scoring.levels=(1,)",
            "--config.scoring.distances=cosine,l2", "--config.scoring.margins=(.5,1.)", "--config.scoring.resamples=12",
            f"--config.scoring.downstream={downstream}",
        )  # fmt: skip
        assert run(*command) == 0
        computed = len(passes)
        assert run(*command) == 0
    return folder / "scored" / "scores", command, computed, len(passes)


def test_every_kept_epoch_and_weights_without_phases_are_scored_with_one_pass_per_view(scored, capsys):
    folder, _, computed, after = scored
    found = read(folder / "scores.jsonl")
    assert list(dict.fromkeys(row["checkpoint"] for row in found)) == [
        "own@1", "own@2", "own@3", "random", "imagenet",
    ]  # fmt: skip
    titles = [f"robustness {distance} {margin}" for distance in ("cosine", "l2") for margin in ("0.5", "1")]
    assert Counter(row["variant_title"] for row in found) == dict.fromkeys([*titles, "knn"], 5)
    assert computed == 5 * 3  # two views and the images as they are, of each of five checkpoints
    assert after == computed  # the same command measures nothing again
    text = (folder / "report.md").read_text()
    assert "Ranking by robustness cosine 0.5" in text
    assert "Rank correlation with downstream scores" in text
    assert "| own@2 | 0.800 |" in text
    assert (folder / "scores_cells_development.png").exists()
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--config.scoring.checkpoints=none.pth,", "none.pth: no such weight file"),
        ("--config.scoring.tasks=cell,", "scoring.tasks holds 'cell'; did you mean 'cells'?"),
        ("--config.scoring.levels=(9,)", "scoring.levels is 9; efficientnet_lite0 has 1 to"),
        ("--config.scoring.distances=cosin,", "unknown scoring.distances 'cosin'; did you mean 'cosine'?"),
        ("--config.scoring.downstream=none.csv", "no file or folder none.csv"),
        ("--config.scoring.checkpoints=()", "strategy 'own': "),
    ],
)
def test_a_bad_checkpoint_task_or_variant_is_one_line(scored, flag, line, tmp_path, capsys):
    command = [each for each in scored[1] if not each.startswith((flag.partition("=")[0], "--workdir"))]
    assert run(*command, f"--workdir={tmp_path}", flag) == 2
    err = capsys.readouterr().err
    assert line in err.replace("\n", " ")


def test_downstream_scores_of_other_checkpoints_are_refused(scored, tmp_path, capsys):
    table = tmp_path / "known.csv"
    table.write_text("checkpoint,value\nelsewhere,0.7\n")
    assert run(*scored[1][:-1], f"--config.scoring.downstream={table}") == 2
    assert (
        "none of its checkpoints is scored; it has elsewhere, and scored are own@1" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"checkpoint,value\na,nan\n", "row 2: value is 'nan'; expected a number"),
        (b"checkpoint,value\na,0.5\nb\n", "row 3: 1 cells, expected 2 as in the header"),
        (b"checkpoint,value\na,0.5\nb,0.6\na,0.7\n", "row 4: a is there twice for t; expected one value"),
        (b"checkpoint,value\n\xe9,0.5\n", "not UTF-8 text (byte 17); save it as CSV UTF-8"),
        (b"checkpoint,auc\na,0.5\n", "no column 'value'"),
        (b"", "no rows; expected a header such as checkpoint,value"),
    ],
)
def test_a_table_of_downstream_scores_that_does_not_say_one_number_each_is_refused(tmp_path, content, line):
    path = tmp_path / "known.csv"
    path.write_bytes(content)
    chosen = [Checkpoint(name, name, registry.build("resnet18")) for name in "ab"]
    with pytest.raises(UserError, match=re.escape(line)):
        checkpoints._of_csv(path, chosen, ["t"])
    path.write_bytes("\ufeffcheckpoint;value\na;0.5\n".encode())  # as spreadsheets write it
    assert [(each.checkpoint, each.value) for each in checkpoints._of_csv(path, chosen, ["t"])] == [
        ("a", 0.5)
    ]
