"""Losses, metrics, scores and report columns declare themselves: one of each is added here and seen from plan to report."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import scipy.stats

from dapt_jax import losses, metrics
from dapt_jax.fields import setting
from dapt_jax.formatting import number
from dapt_jax.losses import LOSSES, ClassificationLoss
from dapt_jax.metrics import registry as metric_registry
from dapt_jax.metrics.registry import SINGLE_LABEL, metric
from dapt_jax.records import Records, Row
from dapt_jax.report import main_table, selection
from dapt_jax.report.columns import Column
from dapt_jax.transferability.registry import SCORES, score
from tests.command import ROOT, rows, run

pytestmark = pytest.mark.long

TINY = ROOT / "tests" / "configs" / "tiny_study.py"
FLAGS = (
    f"--config={TINY}", "--config.strategies=switching,", "--config.transfer.protocols=linear,",
    "--config.adapt.loss.name=gce", "--config.adapt.loss.q=0.5", "--config.report.metric=specificity",
    "--config.checkpoint_scoring.every=1", "--config.checkpoint_scoring.names=mean_norm,",
    "--config.checkpoint_scoring.images=16", "--config.checkpoint_scoring.budget=0.5",
    "--config.checkpoint_scoring.level=1", "--config.checkpoint_scoring.downstream=true",
)  # fmt: skip


@pytest.fixture(scope="module")
def extended():
    """A loss, a metric, a score and a column, which are gone afterwards."""

    @dataclasses.dataclass(frozen=True)
    class GeneralizedCrossEntropy(ClassificationLoss, name="gce"):
        """(1 - p^q) / q of the true class (Zhang and Sabuncu, arXiv 1805.07836)."""

        q: float = setting(
            0.7, above=0, at_most=1, doc="Power of the probability; towards 0 it is cross-entropy."
        )

        def softmax_log_likelihood(self, logits):
            return (jax.nn.softmax(logits) ** self.q - 1) / self.q

    @metric("specificity", title="specificity", kinds=(SINGLE_LABEL,), per_class=True)
    def specificity(found):
        rate = lambda truth, chosen: float((chosen[truth == 0] == 0).mean()) if (truth == 0).any() else np.nan  # noqa: E731
        return found.by_class("specificity", found.decisions, rate)

    @score("mean_norm", needs="nothing", higher_is_better=False, title="mean norm")
    def mean_norm(features):
        return float(np.linalg.norm(features, axis=1).mean())

    column = Column("GFLOP", lambda arm: number(arm.mean_cost(lambda cost: cost.total_flops / 1e9)), "cost")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_table, "COST_COLUMNS", (*main_table.COST_COLUMNS, column))
        yield GeneralizedCrossEntropy
    del LOSSES["gce"], SCORES["mean_norm"]
    metric_registry.remove("specificity")


@pytest.fixture(scope="module")
def study(extended, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("extended")
    assert run(*FLAGS, "--config.mode=plan") == 0
    assert run(*FLAGS, f"--workdir={workdir}") == 0
    return workdir


def test_a_loss_has_its_settings_and_is_trained_with(extended, study):
    assert losses.make("gce", {"q": 0.5}, classes=3) == extended(3, q=0.5)
    config = json.loads((study / "config.json").read_text())
    assert (config["adapt"]["loss"]["name"], config["adapt"]["loss"]["q"]) == ("gce", 0.5)
    first = next(row for row in rows(study / "ledger.jsonl") if row["stage"] == "dapt")["curve"][0]
    assert 0 < first["loss"] < 2  # at most 1 / q


def test_a_loss_s_parameter_out_of_range_is_one_line(extended, capsys):
    assert run(*FLAGS, "--config.adapt.loss.q=2.0", "--config.mode=plan") == 2
    assert "adapt.loss.q is 2.0; expected more than 0 and at most 1" in capsys.readouterr().err


def test_a_metric_is_measured_and_can_be_the_report_s(study):
    named = {row["metric"] for row in rows(study / "results.jsonl")}
    assert {"specificity", *(f"specificity/{each}" for each in ("neutrophil", "basophil"))} <= named
    report = (study / "report.md").read_text()
    assert "specificity, linear" in report
    assert metrics.METRICS["specificity"].higher_is_better


def test_a_score_is_computed_and_its_direction_is_read_off_the_ledger(study):
    """Nothing but its declaration says that lower is better: the report gets the sign right."""
    records = Records.read(study)
    (curve,) = selection.curves(records)
    assert [point["higher_is_better"] for point in curve.points] == [{"mean_norm": False}] * len(curve.points)
    values = selection.downstream_scores(records, curve, "cells", "development")
    by_score = curve.series("mean_norm")
    expected = scipy.stats.pearsonr([-by_score[epochs] for epochs in values], list(values.values()))[0]
    found = selection.agreement(records, "cells")
    assert found.rows[0][found.columns.index("Pearson")].text == f"{expected:+.2f}"
    assert "lower is better of mean_norm" in (study / "report.md").read_text()


@pytest.mark.parametrize("higher_is_better", [True, False])
@pytest.mark.parametrize("metric_name", ["auc", "ece"])
def test_a_score_that_predicts_has_positive_correlations_whichever_way_it_and_the_metric_go(
    higher_is_better, metric_name
):
    results, points = [], []
    for epoch, goodness in enumerate((0.1, 0.4, 0.2, 0.9)):
        key = {
            "strategy": f"full@{epoch + 1}",
            "seed": 0,
            "task": "cells",
            "split": "development",
            "protocol": "linear",
        }
        results.append(
            {**key, "metric": metric_name, "value": goodness if metric_name == "auc" else 1 - goodness}
        )
        value = goodness if higher_is_better else -goodness
        scores = {"scores": {"made_up": value}, "higher_is_better": {"made_up": higher_is_better}}
        points.append({"epoch": epoch, "share": 1.0, **scores})
    ledger = [Row("full", 0, "score", "scores", curve=points)]
    found = selection.agreement(Records({"report": {"metric": metric_name}}, results, ledger), "cells")
    assert [cell.text for cell in found.rows[0]] == ["made up", "+1.00", "+1.00", "+1.00", "+0.000"]
    # The worst checkpoint is the score's best.
    points[0]["scores"]["made_up"] = 2 if higher_is_better else -2
    found = selection.agreement(Records({"report": {"metric": metric_name}}, results, ledger), "cells")
    assert found.rows[0][-1].text == ("-0.800" if metric_name == "auc" else "+0.800")


def test_agreement_over_seeds_is_a_mean_with_the_seeds_that_agree_least_and_most():
    of_score, of_task = (1, 2, 3, 4), ((1, 2, 3, 4), (4, 3, 2, 1), (1, 3, 2, 4))
    key = {"task": "cells", "split": "development", "protocol": "linear", "metric": "auc"}
    results = [
        {**key, "strategy": f"full@{epoch + 1}", "seed": seed, "value": value / 10}
        for seed, values in enumerate(of_task)
        for epoch, value in enumerate(values)
    ]
    points = [
        {"epoch": epoch, "share": 1.0, "scores": {"knn": value}, "higher_is_better": {"knn": True}}
        for epoch, value in enumerate(of_score)
    ]
    ledger = [Row("full", seed, "score", "scores", curve=points) for seed in range(3)]
    (row,) = selection.agreement(Records({}, results, ledger), "cells").rows
    pearson = [scipy.stats.pearsonr(of_score, values)[0] for values in of_task]
    assert row[1].text == f"{np.mean(pearson):+.2f} (-1.00 to +1.00)"
    assert row[4].text == "-0.100 (-0.300 to +0.000)"


def test_a_score_of_an_earlier_ledger_without_directions_has_no_agreement_and_the_note_says_so():
    points = [{"epoch": epoch, "share": 1.0, "scores": {"knn": epoch / 4}} for epoch in range(4)]
    key = {"seed": 0, "task": "cells", "split": "development", "protocol": "linear", "metric": "auc"}
    results = [{**key, "strategy": f"full@{epoch + 1}", "value": epoch / 5} for epoch in range(4)]
    found = selection.agreement(
        Records({}, results, [Row("full", 0, "score", "scores", curve=points)]), "cells"
    )
    assert [cell.text for cell in found.rows[0]] == ["knn", "–", "–", "–", "–"]
    assert "direction the ledger does not record" in found.note


def test_a_column_is_shown_under_its_group(study):
    report = (study / "report.md").read_text()
    assert "| GFLOP |" in report
    table = main_table.table(Records.read(study), "cells")
    assert ("cost", 1) in table.groups
