"""The shipped studies of docs/evidence.md are what the page says: arms, seeds, refusals."""

import importlib.util
from pathlib import Path

import jax
import pytest

from dapt_jax.errors import UserError
from dapt_jax.models.registry import build
from dapt_jax.models.segmenter import Segmenter
from dapt_jax.parameters import Kind
from dapt_jax.settings import resolve
from dapt_jax.study import strategies
from dapt_jax.training import patterns
from dapt_jax.training.freezing import resolve_trainable

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "evidence"
STUDIES = {"brain_mri": (41, 5), "brain_mri_segmentation": (18, 3), "blood": (19, 5), "chest": (41, 5)}
"""Arms and seeds."""


def get_config(name, *argument):
    spec = importlib.util.spec_from_file_location(f"evidence_{name}", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_its_arms_and_seeds_for_both_encoders(name):
    for encoder in ("", "vit_small_dinov2"):
        settings = resolve(get_config(name, encoder and f"{encoder},1,10"))
        assert "full" in settings.strategies
        assert "full_10" in settings.strategies
        whole = build(settings.model.name)
        arms = [strategies.resolve(each, whole, settings) for each in settings.strategies]
        for arm in arms:
            network = patterns.with_lora(arm.encoder, arm.phases, settings.adapt.lora)
            kinds = {**network.kinds, "head/kernel": Kind.DENSE_KERNEL, "head/bias": Kind.BIAS}
            for phase in arm.phases:
                assert resolve_trainable(phase, (*network.groups, "head"), kinds).trainable
        for task in settings.tasks.values():
            if task.development.get("segments"):
                shape = (1, settings.model.image_size, settings.model.image_size, 3)
                segmenter = Segmenter(whole, 1, settings.transfer.segmentation.decoder)
                jax.eval_shape(segmenter, *segmenter.abstract(), jax.ShapeDtypeStruct(shape, "uint8"))
        budgets = {arm.name: arm.compute_budget for arm in arms}
        assert budgets["partial_10"] == 0.1
        assert budgets["full"] == budgets["none"] == 0
        if not encoder:
            assert (len(arms), len(settings.seeds)) == STUDIES[name]


def test_the_paper_s_arms_are_those_of_its_config_at_a_twenty_fifth():
    paper = importlib.util.spec_from_file_location("mehmood2022", CONFIGS.parent / "mehmood2022.py")
    module = importlib.util.module_from_spec(paper)
    paper.loader.exec_module(module)
    config = get_config("mehmood2022")
    settings = resolve(config)
    assert (len(settings.strategies), len(settings.seeds)) == (10, 5)
    encoder = build(settings.model.name)
    for name, spec in module.ARMS.items():
        if name == "imagenet":
            continue
        own = config.custom_strategies[name]
        assert [phase["epochs"] for phase in own.get("phases", ())] == [
            phase["epochs"] // 25 for phase in spec.get("phases", ())
        ]
        assert ("cut_after" in own) == ("cut_after" in spec)
        if "cut_after" in own:
            cut = encoder.specs[encoder.index(own["cut_after"])]
            of_paper = build("resnet50_keras")
            assert cut.reduction == of_paper.specs[of_paper.index(spec["cut_after"])].reduction
        strategies.resolve(name, encoder, settings)


def test_no_share_and_no_encoder_are_refused_with_what_is_valid():
    with pytest.raises(UserError, match=r"chest\.py:resnet: 'resnet'; .*efficientnet_lite0"):
        get_config("chest", "resnet")
    for share in ("0", "100", "ten"):
        with pytest.raises(UserError, match=rf"share '{share}'; expected percentages"):
            get_config("chest", f"efficientnet_lite0,{share}")
