"""Typed settings and the config that users write are one thing; former names are answered; shipped configs stay as they are."""

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from dapt_jax import main, settings
from dapt_jax.errors import UserError
from dapt_jax.settings import (
    RENAMED,
    StudySettings,
    default,
    flags,
    flat,
    from_json,
    resolve,
    to_configdict,
    to_dict,
)
from dapt_jax.settings.defaults import OPEN, declared, differences
from tests.command import QUICKSTART, REQUIRED_ARGUMENTS, ROOT, write_config

GOLDEN = Path(__file__).parent / "golden" / "settings"
DECLARED = declared()
LEAVES = flat(to_dict(StudySettings()))
FORMER = (GOLDEN / "names_of_dd5ee80.txt").read_text().split()


def test_the_defaults_come_back_from_the_config_that_is_made_of_them():
    assert resolve(default()) == StudySettings()
    assert to_dict(resolve(default())) == to_dict(StudySettings())
    assert set(flat(default())) == set(LEAVES)


@st.composite
def changes(draw):
    """Some settings with other valid values; those that one alone can hold."""
    names = [
        name
        for name in LEAVES
        if name in DECLARED and not name.startswith(("transfer.finetune.folds", "corpus"))
    ]
    return {
        name: draw(valid(name)) for name in draw(st.lists(st.sampled_from(names), max_size=4, unique=True))
    }


def valid(name):
    constraint, standard = DECLARED[name], LEAVES[name]
    if constraint.choices:
        return st.sampled_from(constraint.choices)
    if isinstance(standard, bool):
        return st.booleans()
    if not isinstance(standard, int | float):
        return st.just(standard)
    low = constraint.above if constraint.at_least is None else constraint.at_least
    high = constraint.below if constraint.at_most is None else constraint.at_most
    if isinstance(standard, int):
        return st.integers(int(low or 0), int(high or 1000))
    bounds = {"exclude_min": constraint.above is not None, "exclude_max": constraint.below is not None}
    return st.floats(low or 0.0, high or 1e6, **{key: value for key, value in bounds.items() if value})


@given(changes())
@hypothesis_settings(deadline=None, max_examples=60)
def test_what_is_set_is_what_is_resolved_and_comes_back(changed):
    config = default()
    config.update_from_flattened_dict(changed)
    try:
        resolved = resolve(config)
    except UserError:  # two settings at odds with one another, such as a loss and a parameter of another
        assume(False)
    there = flat(to_dict(resolved))
    assert {name: there[name] for name in changed} == changed
    assert {name: value for name, value in there.items() if name not in changed} == {
        name: value for name, value in LEAVES.items() if name not in changed
    }
    assert resolve(to_configdict(resolved)) == resolved
    assert from_json(json.loads(json.dumps(to_dict(resolved)))) == resolved


def beyond(name):
    """Values just outside the range of a setting."""
    constraint, standard = DECLARED[name], LEAVES[name]
    step = 1 if isinstance(standard, int) else 1e-6
    bounds = (
        (constraint.at_least, -step),
        (constraint.above, 0),
        (constraint.at_most, step),
        (constraint.below, 0),
    )
    return [bound + away for bound, away in bounds if bound is not None]


RANGED = [name for name in LEAVES if name in DECLARED and beyond(name)]


@pytest.mark.parametrize("name", RANGED)
def test_a_number_outside_its_range_is_refused_by_its_dotted_name(name):
    is_whole = isinstance(LEAVES[name], int)
    for value in [type(LEAVES[name])(each) for each in beyond(name)] + (
        [] if is_whole else [math.nan, math.inf]
    ):
        config = default()
        config.update_from_flattened_dict({name: value})
        with pytest.raises(UserError, match=f"^{name} is .*; expected {DECLARED[name].range}"):
            resolve(config)


@pytest.mark.parametrize("name", [name for name in LEAVES if name in DECLARED and DECLARED[name].choices])
def test_an_unknown_choice_is_refused_with_the_nearest(name):
    config = default()
    nearest = max(DECLARED[name].choices, key=len)
    config.update_from_flattened_dict({name: nearest[:-1] + "x" if len(nearest) > 3 else "x"})
    with pytest.raises(UserError, match=f"^unknown {name} '.*'; (did you mean|valid: ).*"):
        resolve(config)


def test_every_number_has_a_range_and_every_setting_a_doc():
    assert [name for name, constraint in DECLARED.items() if not constraint.doc] == []
    free = [
        name
        for name, value in LEAVES.items()
        if name in DECLARED
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and name not in RANGED
    ]
    # What these may be depends on the encoder or on other settings, and is checked where it is known.
    assert free == [
        "adapt.warmup",
        "adapt.partial_groups",
        "adapt.hybrid_epochs",
        "adapt.gradual_steps",
        "transfer.finetune.test_crops",
    ]


def test_help_says_what_every_setting_does():
    usage = flags.usage()
    for name in LEAVES:
        assert f"  --config.{name}=" in usage
    words = " ".join(usage.split())
    for name, constraint in DECLARED.items():
        assert " ".join(constraint.doc.split()) in words, name


# ---- former names
# -------------------------------------------------------------------------------------------------


def test_no_setting_of_a_former_version_is_lost():
    for name in FORMER:
        assert (name in LEAVES) + (name in RENAMED) + (name in settings.REMOVED) == 1, name
    assert all(new in LEAVES or new in OPEN for new in RENAMED.values())
    assert len(FORMER) == 236


