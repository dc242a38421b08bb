"""A workdir holds the truth of one study: what its results depend on may grow by arms, and may not change."""

import json
import shutil
import types

import jax
import numpy as np
import pytest

from dapt_jax.data.manifest import load_manifest
from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.settings import flags, resolve
from dapt_jax.study import contents, leakage, workdir
from dapt_jax.study.adapt import adapt
from dapt_jax.study.prepare import prepare
from dapt_jax.training.context import RunContext
from dapt_jax.weights import export
from tests import medical_files as write
from tests.command import ROOT, rows, run, write_config
from tests.configs import tiny_study

TINY = ROOT / "tests" / "configs" / "tiny_study.py"
WITH_SHORTER = f"""
import runpy


def get_config():
    config = runpy.run_path({str(TINY)!r})["get_config"]()
    config.custom_strategies.shorter = {{"cut_after": "stage1/block1"}}
    return config
"""
SMALL = ("--config.transfer.protocols=linear", "--config.tasks.cells.development.n=40")
FIXED = ("--config.cache.memory_mb=256", "--config.cache.disk_mb=0", "--config.data.cache_mb=64")
"""Budgets that otherwise follow the machine: without a workdir, of each moment."""


def weights(path, seed):
    encoder = registry.build("efficientnet_lite0")
    params, batch_stats = jax.device_get(Classifier(encoder, 1).init(seed))
    export.write(path, params, batch_stats, encoder)
    return path


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    return [weights(folder / f"{seed}.safetensors", seed) for seed in (0, 1)]


@pytest.fixture
def study(tmp_path, data, networks):
    """Prepares the study of a manifest, with weights of its own and of one strategy, as files say now."""
    for name in ("main", "own"):
        shutil.copy(networks[0], tmp_path / f"{name}.safetensors")

    def ready(*more):
        config = write_config(
            tmp_path,
            "config.strategies = ('none', 'mine')",
            # Budgets follow free memory, which changes from one call to the next; a study's first start fixes them.
            "config.cache.memory_mb = config.cache.disk_mb = config.data.cache_mb = 64",
            f"config.weights = '{tmp_path / 'main.safetensors'}'",
            f"config.custom_strategies.mine = {{'like': 'none', 'weights': '{tmp_path / 'own.safetensors'}'}}",
            *more,
        )
        settings, _ = flags.parse([f"--config={config}", f"--config.data_dir={data.folder}"])
        return prepare(settings)

    return ready


def replaced(tmp_path, name, networks):
    shutil.copy(networks[1], tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("name", "setting"), [("main", "weights"), ("own", "custom_strategies.mine.weights")]
)
def test_weights_replaced_under_their_name_are_refused_until_they_are_back(
    tmp_path, study, networks, name, setting
):
    folder = tmp_path / "workdir"
    workdir.claim(study(), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replaced(tmp_path, name, networks)
    with pytest.raises(UserError, match=rf"the file of {setting} \(\S+/{name}\.safetensors\) has other cont"):
        workdir.claim(study(), folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.copy(networks[0], tmp_path / f"{name}.safetensors")
    workdir.claim(study(), folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_weights_replaced_while_a_study_runs_are_refused_before_the_next_arm(tmp_path, study, networks):
    ready = study()
    context = RunContext(workdir=tmp_path / "workdir")
    arms = {arm.name: arm for arm in ready.arms}
    adapt(ready, arms["none"], context)
    replaced(tmp_path, "own", networks)
    adapt(ready, arms["none"], context)
    with pytest.raises(UserError, match=r"mine seed 0: \S+/own.safetensors was replaced while the study ran"):
        adapt(ready, arms["mine"], context)


def relabelled(data):
    row = next(number for number, line in enumerate(data.lines, 1) if line.endswith(",development"))
    labels = {line.split(",")[1] for line in data.lines[1:] if line.endswith(",development")}
    data.change(row, "label", next(iter(labels - {data.lines[row - 1].split(",")[1]})))


def redrawn(data):
    number = next(number for number, line in enumerate(data.lines, 1) if line.endswith(",external"))
    content = bytearray(data.image(number).read_bytes())
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    from PIL import Image

    data.spoil(number, bytes(content))  # of its own: the folder holds hard links
    Image.fromarray(pixels).save(data.image(number))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (relabelled, r"the labels of tasks\.cells\.development \(manifest\.csv\) are others now"),
        (redrawn, r"the images of tasks\.cells\.external \(manifest\.csv\) are others now"),
    ],
)
def test_data_changed_under_their_name_are_refused(tmp_path, data, study, change, words):
    folder, uncached = tmp_path / "workdir", "config.data.cache_mb = 0"
    workdir.claim(study(), folder)
    shutil.copytree(data.folder, tmp_path / "moved")  # new times, another place: the same contents
    workdir.claim(study(uncached, f"config.data_dir = '{tmp_path / 'moved'}'"), folder)
    change(data)
    with pytest.raises(UserError, match=words):
        workdir.claim(study(uncached), folder)


def test_a_list_of_leaks_changed_under_its_name_is_refused(tmp_path, data, study):
    double = next(line for line in data.lines if line.endswith(",development"))
    data.write([*data.lines, double.removesuffix("development") + "external"])
    setting, leaks = f"config.data.leaks = '{tmp_path / 'leaks.csv'}'", tmp_path / "leaks.csv"
    with pytest.raises(UserError, match="fill in its column decision"):
        study(setting)
    header, *found = leaks.read_text().splitlines()
    assert header.split(",")[-1] == "decision"

    def decide(word):
        leaks.write_text("\n".join([header, *(f"{line.rpartition(',')[0]},{word}" for line in found)]))
        return study(setting)

    workdir.claim(decide(leakage.MARK), tmp_path / "workdir")
    with pytest.raises(UserError, match=r"the file of data\.leaks \(\S+leaks\.csv\) has other contents now"):
        workdir.claim(decide("drop_eval"), tmp_path / "workdir")
    workdir.claim(decide(leakage.MARK), tmp_path / "workdir")


def test_a_workdir_of_earlier_code_is_accepted_with_the_same_weights_alone(tmp_path, study, networks):
    folder = tmp_path / "workdir"
    ready = study()
    workdir.claim(ready, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["contents"]
    old = json.dumps({**config, "images": ready.fingerprints()})
    (folder / "config.json").write_text(old)
    replaced(tmp_path, "main", networks)
    with pytest.raises(UserError, match="the file of weights "):
        workdir.claim(study(), folder)
    unnamed = "every parameter, by a version without fingerprints"
    (folder / "weights.txt").write_text(unnamed)
    workdir.claim(study(), folder)
    assert (folder / "weights.txt").read_text() == unnamed
    assert "contents" in json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "images": {"cells/external": "other"}}))
    with pytest.raises(UserError, match="images or labels of cells/external are others now"):
        workdir.claim(study(), folder)


