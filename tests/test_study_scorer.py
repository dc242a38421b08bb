"""Scores along a run: what they cost is planned and kept within the budget, stops are honest, and a kill changes nothing."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dapt_jax.errors import UserError
from dapt_jax.records.ledger import Ledger
from dapt_jax.records.study_records import Records
from dapt_jax.report import selection
from dapt_jax.settings import StudySettings, default, resolve
from dapt_jax.study import scorer as scoring
from dapt_jax.study.scorer import Plan, Scorer
from dapt_jax.training import loop
from dapt_jax.training.context import RunContext
from dapt_jax.training.executables import Executables
from dapt_jax.training.phases import Phase
from dapt_jax.transferability.registry import evaluate
from dapt_jax.transferability.settings import SelectionSettings
from tests import command, tiny

ENCODER, DATA, TARGET = tiny.encoder(), tiny.dataset(), tiny.dataset(n=24, seed=5)
PHASES = (
    tiny.HEAD,
    Phase("partial", 2, ("stage3", "head"), 1e-2),
    Phase("full", 4, ("*",), 1e-2, batch_norm="train"),
)
EXECUTABLES = Executables()


def settings(**changes):
    config = default()
    config.checkpoint_scoring.every = 1
    config.checkpoint_scoring.names = ("robustness", "logme", "leep", "uniformity")
    config.checkpoint_scoring.budget = 0.9
    for name, value in changes.items():
        if name in ("select", "rule"):
            config.checkpoint_selection["score" if name == "select" else name] = value
        else:
            config.checkpoint_scoring[name] = value
    return resolve(config).scores


def make_run():
    return tiny.make_run(PHASES, encoder=ENCODER, data=DATA)


def context(folder, **others):
    return RunContext(
        checkpoint_dir=folder / "state",
        checkpoint_every_s=1e9,
        ledger=Ledger(folder / "ledger.jsonl"),
        executables=EXECUTABLES,
        **others,
    )


def train(folder, used, until=0):
    run = make_run()
    scorer = Scorer(used, run, TARGET, folder / "scored", context(folder), until)
    trained = loop.train(run, *run.model.init(1), context(folder, callbacks=(scorer,)))
    weights = trained.params, trained.batch_stats
    return scorer, weights, {(row.stage, row.phase): row for row in Ledger(folder / "ledger.jsonl").rows()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), settings())


def test_epochs_of_the_head_alone_are_not_scored_and_the_last_epoch_is():
    plan = Plan.of(settings(every=4), make_run(), 24)
    assert plan.epochs == {5: 4 / 6, 7: 1.0}
    assert list(Plan.of(settings(), make_run(), 24).epochs) == [2, 3, 4, 5, 6, 7]


def test_a_score_that_sees_nothing_of_what_is_trained_does_not_choose():
    top = tiny.make_run(PHASES[:2], encoder=ENCODER, data=DATA)
    deepest = scoring.level_group(ENCODER, 2)
    assert top.programs[1].mask.boundary > deepest
    name = ENCODER.groups[deepest]
    with pytest.raises(UserError, match=rf"robustness sees the output of '{name}'.*same after every epoch"):
        Plan.of(settings(select="robustness"), top, 24)
    for fits in ({"select": "robustness", "level": 1}, {"select": "logme"}, {}):
        assert Plan.of(settings(**fits), top, 24).epochs
    assert Plan.of(settings(select="robustness"), make_run(), 24).epochs


def test_the_sample_shrinks_to_the_budget():
    run = make_run()
    for budget in (0.3, 0.6):
        plan = Plan.of(settings(budget=budget, every=3), run, 1000)
        spent = plan.first[2] + plan.each[2] * 2  # both scored epochs are of the last phase
        assert 0.8 * budget < spent / run.flops() <= budget
    line = "checkpoint_scoring.budget of 0.001 pays for 0 images at 6 epochs; expected 2 or more"
    with pytest.raises(UserError, match=line):
        Plan.of(settings(budget=0.001), run, 24)


def test_what_was_planned_is_what_the_ledger_holds(whole):
    hook, _, rows = whole
    plan, row = hook.plan, rows["score", "scores"]
    # The prefix of the partial phase once; the full phase starts from the images.
    want = plan.first[1] + 2 * plan.each[1] + plan.first[2] + 4 * plan.each[2]
    assert row.model_flops == want
    assert row.images == plan.images * 3 * 6
    assert row.model_flops <= 0.9 * sum(each.model_flops for each in rows.values() if each.stage == "dapt")
    assert plan.first[1] > plan.each[1]
    assert not plan.first[2]
    assert [point["epoch"] for point in row.curve] == [2, 3, 4, 5, 6, 7]
    assert all(value is not None for point in row.curve for value in point["scores"].values())


def test_scoring_does_not_change_what_is_trained(whole, tmp_path):
    run = make_run()
    alone = loop.train(run, *run.model.init(1), context(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, (alone.params, alone.batch_stats), whole[1])


def test_features_through_the_kept_prefix_are_those_of_the_whole_network(whole):
    hook, (params, batch_stats), _ = whole
    model = hook.run.model
    for number in (1, 2):
        hook._activations_of = None
        found = hook.material(number, params, batch_stats)
        want = jax.jit(model.features)(
            params, batch_stats, hook.sample.images.batch(np.arange(len(hook.sample)))
        )
        np.testing.assert_allclose(found.features, want, rtol=2e-4, atol=1e-5)
        assert found.views.shape[:2] == (2, len(hook.sample))
        assert found.views.shape[-1] == ENCODER.pyramid_levels[-2].features
        np.testing.assert_allclose(found.source.sum(1), 1, rtol=1e-5)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A rule without patience: robustness of an untrained tiny network soon gets no better."""
    used = dataclasses.replace(
        settings(select="robustness"),
        selection=SelectionSettings(score="robustness", rule="patience", patience=1),
    )
    folder = tmp_path_factory.mktemp("stopped")
    return (folder, used, *train(folder, used))


