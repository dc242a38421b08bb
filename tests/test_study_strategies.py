"""Arms with weights and a corpus of their own: continual pre-training of several kinds in one study."""

import json

import pytest

from dapt_jax.errors import UserError
from dapt_jax.settings import StrategySpec, StudySettings, default, from_json, resolve
from dapt_jax.study import adapt, strategies
from dapt_jax.study.arms import Arm, Study
from tests import command, tiny

LINES = (
    "    config.unlock()",
    "    config.custom_strategies.chained = {'like': 'partial', 'corpus': 'other', 'weights': 'random'}",
    "    config.custom_strategies.scratch = {'weights': 'random', 'phases': ()}",
    "    config.corpora.other = {'kind': 'phantoms', 'name': 'corpus', 'n': 24, 'seed': 1, 'val_fraction': 0.25}",
    "    return config",
)


def test_an_arm_starts_from_its_weights_and_sees_its_corpus(tmp_path):
    path = tmp_path / "chained.py"
    path.write_text(command.QUICKSTART.read_text().replace("    return config", "\n".join(LINES)))
    flags = command.small("--config.strategies=partial,chained,scratch", "--config.seeds=0")
    assert command.run(f"--config={path}", *flags[1:], f"--workdir={tmp_path / 'run'}") == 0
    about = {
        name: json.loads((tmp_path / "run" / "checkpoints" / f"{name}-seed0" / "adapted.json").read_text())
        for name in ("partial", "chained")
    }
    assert (about["partial"]["images"], about["chained"]["images"]) == (48, 24)
    assert about["chained"]["source"].startswith("random")
    assert not about["partial"]["source"].startswith("random")
    ledger = command.rows(tmp_path / "run" / "ledger.jsonl")
    trained = {row["strategy"]: row["images"] for row in ledger if row["phase"] == "partial"}
    assert trained["chained"] <= 18 < trained["partial"]  # a quarter of its own corpus is watched
    inits = {row["strategy"]: row["init"] for row in command.rows(tmp_path / "run" / "results.jsonl")}
    assert (inits["partial"], inits["chained"], inits["scratch"]) == ("imagenet", "random", "random")


def test_an_arm_without_phases_has_its_own_weights():
    settings = StudySettings(custom_strategies={"scratch": StrategySpec(weights="random")})
    scratch = strategies.resolve("scratch", settings.model.encoder(), settings)
    adapted = adapt.adapt(Study(settings, (scratch,)), Arm(scratch, 0), None)
    assert adapted.source.startswith("random")


def test_a_strategy_that_cuts_says_where_it_may_and_how_to_do_without_it():
    with pytest.raises(
        UserError, match=r"needs --config\.adapt\.cut_after.*valid: .*strategies without 'simplified'"
    ):
        strategies.resolve("simplified", tiny.encoder(), StudySettings())


def test_what_an_arm_of_ones_own_cannot_be():
    config = default()
    config.corpora.chest = {"kind": "phantoms"}
    cases = {
        "no corpus 'chets' in corpora; did you mean 'chest'": {"like": "full", "corpus": "chets"},
        "without phases of its own": {"like": "full", "phases": ({"name": "a"},)},
        "has no setting 'corpora'": {"corpora": "chest"},
        "has no list of phases": {"corpus": "chest"},
    }
    for words, entry in cases.items():
        config.custom_strategies.own = entry
        with pytest.raises(UserError, match=words):
            strategies.resolve("own", tiny.encoder(), resolve(config))


@pytest.mark.parametrize(
    ("norm", "layer_norm"), [("frozen", "frozen"), ("stats", "frozen"), ("train", "train")]
)
def test_a_workdir_of_an_earlier_version_says_what_its_norm_meant_for_layer_norm(norm, layer_norm):
    phase = {"name": "a", "epochs": 1, "trainable": ["*"], "lr": 1e-3}
    old = {
        "adapt": {"norm": norm},
        "phases": {
            "mine": {"phases": [{**phase, "norm": norm, "rates": [["head", 2.0]]}]},
            "paired": {"phases": [{**phase, "norm": [["stem", norm]]}]},
        },
    }
    settings = from_json(old)
    assert (settings.adapt.batch_norm, settings.adapt.layer_norm) == (norm, layer_norm)
    assert settings.transfer.finetune.layer_norm == "train"
    (mine,), (paired,) = (settings.custom_strategies[name].phases for name in ("mine", "paired"))
    assert (mine.batch_norm, mine.layer_norm, mine.lr_multipliers) == (norm, layer_norm, (("head", 2.0),))
    assert (paired.batch_norm, paired.layer_norm) == (
        (("stem", norm),),
        (("*", "frozen"), ("stem", layer_norm)),
    )