def test_results_of_another_version_of_the_computation_are_refused(tmp_path, study, monkeypatch):
    folder, version = tmp_path / "workdir", contents.RESULTS_VERSION
    workdir.claim(study(), folder)
    of = r"results are of version {} of the computation, and this .* version {}"
    with monkeypatch.context() as patch:
        patch.setattr(contents, "RESULTS_VERSION", version + 1)
        with pytest.raises(UserError, match=of.format(version, version + 1)):
            workdir.claim(study(), folder)
    config = json.loads((folder / "config.json").read_text())
    del config["contents"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.jsonl").write_text(
        json.dumps(
            {
                "strategy": "none",
                "seed": 0,
                "task": "cells",
                "split": "external",
                "protocol": "linear",
                "metric": "auc",
                "value": 0.5,
            }
        )
        + "\n"
    )
    with pytest.raises(UserError, match=of.format(1, version)):  # of before versions were recorded
        workdir.claim(study(), folder)


def test_arms_whose_numbers_a_change_concerned_are_refused_and_no_others(tmp_path):
    config = tiny_study.get_config()
    config.strategies = ("truncated",)
    config.cache.memory_mb = config.cache.disk_mb = config.data.cache_mb = 64
    phase = {"name": "top", "epochs": 2, "trainable": ("stage2", "head"), "lr": 1e-3}
    for name, views in (("fixed", 2), ("new", 0)):
        arm = {"objective": "reconstruct", "phases": ({**phase, "views": views},)}
        config.custom_strategies[name] = {**arm, "cut_after": "stage2/block2"}

    def claim(*names):
        config.strategies = ("truncated", *names)
        workdir.claim(prepare(resolve(config)), tmp_path)

    def without_versions():
        of_before = json.loads((tmp_path / "config.json").read_text())
        of_before["contents"]["code"] = {"version": str(contents.RESULTS_VERSION)}
        (tmp_path / "config.json").write_text(json.dumps(of_before))

    claim("fixed")
    without_versions()
    claim("fixed", "new")  # an arm that is added has no earlier numbers
    claim("fixed", "new")
    without_versions()
    with pytest.raises(UserError, match=r"its strategy 'new' is of version 1 of the computation"):
        claim("fixed", "new")


def test_volumes_without_patients_that_have_moved_are_the_same(tmp_path):
    rng = np.random.default_rng(0)
    rows = ["image,label,patient"]
    for number in range(3):
        write.nifti(tmp_path / "a" / f"{number}.nii.gz", rng.integers(0, 999, (8, 8, 2)).astype(np.int16))
        patient = "P1" if number == 2 else ""
        rows += [f"{number}.nii.gz[{index}],{'xy'[index]},{patient}" for index in range(2)]
    (tmp_path / "a" / "m.csv").write_text("\n".join(rows))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    (tmp_path / "c" / "m.csv").write_text("\n".join(rows).replace("P1", "P2"))
    study = types.SimpleNamespace(scores=None)
    a, b, c = (contents._of_set(study, load_manifest(tmp_path / x / "m.csv", image_size=8)) for x in "abc")
    assert a == b
    assert {part for part in a if a[part] != c[part]} == {"patients and volumes"}