@pytest.mark.parametrize("name", [*RENAMED, *settings.REMOVED])
def test_a_former_name_on_the_command_line_is_answered_with_the_present_one(name):
    with pytest.raises(UserError) as refused:
        flags._check_names([f"--config.{name}=1"], LEAVES)
    line = str(refused.value)
    assert repr(name) in line
    assert "\n" not in line
    assert repr(RENAMED[name]) in line if name in RENAMED else repr(settings.REMOVED[name]) in line


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("config.score.every = 3", "'score.every' is called 'checkpoint_scoring.every' now"),
        ("config.select = 'robustness'", "'select' is called 'checkpoint_selection.score' now"),
        ("config.adapt.loss = 'focal'", "'adapt.loss' is called 'adapt.loss.name' now"),
        ("config.phases.mine = {}", "'phases' is called 'custom_strategies' now"),
        (
            "adapt = config.adapt; adapt.accumulate = 2",
            "'adapt.accumulate' is called 'adapt.grad_accum_steps'",
        ),
        ("config.adapt.update({'early_stop': 3})", "'transfer.finetune.early_stop' is called"),
    ],
)
def test_a_former_name_in_a_config_file_is_answered_with_the_present_one(tmp_path, line, words):
    path = write_config(tmp_path, line)
    with pytest.raises(UserError) as refused:
        flags.read(str(path))
    assert words in str(refused.value)
    assert f"{path}:20: " in str(refused.value)


def test_a_former_import_is_answered_with_the_present_one(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("from dapt_jax.config import default\n")
    with pytest.raises(
        UserError, match=r"config.py:1: .*dapt_jax.config; expected from dapt_jax.settings import default"
    ):
        flags.read(str(path))


def test_a_config_of_a_former_version_is_read():
    values = json.loads((ROOT / "docs" / "brain_mri_segmentation" / "config.json").read_text())
    values.pop("images")
    there = from_json(values)
    former = ("--config.seeds=0", "--config.cache.memory_mb=2048", "--config.cache.disk_mb=8192")
    now, _ = flags.parse([f"--config={ROOT}/configs/brain_mri_segmentation.py", *former])
    # Layer norm was frozen with batch norm then: the study is another one where a model has it.
    runs = ("adapt", "transfer.finetune", "transfer.segmentation")
    assert list(differences(now, there)) == [(f"{run}.layer_norm", "train", "frozen") for run in runs]
    with pytest.raises(
        UserError, match=r"'adapt\.plateau\.threshold' is no setting any more; its value is 0\.0001"
    ):
        from_json({"adapt": {"plateau": {"threshold": 0.5}}})


def test_settings_that_do_not_change_results():
    free = {name for name, constraint in DECLARED.items() if not constraint.affects_results}
    sections = {
        "runtime",
        "monitoring",
        "non_finite",
        "energy",
        "report",
        "advise",
        "aot",
        "plan",
        "scoring",
        "predict",
    }
    assert {name.partition(".")[0] for name in free if "." in name} == {
        *sections,
        "data",
        "cache",
        "transfer",
    }
    assert {name for name in free if name.partition(".")[0] not in sections} == {
        "mode",
        "transfer.keep",
        "compare",
        "embed_level",
        "data_dir",
        "data.cache_mb",
        "data.max_image_mb",
        "data.threads",
        "data.stall_s",
        "cache.dir",
    }
    one, other = (resolve(changed("runtime.fsdp", value)) for value in (1, 2))
    assert list(differences(one, other)) == []
    assert [name for name, *_ in differences(one, resolve(changed("adapt.lr", 1.0)))] == ["adapt.lr"]


def changed(name, value):
    config = default()
    config.update_from_flattened_dict({name: value})
    return config


# ---- what is shipped
# ----------------------------------------------------------------------------------------------

ARMS = {
    "taher2021": ("shenzhen,imagenet", "drive,random", "chexpert,imagenet->chestxray14"),
    "hidy2024": ("idrid,swin,advanced", "acdc+idrid,resnet50,simple"),
    "mehmood2022": ("f1b,manifest,tumour+disease",),
    "own_images": ("unlabelled=scans,target=cases",),
}
SHIPPED = {
    f"{path.stem}{'_' + arm.replace(',', '-').replace('->', '-to-') if arm else ''}": f"{path}{':' + arm if arm else ''}"
    for path in sorted((ROOT / "configs").glob("*.py"))
    for arm in (REQUIRED_ARGUMENTS.get(path.stem, ""), *ARMS.get(path.stem, ()))
}


def text_of(spec):
    """What a config changes, as text."""
    resolved, _ = flags.parse([f"--config={spec}"])
    lines = settings.to_text(resolved).splitlines()
    standard = set(settings.to_text(StudySettings()).splitlines())
    return "".join(f"{line}\n" for line in lines if line not in standard)


@pytest.mark.parametrize("name", ["default", *SHIPPED])
def test_a_shipped_config_resolves_to_what_it_did(name, request):
    """Where a change is meant, `REGENERATE=1 pytest tests/test_settings.py` writes the files again."""
    text = settings.to_text(StudySettings()) if name == "default" else text_of(SHIPPED[name])
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("REGENERATE"):
        path.write_text(text)
    assert path.read_text() == text


def test_the_shipped_help_is_that_of_the_settings():
    """`REGENERATE=1 pytest tests/test_settings.py` writes it again."""
    path = ROOT / "dapt_jax" / "settings" / "help.txt"
    if os.environ.get("REGENERATE"):
        path.write_text(f"{flags.usage()}\n")
    assert main.help_text() == f"{flags.usage()}\n"


def test_no_shipped_config_unlocks_what_guards_against_misspelling():
    for path in (ROOT / "configs").glob("*.py"):
        assert "unlock" not in path.read_text()
    assert flags.read(str(QUICKSTART)).is_locked