def test_patience_ends_the_run_and_the_ledger_holds_what_was_run(stopped):
    _, _, hook, _, rows = stopped
    scores = [point["scores"]["robustness"] for point in hook.points]
    assert len(scores) < 6
    assert hook.stopped
    assert scores[-1] >= min(scores)
    ran = sum(row.steps for (stage, _), row in rows.items() if stage == "dapt")
    per_epoch = hook.run.timeline.steps_per_epoch
    assert ran == per_epoch * (hook.points[-1]["epoch"] + 1)
    assert ran < hook.run.timeline.steps
    trained = sum(row.model_flops for (stage, _), row in rows.items() if stage == "dapt")
    assert trained == hook.run.flops(hook.points[-1]["epoch"] + 1)


def test_the_chosen_checkpoint_is_handed_over_not_the_last(stopped):
    _, _, hook, (params, batch_stats), _ = stopped
    chosen, _ = hook.chosen(params, batch_stats)
    index = [point["chosen"] for point in hook.points].index(True)
    assert index < len(hook.points) - 1
    phase = hook.run.timeline.position(hook.points[index]["epoch"] * hook.run.timeline.steps_per_epoch).phase
    hook._activations_of = None
    again = evaluate(["robustness"], hook.material(phase, chosen, hook.chosen(params, batch_stats)[1]))[
        "robustness"
    ]
    assert again.value == pytest.approx(hook.points[index]["scores"]["robustness"], rel=1e-4)


def test_a_stopped_run_stays_stopped_when_started_again(stopped):
    folder, used, hook, trained, rows = stopped
    again, same, ledger = train(folder, used)
    assert again.points == hook.points
    jax.tree.map(np.testing.assert_array_equal, same, trained)
    assert {key: row.model_flops for key, row in ledger.items()} == {
        key: row.model_flops for key, row in rows.items()
    }


def test_a_run_paused_twice_ends_as_one_that_was_not(whole, tmp_path):
    for until in (3, 5, 0):
        hook, trained, rows = train(tmp_path, settings(), until)
        assert len(hook.points) == {3: 1, 5: 3, 0: 6}[until]
    jax.tree.map(np.testing.assert_array_equal, trained, whole[1])
    assert hook.points == whole[0].points
    assert {key: row.model_flops for key, row in rows.items()} == {
        k: r.model_flops for k, r in whole[2].items()
    }