@pytest.mark.parametrize("found", [[], "x", {"weights": "x"}, {"weights": {"file": 1}}])
def test_damaged_contents_are_one_line(tmp_path, study, found):
    workdir.claim(study(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "contents": found}))
    with pytest.raises(UserError, match=r"config\.json: contents.* is .*; expected"):
        workdir.claim(study(), tmp_path)


# ---- arms that are added


def lines(folder):
    return (folder / "results.jsonl").read_text().splitlines()


@pytest.mark.parametrize("new", ["shorter", pytest.param("switching", marks=pytest.mark.long)])
def test_added_seeds_and_strategies_give_the_rows_of_a_study_that_had_them_from_the_start(
    tmp_path, capsys, refused, new
):
    (tmp_path / "config.py").write_text(WITH_SHORTER)
    at_once, grown = tmp_path / "at_once", tmp_path / "grown"

    def flags(strategies, seeds):
        names = f"--config.strategies={strategies}", f"--config.seeds={seeds}"
        return (f"--config={tmp_path / 'config.py'}", *SMALL, *names)

    both = flags(f"{new},truncated", "0,1")
    assert run(*flags(f"truncated,{new}", "0,1"), f"--workdir={at_once}") == 0
    assert run(*flags("truncated", "0"), f"--workdir={grown}") == 0
    first = lines(grown)
    capsys.readouterr()
    assert run(*both, "--config.mode=plan", f"--workdir={grown}") == 0
    planned = capsys.readouterr().out
    assert f"1 of 4 arms are done; left are {new} seed 0, {new} seed 1, truncated seed 1:" in planned
    assert "one seed of each strategy that is left; the study has 2" in planned
    assert run(*both, f"--workdir={grown}") == 0
    assert lines(grown)[: len(first)] == first
    assert sorted(lines(grown)) == sorted(lines(at_once))
    for name in ("truncated", new):
        assert f"| {name} |" in (grown / "report.md").read_text()
    assert {(row["strategy"], row["seed"]) for row in rows(grown / "ledger.jsonl")} == {
        (name, seed) for name in ("truncated", new) for seed in (0, 1)
    }
    assert run(*both, "--config.mode=plan", f"--workdir={grown}") == 0
    assert "4 of 4 arms are done; nothing is left" in capsys.readouterr().out
    refused(
        *flags(f"{new},truncated", "1"),
        workdir=grown,
        words=[
            "holds records of seed 0, which is not in seeds now; expected all of 0, 1 (others may be added)"
        ],
    )
    refused(
        *flags("truncated", "0,1"),
        workdir=grown,
        words=[f"holds records of strategy '{new}'", "or another --workdir"],
    )
    refused(
        *flags(f"{new},truncated", "0,1,2"),
        "--config.transfer.folds=3",
        workdir=grown,
        words=["transfer.folds was 2 there and is 3 now"],
    )


def test_an_arm_without_records_may_be_left_out_again_and_come_with_its_own_corpus(tmp_path, study):
    workdir.claim(study("config.corpus.kind = ''"), tmp_path / "workdir")
    wide = study(
        "config.strategies = ('none', 'mine', 'full', 'other')",
        "config.seeds = (3, 0)",
        "config.corpora.second = {**manifest, 'where': 'source=corpus'}",
        "config.custom_strategies.other = {'like': 'full', 'corpus': 'second'}",
    )
    workdir.claim(wide, tmp_path / "workdir")
    assert {"corpus", "corpora.second"} < set(
        json.loads((tmp_path / "workdir" / "config.json").read_text())["contents"]
    )
    assert [arm.title for arm in workdir.arms_left(wide, tmp_path / "workdir")] == [
        arm.title for arm in wide.arms
    ]
    workdir.claim(study(), tmp_path / "workdir")
    with pytest.raises(UserError, match=r"transfer\.folds was 3 there and is 4 now"):
        workdir.claim(study("config.transfer.folds = 4"), tmp_path / "workdir")


def test_strategies_that_compete_for_a_budget_cannot_be_added(tmp_path):
    def ready(strategies, seeds="0"):
        names = f"--config.strategies={strategies}"
        budget = ("--config.compute_budget=0.9", "--config.checkpoint_scoring.budget=0.9")
        score = "--config.checkpoint_selection.score=knn"
        settings, _ = flags.parse(
            [f"--config={TINY}", *SMALL, *FIXED, names, f"--config.seeds={seeds}", *budget, score]
        )
        return prepare(settings)

    workdir.claim(ready("truncated,switching"), tmp_path)
    workdir.claim(ready("truncated,switching", "0,1"), tmp_path)
    with pytest.raises(UserError, match="of which the one within compute_budget was chosen"):
        workdir.claim(ready("switching"), tmp_path)
