"""Studies that select: arms hand over what the score chooses, checkpoints are measured, and a budget is kept."""

import importlib.util
import json
import re

import numpy as np
import pytest

from dapt_jax.data.sources import load
from dapt_jax.data.textures import PATTERNS, load_textures
from dapt_jax.errors import UserError
from dapt_jax.formatting import number
from dapt_jax.models import registry
from dapt_jax.models.segmenter import Segmenter
from dapt_jax.records.ledger import Ledger
from dapt_jax.settings import flags as settings_flags
from dapt_jax.settings import resolve
from dapt_jax.study import balance, collapse, halving, plan, plan_tables
from dapt_jax.study.prepare import prepare
from dapt_jax.training.context import RunContext
from tests.command import ROOT, rows, run
from tests.configs import tiny_study

TINY = ROOT / "tests" / "configs" / "tiny_study.py"
FLAGS = (
    "--config.transfer.protocols=linear,", "--config.checkpoint_scoring.budget=0.5", "--config.checkpoint_scoring.images=24",
    "--config.checkpoint_scoring.names=robustness,knn", "--config.checkpoint_scoring.level=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    flags = (
        "--config.checkpoint_selection.score=knn",
        "--config.checkpoint_scoring.downstream=true",
        "--config.strategies=switching,",
    )
    assert run(f"--config={TINY}", f"--workdir={folder}", *FLAGS, *flags) == 0
    return folder


@pytest.mark.long
def test_every_scored_checkpoint_is_an_arm_and_the_chosen_one_is_handed_over(measured):
    about = json.loads((measured / "checkpoints" / "switching-seed0" / "adapted.json").read_text())
    epochs = [point["epoch"] + 1 for point in about["scored"]]
    assert epochs == [3, 4, 5, 6]
    values = {}
    for row in rows(measured / "results.jsonl"):
        if (row["split"], row["metric"], row["protocol"]) == ("development", "auc", "linear"):
            values[row["strategy"]] = row["value"]
    assert {f"switching@{number}" for number in epochs} < set(values)
    chosen = next(point["epoch"] + 1 for point in about["scored"] if point["chosen"])
    assert values["switching"] == pytest.approx(values[f"switching@{chosen}"], abs=1e-6)


def test_the_ledger_says_what_each_checkpoint_took_and_the_report_shows_the_scores(measured):
    ledger = rows(measured / "ledger.jsonl")
    taken = {
        row["strategy"]: row["reused_flops"]
        for row in ledger
        if "@" in row["strategy"] and row["stage"] == "dapt"
    }
    assert sorted(taken.values()) == [taken[f"switching@{number}"] for number in (3, 4, 5, 6)]
    trained = sum(
        row["model_flops"] for row in ledger if (row["strategy"], row["stage"]) == ("switching", "dapt")
    )
    assert taken["switching@6"] == trained
    scores = next(row for row in ledger if row["stage"] == "score")
    assert 0 < scores["model_flops"] <= 0.5 * trained
    assert (measured / "figures" / "scores_along_cells.png").exists()
    text = (measured / "report.md").read_text()
    assert "Transferability scores against downstream scores" in text
    assert "| robustness | " in text


def test_the_plan_says_what_scoring_takes_and_the_ledger_agrees(measured, capsys):
    flags = (
        "--config.checkpoint_selection.score=knn",
        "--config.strategies=switching,",
        "--config.mode=plan",
    )
    assert run(f"--config={TINY}", *FLAGS, *flags) == 0
    line = next(each for each in capsys.readouterr().out.splitlines() if each.startswith("switching: "))
    scores = next(row for row in rows(measured / "ledger.jsonl") if row["stage"] == "score")
    assert f"after 4 epochs, {scores['model_flops'] / 1e12:.3g} TFLOP" in line


