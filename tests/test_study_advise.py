"""`mode=advise` never says more than its evidence: on functions, and once from the command line."""

import dataclasses
import io
import re
from types import SimpleNamespace

import jax
import pytest

from benchmarks import evidence as page
from dapt_jax.errors import UserError
from dapt_jax.formatting import number
from dapt_jax.models import registry
from dapt_jax.records.ledger import Row
from dapt_jax.records.study_records import Records
from dapt_jax.settings import StrategySpec, default, resolve
from dapt_jax.settings.training import AdaptSettings
from dapt_jax.study import advise, built_in_strategies, evidence, prepare, speed
from dapt_jax.study.advise import Candidate
from tests.configs import tiny_study

FINDING = evidence.Finding(
    "a",
    "t",
    "images",
    "classes",
    "resnet18",
    "imagenet",
    "supervised",
    100,
    "partial",
    "",
    0.5,
    "outside",
    "auc",
    0.03,
    0.004,
    5,
)


def candidate(name, flops, gain=None, error=0.004):
    found = None if gain is None else evidence.pooled([dataclasses.replace(FINDING, gain=gain, error=error)])
    return Candidate(name, flops, flops, "" if name == "none" else "1 epoch", 0.5, found)


def test_the_cheapest_within_the_margin_of_the_best_is_chosen_among_those_shown_to_help():
    listed = [
        candidate("none", 1),
        candidate("full", 9, 0.05),
        candidate("partial", 5, 0.045),
        candidate("lora", 3, 0.02),
    ]
    assert advise.chosen(listed, margin=0.01).name == "partial"
    assert advise.chosen(listed, margin=0.001).name == "full"
    assert advise.chosen(listed, margin=0.1).name == "lora"


def test_what_is_not_shown_to_help_is_not_advised_and_no_evidence_is_no_advice():
    listed = [candidate("none", 1), candidate("full", 9, 0.005)]
    assert advise.chosen(listed, margin=0.01).name == "none"
    assert advise.chosen([candidate("none", 1), candidate("full", 9)], margin=0.01) is None


def test_one_of_many_strategies_is_not_shown_to_help_by_luck():
    lucky = candidate("full", 9, 0.012)  # t = 3 of five seeds: p .04
    assert lucky.gain.p == pytest.approx(0.04, abs=0.001)
    assert advise.chosen([candidate("none", 1), lucky], margin=0.01).name == "full"
    others = [candidate(f"other{number}", 5, 0.0) for number in range(11)]
    assert advise.chosen([candidate("none", 1), lucky, *others], margin=0.01).name == "none"


@pytest.mark.parametrize(
    "other",
    [
        {"kind": "masks"}, {"encoder": "vit_small"}, {"init": "random"}, {"objective": "distil"}, {"strategy": "full"},
        {"where": "inside"}, {"metric": "hd95"}, {"cut_after": "stage3/block2"}, {"share": 0.2}, {"share": 1.1},
    ],
)  # fmt: skip
def test_only_runs_of_the_same_kind_and_about_the_same_length_are_evidence(other):
    assert advise.evidence_for([FINDING], dataclasses.replace(FINDING, gain=0.0, share=0.6)) == [FINDING]
    assert advise.evidence_for([dataclasses.replace(FINDING, **other)], FINDING) == []


def test_arms_of_one_study_and_studies_of_the_same_images_are_one_piece_of_evidence():
    shares = (0.3, 0.5, 0.6, 0.6, 0.7)
    same = [dataclasses.replace(FINDING, share=share, seeds=n) for n, share in enumerate(shares)]
    elsewhere = dataclasses.replace(FINDING, study="b", data_set="others")
    like = dataclasses.replace(FINDING, share=0.61)
    assert advise.evidence_for([*same, elsewhere], like) == [same[3], elsewhere]


BODY = ("stage7", "top", "head")
LITE, VIT = registry.build("efficientnet_lite0"), registry.build("vit_small")


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ([("head",), ("*",)], "full"),
        ([("stem", "stage*", "top", "head")], "full"),
        ([("*",), ("*",)], "full"),
        ([("head",), BODY], "partial"),
        ([("head",), BODY, ("*", "head")], "hybrid"),
        ([BODY, ("stage6", *BODY), ("*",)], "gradual"),
        ([("stage6:lora", "head"), ("*",)], "lora+full"),
        ([("stage6:lora", *BODY)], "explora"),
        ([("*:norm", "head")], "norm_tuning"),
        ([("*:bias", "head")], "bitfit"),
        # One kind of array by its name, the first layers, a kind in one group and more: nothing that has evidence.
        ([("*/bias", "head")], ""),
        ([("stem", "head")], ""),
        ([("stage1", "head")], ""),
        ([("stage6", "*:bias", "head")], ""),
        ([("*:norm", "*:kernel", "head")], ""),
        ([BODY, ("*",), BODY], ""),
        ([("stage6:lora", "head"), ("*",), ("stage6:lora", "head")], ""),
        ([("stage9", "head")], ""),
        ([("head:bias",)], ""),
        ([("head",)], ""),
        ([], ""),
    ],
)
def test_a_custom_strategy_is_told_by_what_it_trains(trained, expected):
    assert built_in_strategies.built_in_like(trained, LITE) == expected


