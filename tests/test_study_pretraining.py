"""A pre-training is a study of its own: kept epochs, references to them, a shared seed, phases on several corpora."""

import json

import numpy as np
import pytest

from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.records.study_records import Records
from dapt_jax.settings import default, resolve
from dapt_jax.study import strategies
from dapt_jax.study.strategies import resolve as resolve_strategy
from dapt_jax.weights import export, locate, readers
from dapt_jax.weights.paths import flatten
from dapt_jax.weights.run_reference import ABOUT, ADAPTED, EPOCHS, RunReference, epoch_file
from tests.command import ROOT, rows, run

CONFIG = ROOT / "tests" / "configs" / "pretraining.py"
ENCODER = registry.build("efficientnet_lite0").truncate("stage1/block1")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pretraining"
    assert run(f"--config={CONFIG}", f"--workdir={folder}") == 0
    return folder


def test_a_corpus_without_a_target_is_a_study_and_keeps_the_epochs_that_were_asked_for(pretrained):
    arm = pretrained / "checkpoints" / "own-seed0"
    assert [path.name for path in sorted((arm / EPOCHS).iterdir())] == [epoch_file(n) for n in (1, 2, 3)]
    about = json.loads((arm / ABOUT).read_text())
    assert (about["epochs"], about["chosen_epoch"]) == (3, 3)
    last, adapted = (dict(readers.read(path)) for path in (arm / EPOCHS / epoch_file(3), arm / ADAPTED))
    assert all(np.array_equal(last[key], adapted[key]) for key in adapted)
    metadata = readers.read(arm / EPOCHS / epoch_file(1)).metadata
    assert (metadata[export.MODEL], metadata[export.LAST_GROUP]) == ("efficientnet_lite0", "stage1/block1")
    assert json.loads(metadata[export.ORIGIN])["epoch"] == 1
    assert not rows(pretrained / "results.jsonl") if (pretrained / "results.jsonl").exists() else True
    assert "other studies take them by" in (pretrained / "report.md").read_text()


def test_the_same_command_on_a_finished_pre_training_changes_nothing(pretrained):
    before = (pretrained / "ledger.jsonl").read_bytes()
    assert run(f"--config={CONFIG}", f"--workdir={pretrained}") == 0
    assert (pretrained / "ledger.jsonl").read_bytes() == before


def test_a_reference_loads_the_named_epoch_and_by_default_what_the_study_hands_over(pretrained):
    def loaded(reference):
        return flatten(locate.load(reference, Classifier(ENCODER, 1), seed=0)[0])

    first, best, last = (loaded(f"run:{pretrained}{at}") for at in ("@epoch=1", "", "@epoch=last"))
    path = "stem/conv/kernel"
    stored = readers.read(pretrained / "checkpoints" / "own-seed0" / EPOCHS / epoch_file(1))
    np.testing.assert_array_equal(first[path], stored[path])
    np.testing.assert_array_equal(best[path], last[path])
    assert not np.array_equal(first[path], best[path])


@pytest.mark.parametrize(
    ("at", "line"),
    [
        ("@epoch=7", "has no epoch 7; kept epochs: 1, 2, 3; epoch=best is the encoder that it hands over"),
        ("@strategy=ow,epoch=1", "no strategy 'ow'; did you mean 'own'?"),
        ("@seed=4", "no seed 4; expected one of 0"),
        ("@epochs=4", "did you mean 'epoch'?"),
        ("@epoch=first", "epoch is 'first'; expected a number, best, last or all"),
        ("@epoch=all", "3 epochs; expected one here (kept epochs: 1, 2, 3"),
        ("@epoch=all", "custom_strategies.NAME.weights and scoring.checkpoints take all of them"),
    ],
)
def test_a_reference_to_what_does_not_exist_lists_what_does(pretrained, at, line):
    with pytest.raises(UserError) as error:
        locate.find(f"run:{pretrained}{at}")
    assert line in str(error.value)


def test_a_reference_to_one_of_several_arms_lists_them(pretrained, tmp_path):
    for seed in (0, 1):
        folder = tmp_path / "checkpoints" / f"full-seed{seed}"
        folder.mkdir(parents=True)
        (folder / ADAPTED).touch()
    with pytest.raises(
        UserError, match=r"2 arms \(strategy=full,seed=0; strategy=full,seed=1\); expected one"
    ):
        RunReference.of(f"run:{tmp_path}").path()
    assert RunReference.of(f"run:{tmp_path}@seed=1").path() == tmp_path / "checkpoints/full-seed1" / ADAPTED
    with pytest.raises(UserError, match="holds no adapted encoder"):
        RunReference.of(f"run:{tmp_path / 'none'}").path()


def test_all_kept_epochs_are_arms_of_another_study(pretrained):
    config = default()
    config.custom_strategies.own = {"weights": f"run:{pretrained}@epoch=all", "cut_after": "stage1/block1"}
    config.strategies = ("none", "own")
    settings = strategies.expanded(resolve(config))
    assert settings.strategies == ("none", "own-epoch1", "own-epoch2", "own-epoch3")
    resolved = resolve_strategy("own-epoch2", registry.build("efficientnet_lite0"), settings)
    assert resolved.weights == f"run:{pretrained}@strategy=own,seed=0,epoch=2"


def test_phases_on_several_corpora_are_one_strategy_and_one_seed_serves_all(tmp_path, capsys):
    flags = (f"--config={CONFIG}:chain", f"--workdir={tmp_path}")
    assert run(*flags, "--config.mode=plan") == 0
    assert "each strategy once, with seed 7, for 2 seeds of the target tasks" in capsys.readouterr().out
    assert run(*flags) == 0
    ledger = [row for row in rows(tmp_path / "ledger.jsonl") if row["stage"] == "dapt"]
    assert [(row["phase"], row["seed"], row["images"]) for row in ledger] == [
        ("part1/textures", 7, 24),
        ("all", 7, 32),
    ]
    records = Records.read(tmp_path)
    assert records.seeds == [0, 1]
    flops = sum(row["model_flops"] for row in ledger)
    assert [cost.flops["dapt"] for cost in records.costs("own").values()] == [flops, flops]
    assert {row["seed"] for row in records.results} == {0, 1}


def test_a_study_without_target_or_adaptation_and_a_checkpoint_beyond_the_end_are_one_line(tmp_path, capsys):
    flags = (f"--config={CONFIG}", f"--workdir={tmp_path}", "--config.mode=plan")
    assert run(*flags, "--config.adapt.checkpoints=1,9") == 2
    assert "adapt.checkpoints holds 9; strategy 'own' has 3 epochs" in capsys.readouterr().err
    assert run(*flags, "--config.strategies=none,own") == 2
    assert "no target task, and none adapts nothing" in capsys.readouterr().err
    assert run(*flags, "--config.checkpoint_scoring.every=1") == 2
    assert "need images of a target task" in capsys.readouterr().err