def test_a_plan_counts_the_target_tasks_of_every_scored_checkpoint(measured, capsys):
    of_ledger = [row for row in rows(measured / "ledger.jsonl") if row["stage"] == "transfer"]
    of_checkpoints = [row for row in of_ledger if "@" in row["strategy"]]
    # The chosen checkpoint has the features of the arm itself, which are computed once.
    more = sum(row["model_flops"] + row["reused_flops"] for row in of_checkpoints)
    flags = "--config.checkpoint_selection.score=knn", "--config.strategies=switching,"
    settings, _ = settings_flags.parse(
        [f"--config={TINY}", *FLAGS, *flags, "--config.checkpoint_scoring.downstream=true"]
    )
    study = prepare(settings)
    (arm, *_) = study.arms
    assert (
        plan.arm_flops(study, arm) == plan.adaptation_flops(study, arm) + plan.task_flops(study, arm) + more
    )
    plan_tables.show(study)
    said = "switching: the scored checkpoints of a seed go to the target tasks, too: "
    assert f"{said}{number(more / 1e12)} TFLOP" in capsys.readouterr().out


@pytest.mark.long
def test_arms_within_a_budget_compete_and_one_is_left(tmp_path):
    """Two strategies of the same encoder: the ledger's sum stays within the budget, and a restart changes nothing."""
    config = tmp_path / "config.py"
    source = TINY.read_text().replace(
        "    return config",
        """    first, *_, last = phases
    shorter = dict(last, name="top", trainable=("stage2", "head"))
    config.custom_strategies.top = {"cut_after": "stage2/block2", "phases": (first, shorter)}
    config.strategies = ("truncated", "switching", "top")
    return config""",
    )
    config.write_text(source)
    folder = tmp_path / "run"
    flags = (
        f"--config={config}",
        f"--workdir={folder}",
        *FLAGS,
        "--config.checkpoint_selection.score=knn",
        "--config.compute_budget=0.5",
    )
    flags = (*flags, "--config.adapt.head_epochs=2", "--config.adapt.epochs=12")
    assert run(*flags) == 0
    record = json.loads((folder / "checkpoints" / "halving-seed0.json").read_text())
    ledger = rows(folder / "ledger.jsonl")
    spent = sum(row["model_flops"] for row in ledger if row["stage"] in ("dapt", "score"))
    assert 0 < spent <= record["budget_flops"]
    done = {row["strategy"] for row in rows(folder / "results.jsonl")}
    assert done == {"baseline", "truncated", record["winner"]}
    assert {row["strategy"] for row in ledger if row["stage"] == "dapt"} == {"switching", "top"}
    report = (folder / "report.md").read_text()
    assert "Unfinished" not in report
    assert "## The competition for compute" in report
    assert "| none |" not in report.split("## The competition for compute")[1].split("\n##")[0]
    before = (folder / "results.jsonl").read_text()
    assert run(*flags) == 0
    assert (folder / "results.jsonl").read_text() == before
    assert rows(folder / "ledger.jsonl") == ledger


def competitors(folder, **adapt):
    """Function that makes the competitor of a study of one arm, as a start or a restart does."""
    config = tiny_study.get_config()
    config.strategies = ("switching",)
    config.checkpoint_selection.score, config.compute_budget = "knn", 0.9
    config.checkpoint_scoring.update({"images": 16, "budget": 0.9, "level": 1})
    config.adapt.update({"head_epochs": 2, "epochs": 12, **adapt})
    config.monitoring.collapse = "halt"
    study = prepare(resolve(config))
    context = RunContext(workdir=folder, ledger=Ledger(folder / "ledger.jsonl"))
    return lambda: halving.Competitor(study, study.arms[0], context)


def test_a_round_that_is_repeated_after_a_restart_counts_nothing_of_later_rounds(tmp_path):
    start = competitors(tmp_path)
    quiet = start()
    scores = {epochs: (quiet.advance(epochs), quiet.spent) for epochs in (3, 4, 6)}
    assert len({spent for _, spent in scores.values()}) == 3
    again = start()
    for epochs, (score, spent) in scores.items():
        assert (again.advance(epochs), again.spent) == (score, spent)