def test_attention_and_cuts_are_told_by_what_they_train():
    name = built_in_strategies.built_in_like
    assert name([("block9..12/attention/project", "head")], VIT) == "attention_output"
    assert name([("block9..12/attention/qkv", "head")], VIT) == ""
    assert name([("block12/attention/project:rows", "head")], VIT) == "apla"
    cut = LITE.truncate("stage3/block2")
    assert name([("head",), ("*",)], cut, is_cut=True) == "simplified"
    assert name([("stage3", "head")], cut, is_cut=True) == ""
    for built_in in ("full", "partial", "hybrid", "gradual", "lora", "bitfit", "norm_tuning", "explora"):
        settings = AdaptSettings(epochs=4, peft_groups=2, partial_groups=3)
        phases = built_in_strategies.STRATEGIES[built_in].phases(LITE, settings)
        assert name([each.trainable for each in phases], LITE) == built_in


def test_phases_on_several_corpora_are_no_evidence_and_names_do_not_count():
    spec = StrategySpec.from_config(
        {"phases": [{"name": "a", "epochs": 1, "trainable": ["*"], "lr": 0.1}]}, "x"
    )
    assert evidence.resembled("partial_10", spec, LITE, False) == "full"
    elsewhere = dataclasses.replace(spec.phases[0], corpus="natural", name="b")
    several = dataclasses.replace(spec, phases=(elsewhere, *spec.phases))
    assert evidence.resembled("full", several, LITE, False) == ""


def test_a_study_without_labels_is_priced_without_a_share_of_full(capsys):
    config = tiny_study.get_config()
    config.mode = "advise"
    config.advise.tflop = 1.0
    config.strategies = ("none", "ours")
    config.custom_strategies = {"ours": {"like": "partial", "objective": "reconstruct"}}
    advise.show(prepare.prepare(resolve(config)))
    said = capsys.readouterr().out
    assert re.search(r"\n  ours: .*partial.* TFLOP.*; no evidence\n", said)


def test_one_study_is_pooled_by_its_seeds_and_several_by_random_effects():
    alone = evidence.pooled([FINDING])
    alone = alone.difference
    assert (alone.low, alone.high) == pytest.approx((0.03 - 2.776 * 0.004, 0.03 + 2.776 * 0.004), abs=1e-5)
    both = evidence.pooled([FINDING, dataclasses.replace(FINDING, study="b", data_set="others", gain=-0.03)])
    assert both.difference.mean == pytest.approx(0, abs=1e-9)
    assert both.difference.low < -0.3
    assert evidence.pooled([]) is None


def test_the_shipped_summary_is_what_the_committed_records_say():
    text = io.StringIO()
    evidence.write(page.summary(page.ROOT / "docs"), text)
    assert evidence.FILE.read_text() == text.getvalue(), "run python -m benchmarks.evidence --summary"
    assert evidence.shipped()[0].strategy == "full"


def test_a_gain_is_positive_where_it_is_better_and_a_share_is_no_other_strategy():
    rows, ledger = [], []
    for name, level in (("none", 5.0), ("full", 4.0), ("partial_10", 4.5)):
        for seed in (0, 1):
            key = {"task": "t", "split": "test", "protocol": "frozen", "metric": "hd95"}
            rows.append({**key, "strategy": name, "seed": seed, "value": level + 0.1 * seed * (1 + level)})
            cost = {"full": 100, "partial_10": 10}.get(name, 0)
            ledger.append(Row(name, seed, "dapt", "p", model_flops=cost))
    config = {
        "model": {"name": "resnet18"},
        "strategies": ["none", "full", "partial_10"],
        "seeds": [0, 1],
        "report": {"metric": "hd95"},
        "custom_strategies": {"partial_10": {"like": "partial", "compute_budget": 0.1}},
    }
    full, partial = evidence.findings(Records(config, rows, ledger), "s")
    assert (full.strategy, partial.strategy, partial.share, partial.kind) == ("full", "partial", 0.1, "masks")
    assert full.gain == pytest.approx(1.05)


@pytest.mark.parametrize(("backend", "times"), [("gpu", 8), ("cpu", 1)])
def test_a_budget_of_hours_is_what_the_plan_takes_for_them_on_as_many_devices(monkeypatch, backend, times):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(speed, "of_machine", lambda *_: speed.Speed(1e12, 0.0))
    config = default()
    config.advise.hours = 3.0
    encoder = registry.build("resnet18")
    study = SimpleNamespace(strategies=[SimpleNamespace(encoder=encoder)])
    flops, words = advise.budget_flops(resolve(config), study)
    assert flops == pytest.approx(times * 3 * 3600e12)
    assert f"about {number(flops / 1e12)} TFLOP on this machine" in words
    assert speed.line(flops, encoder, "float32", 0.0).startswith("time: about 3.0 h ")


def test_a_study_without_one_budget_is_refused_in_one_line(tmp_path):
    config = default()
    for values in ({}, {"tflop": 1.0, "hours": 1.0}):
        config.advise.update({"tflop": 0.0, "hours": 0.0, **values})
        with pytest.raises(
            UserError, match=rf"^mode=advise has {len(values)} budgets; expected one for one seed"
        ):
            advise.budget_flops(resolve(config), None)
    with pytest.raises(UserError, match="no such file"):
        evidence.of_folders([str(tmp_path)])
    with pytest.raises(UserError, match=r"advise\.records: .* has no two seeds of both none and full"):
        evidence.of_folders([str(page.ROOT / "docs" / "wbc_pretraining")])


def test_without_evidence_the_command_says_so(capsys):
    config = tiny_study.get_config()
    config.mode = "advise"
    config.advise.tflop = 0.01
    advise.show(prepare.prepare(resolve(config)))
    said = capsys.readouterr().out
    assert "cells: no evidence. No study of ours has efficientnet_lite0 with these weights, classes" in said
    assert "switching: head" in said