def test_what_cannot_be_scored_is_a_reason_in_the_curve_and_training_goes_on(tmp_path):
    one_class = dataclasses.replace(TARGET, labels=np.zeros_like(TARGET.labels))
    run, own = make_run(), context(tmp_path)
    hook = Scorer(settings(every=6), run, one_class, tmp_path / "scored", own)
    params, batch_stats = run.model.init(1)
    assert not hook.after_epoch(2, 7, params, batch_stats, {})
    point = own.ledger.rows()[0].curve[0]
    assert point["scores"]["logme"] is None
    assert "are one class; expected two classes or more" in point["reasons"]["logme"]
    assert point["scores"]["robustness"] is not None
    params["stage3"]["block1"]["conv"]["kernel"] = params["stage3"]["block1"]["conv"]["kernel"] * np.nan
    hook.after_epoch(2, 7, params, batch_stats, {})
    assert "are not finite" in hook.points[-1]["reasons"]["logme"]


def test_a_score_that_is_undefined_throughout_has_chosen_nothing_and_this_is_said(tmp_path):
    one_class = dataclasses.replace(TARGET, labels=np.zeros_like(TARGET.labels))
    said = []
    own = context(tmp_path, reporter=SimpleNamespace(say=said.append))
    hook = Scorer(settings(select="logme"), make_run(), one_class, tmp_path / "scored", own)
    weights = hook.run.model.init(1)
    for epoch in (6, 7):
        hook.after_epoch(2, epoch, *weights, {})
    assert hook.chosen(*weights) == weights
    assert len(said) == 1
    assert "checkpoint_selection.score=logme is undefined at every scored epoch (all 24 labels" in said[0]
    tasks = {"tasks": {"cells": {}}, "checkpoint_selection": {"score": "logme"}}
    records = Records(tasks, [], [dataclasses.replace(hook.row(), strategy="full")])
    assert selection.without_choice(records).startswith("Of full seed 0 the last checkpoint counts: logme")
    assert not selection.score_that_read_labels(records, "cells")
    hook.points[0]["scores"]["logme"] = 0.5
    hook.points[0]["chosen"] = True
    assert not selection.without_choice(records)
    assert selection.score_that_read_labels(records, "cells") == "logme"


def test_bad_settings_are_one_line():
    lines = {
        "unknown transferability score 'robust'; did you mean 'robustness'": {"names": ("robust",)},
        "unknown transferability score 'lgme'; did you mean 'logme'": {"select": "lgme"},
        "unknown checkpoint_selection.rule 'bst'; did you mean 'best'": {"rule": "bst"},
        "checkpoint_scoring.negatives is 300 of a sample of 256 images": {"negatives": 300},
        "unknown checkpoint_scoring.distance 'cosin'; did you mean 'cosine'": {"distance": "cosin"},
    }
    for line, changes in lines.items():
        with pytest.raises(UserError, match=line):
            settings(**changes)
    with pytest.raises(UserError, match=r"checkpoint_scoring\.level is 9; tiny has 1 to 3"):
        scoring.level_group(ENCODER, 9)
    with pytest.raises(UserError, match="5 target images to score; expected 9 or more"):
        Plan.of(settings(negatives=8), make_run(), 5)
    assert StudySettings().scores is None


@pytest.mark.parametrize(("score", "reads_labels"), [("logme", True), ("robustness", False)])
def test_development_scores_say_that_labels_of_their_images_chose_the_checkpoint(
    score, reads_labels, tmp_path, capsys
):
    flags = command.small(
        "--config.seeds=0", "--config.strategies=none,full", f"--config.checkpoint_selection.score={score}",
        "--config.checkpoint_scoring.budget=0.9", f"--workdir={tmp_path}",
    )  # fmt: skip
    assert command.run(*flags) == 0
    warning = (
        "score=logme reads labels of leukocytes development, whose scores are then those of images that chose"
    )
    assert (warning in capsys.readouterr().out) is reads_labels
    page = (tmp_path / "report.html").read_text()
    assert ("Development images have chosen the checkpoints, by logme" in page) is reads_labels