def test_rounds_honour_the_settings_of_adaptation(tmp_path, monkeypatch):
    start = competitors(tmp_path, objective="reconstruct", balance_clusters=3, checkpoints=(2,))
    competitor = start()
    competitor.advance(3)
    folder = competitor.arm.folder(tmp_path)
    assert (folder / "epochs" / "epoch0002.safetensors").exists()
    assert (folder / balance.FILE).exists()
    ledger = rows(tmp_path / "ledger.jsonl")
    assert any(row["phase"] == balance.PHASE and row["model_flops"] > 0 for row in ledger)
    assert sum(row["model_flops"] for row in ledger) == competitor.spent
    monkeypatch.setattr(collapse, "SHARE", 10.0)
    with pytest.raises(UserError, match="collapse: RankMe of its features fell"):
        start().advance(5)


def test_a_budget_too_small_for_a_first_score_is_refused_with_the_one_that_is_enough(tmp_path, capsys):
    flags = (
        f"--config={TINY}",
        *FLAGS,
        "--config.checkpoint_selection.score=knn",
        "--config.mode=plan",
        "--config.adapt.head_epochs=2",
    )
    assert run(*flags, "--config.compute_budget=0.01") == 2
    line = capsys.readouterr().err
    assert "a compute_budget of 0.01 of full DAPT brings none of switching to a first score" in line
    least = float(re.search(r"expected ([\d.]+) or more", line)[1])
    assert run(*flags, f"--config.compute_budget={least}") == 0
    assert run(*flags, f"--config.compute_budget={least - 0.003}") == 2


def test_a_plan_within_a_budget_is_of_the_most_that_the_study_can_take(capsys):
    config = tiny_study.get_config()
    config.strategies, config.seeds = ("none", "switching", "full"), (0, 1)
    config.checkpoint_selection.score, config.compute_budget = "knn", 0.9
    config.checkpoint_scoring.update({"images": 16, "budget": 0.9, "level": 1})
    config.adapt.update({"head_epochs": 2, "epochs": 12})
    study = prepare(resolve(config))
    of_tasks = plan.arm_flops(study, study.arms[0])  # the same of every arm, which have one encoder
    budgets = [int(0.9 * study.full_flops(seed)) for seed in (0, 1)]
    assert plan.work_of(study, study.arms) == 4 * of_tasks + sum(budgets)
    plan_tables.show(study)
    shown = capsys.readouterr().out
    assert f"adaptation: {number(sum(budgets) / 1e12)} TFLOP in all at most: with each of 2 seeds" in shown


@pytest.mark.parametrize(("score", "is_warned"), [("robustness", True), ("knn", False)])
def test_competing_by_maps_at_different_depths_is_warned_of(score, is_warned, capsys):
    config = tiny_study.get_config()
    first, *_, last = config.custom_strategies.switching.phases
    top = dict(last, name="top", trainable=("stage2", "head"))
    config.custom_strategies.top = {"cut_after": "stage2/block2", "phases": (first, top)}
    config.checkpoint_selection.score, config.compute_budget = score, 0.9
    config.checkpoint_scoring.update({"images": 16, "budget": 0.9, "level": 1})
    config.adapt.update({"head_epochs": 2, "epochs": 12})
    for strategies, says in ((("switching", "full"), is_warned), (("switching", "top"), False)):
        config.strategies = strategies
        prepare(resolve(config))
        assert ("scores at different depths do not compare" in capsys.readouterr().out) == says


def test_the_work_of_seeds_that_share_an_adaptation_has_it_once_and_none_where_it_is_done():
    config = tiny_study.get_config()
    config.strategies, config.seeds, config.adapt.seed = ("none", "switching"), (0, 1, 2), 0
    study = prepare(resolve(config))
    of_tasks = [plan.task_flops(study, arm) for arm in study.arms]
    once = plan.adaptation_flops(study, study.arms[1])
    assert plan.work_of(study, study.arms) == sum(of_tasks) + once
    assert plan.work_of(study, study.arms[1:]) == sum(of_tasks[1:]) + once
    assert plan.work_of(study, study.arms[2:]) == sum(of_tasks[2:])


def test_a_strategy_that_the_budget_does_not_bring_to_a_score_has_not_lost_by_one():
    said = halving.outcome_line(["a", "b", "c"], ["a", "b"], ["a"])
    assert "pays for no first score of c: not trained" in said
    assert halving.outcome_line(["a", "b"], ["a", "b"], ["a"]) == "a of 2 go on"


def test_the_better_half_goes_on_and_what_has_no_score_goes_first():
    scores = {"a": 1.0, "b": None, "c": 3.0, "d": 2.0}
    assert halving.keep(scores, True, 2) == ["c", "d"]
    assert halving.keep(scores, False, 3) == ["a", "d", "c"]


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        (
            "--config.checkpoint_selection.score=logm",
            "unknown transferability score 'logm'; did you mean 'logme'?",
        ),
        (
            "--config.compute_budget=0.5",
            "compute_budget is for strategies that adapt, compared by a score; expected checkpoint_selection.score=",
        ),
        (
            "--config.checkpoint_scoring.budget=1.5",
            "checkpoint_scoring.budget is 1.5; expected more than 0 and less than 1",
        ),
        ("--config.checkpoint_scoring.every=-1", "checkpoint_scoring.every is -1; expected 0 or more"),
    ],
)
def test_a_bad_setting_is_one_line(flag, line, tmp_path, capsys):
    assert run(f"--config={TINY}", f"--workdir={tmp_path}", flag) == 2
    assert line in capsys.readouterr().err


def test_a_task_that_is_none_and_a_budget_that_buys_nothing_are_one_line(tmp_path, capsys):
    common = (
        f"--config={TINY}",
        f"--workdir={tmp_path}",
        "--config.checkpoint_selection.score=robustness",
        "--config.checkpoint_scoring.level=1",
    )
    assert run(*common, "--config.checkpoint_scoring.task=cell") == 2
    assert (
        "checkpoint_scoring.task 'cell' is not one of the tasks; did you mean 'cells'?"
        in capsys.readouterr().err
    )
    assert run(*common, "--config.checkpoint_scoring.budget=1e-6") == 2
    assert (
        "checkpoint_scoring.budget of 1e-06 pays for 0 images at 4 epochs; expected 2 or more"
        in capsys.readouterr().err
    )


def test_textures_are_the_same_whatever_their_number_and_all_unlike():
    few, more = load_textures(n=24, image_size=16), load_textures(n=36, image_size=16)
    np.testing.assert_array_equal(few.images.batch(np.arange(24)), more.images.batch(np.arange(24)))
    assert few.classes == tuple(PATTERNS)
    assert set(few.class_counts().values()) == {2}
    pixels = more.images.batch(np.arange(36)).reshape(36, -1)
    assert len(np.unique(pixels, axis=0)) == 36
    assert (pixels.std(1) > 2).all()
    with pytest.raises(UserError, match="expected 'all', 1 or more"):
        load({"kind": "textures", "name": "some"}, data_dir=None, image_size=16)


def test_the_papers_models_exist_and_its_recipes_are_settings():
    spec = importlib.util.spec_from_file_location("hidy2024", ROOT / "configs" / "hidy2024.py")
    hidy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hidy)
    for model, (encoder, decoder) in hidy.MODELS.items():
        built = Segmenter(registry.build(encoder), 2, decoder)
        assert built.groups[-1] == "head"
        for dataset in hidy.DATASETS:
            config = hidy.get_config(f"{dataset},{model},advanced")
            resolve(config)
            assert (config.model.name, config.transfer.segmentation.decoder) == (encoder, decoder)
    assert (config.adapt.batch_size, config.custom_strategies.pretraining["phases"][0]["lr"]) == (1024, 1e-3)
    assert hidy.get_config("own,unet").custom_strategies.pretraining["phases"][0]["warmup"] == 5
    alone, taken = (hidy.get_config(arm) for arm in ("pretraining,swin", "acdc,swin,simple,runs/pre"))
    resolve(alone), resolve(taken)
    assert (alone.tasks.to_dict(), alone.strategies, len(alone.adapt.checkpoints)) == (
        {},
        ("pretraining",),
        9,
    )
    assert taken.custom_strategies.pretraining["weights"] == "run:runs/pre@epoch=all"
    with pytest.raises(UserError, match="unknown 'resnet' in 'own,resnet,simple'; did you mean 'resnet50'"):
        hidy.get_config("own,resnet,simple")
