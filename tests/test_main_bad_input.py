"""Bad input: one line that names the place, what was expected and the nearest valid choice; exit code 2; nothing run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dapt_jax.data import phantoms
from dapt_jax.models import registry
from dapt_jax.monitoring.heartbeat import STATUS
from dapt_jax.settings import flat, to_dict
from dapt_jax.weights import export
from tests.command import QUICKSTART, ROOT, run, small, write_config

# ---- flags and settings
# -------------------------------------------------------------------------------------------

SETTINGS = {
    "a setting misspelt": ("--config.stratgies=full", "no setting 'stratgies'", "'strategies'"),
    "a setting misspelt below": ("--config.model.imge_size=3", "no setting 'model.imge_size'", "'model.image_size'"),
    "a setting without its section": ("--config.epochs=3", "no setting 'epochs'", "'adapt.epochs'"),
    "a section": ("--config.adapt=3", "--config.adapt is a section", "--config.adapt.balance_classes"),
    "a flag without config.": ("--epochs=3", "no flag '--epochs'", "'--config.adapt.epochs'"),
    "a flag misspelt": ("--workdr=x", "no flag '--workdr'", "'--workdir'"),
    "a value of the wrong type": ("--config.adapt.epochs=many", "--config.adapt.epochs=many", "a whole number, such as 3"),
    "a number that is not whole": ("--config.adapt.epochs=2.5", "--config.adapt.epochs=2.5", "a whole number"),
    "a truth value that is none": ("--config.synthetic=perhaps", "--config.synthetic=perhaps", "true or false"),
    "a flag without value": ("--config.adapt.epochs", "--config.adapt.epochs has no value", "a whole number, such as 3"),
    "a stray word": ("full", "unexpected argument 'full'", "--config.SETTING=VALUE"),
    "a strategy": ("--config.strategies=none,fll", "unknown strategy 'fll'", "'full'"),
    "no strategy": ("--config.strategies=", "strategies is ()", "one or more, each once"),
    "an empty tuple": ("--config.strategies=()", "strategies is ()", "one or more, each once"),
    "a strategy twice": ("--config.strategies=none,none", "('none', 'none')", "each once"),
    "a strategy that is no name": ("--config.strategies=(None,)", "strategies is (None,)", "names as text"),
    "a seed twice": ("--config.seeds=0,0", "seeds is (0, 0)", "each once"),
    "a seed below 0": ("--config.seeds=-1", "seeds holds -1", "whole numbers from 0"),
    "a seed that is no number": ("--config.seeds=a,b", "seeds holds 'a'", "whole numbers"),
    "a model": ("--config.model.name=resnet5", "no model 'resnet5'", "'resnet50'"),
    "a dtype": ("--config.model.dtype=float16", "model.dtype 'float16'", "'bfloat16'"),
    "an image size": ("--config.model.image_size=0", "model.image_size is 0", "8 or more"),
    "a mode": ("--config.mode=pan", "mode 'pan'", "'plan'"),
    "a protocol": ("--config.transfer.protocols=liner", "protocol 'liner'", "'linear'"),
    "a protocol of the report": ("--config.report.protocol=mlp_large", "'mlp_large'", "'linear'"),
    "a region": ("--config.energy.region=frence", "energy.region 'frence'", "'france'"),
    "a place that gives energy": ("--config.energy.pue=0.5", "energy.pue is 0.5", "1 or more"),
    "a protocol of the report that no task has": ("--config.report.protocol=finetune", "which no task has", "'linear'"),
    "a metric of the report that no task has": ("--config.report.metric=dice", "'dice', which no task has", "'auc'"),
    "a metric of no class": ("--config.report.metric=auc/neutrophile", "which no task has", "'auc/neutrophil'"),
    "a metric of the report": ("--config.report.metric=aux", "report.metric 'aux'", "'auc'"),
    "a baseline": ("--config.transfer.baseline=gradient", "transfer.baseline 'gradient'", "'mean_gradient'"),
    "a cache mode": ("--config.cache.mode=of", "cache.mode 'of'", "'off'"),
    "an optimizer": ("--config.adapt.optimizer.name=adm", "adapt.optimizer.name 'adm'", "'adam'"),
    "another optimizer": ("--config.transfer.finetune.optimizer.name=sdg", "transfer.finetune.optimizer.name", "'sgd'"),
    "a schedule": ("--config.adapt.schedule=cosin", "adapt.schedule 'cosin'", "'cosine'"),
    "a mode of batch norm": ("--config.adapt.batch_norm=frozn", "adapt.batch_norm 'frozn'", "'frozen'"),
    "a mode of layer norm": ("--config.adapt.layer_norm=stats", "adapt.layer_norm 'stats'", "'train'"),
    "a flip": ("--config.adapt.augment.flip=horizntal", "adapt.augment.flip 'horizntal'", "'horizontal'"),
    "what to do with bad images": ("--config.data.on_bad_image=skp", "data.on_bad_image 'skp'", "'skip'"),
    "a batch of none": ("--config.adapt.batch_size=0", "adapt.batch_size is 0", "1 or more"),
    "a held-out share of all": ("--config.corpus.val_fraction=1.0", "corpus.val_fraction is 1.0", "0 to less than 1"),
    "a held-out share below none": ("--config.corpus.val_fraction=-0.1", "corpus.val_fraction", "0 to less than 1"),
    "a rate that is no number": ("--config.adapt.lr=nan", "adapt.lr is nan", "more than 0"),
    "a rate without bound": ("--config.adapt.lr=inf", "adapt.lr is inf", "more than 0, a finite number"),
    "a margin without bound": ("--config.report.margin=inf", "report.margin is inf", "0 or more, a finite number"),
    "one of several numbers without bound": ("--config.transfer.head.grid.lr=(.1,1e999)", "(0.1, inf)", "finite"),
    "one fold": ("--config.transfer.folds=1", "transfer.folds is 1", "2 or more"),
    "more folds than patients": ("--config.transfer.folds=20", "leukocytes development", "20 patients", "transfer.folds"),
    "more fine-tuned folds than folds": ("--config.transfer.finetune.folds=9", "transfer.finetune.folds", "1 to"),
    "a loss": ("--config.transfer.head.loss.name=focl", "unknown transfer.head.loss.name 'focl'", "'focal'"),
    "a loss of other labels": ("--config.adapt.loss.name=bce", "loss 'bce' is of independent outputs", "expected 'ce'"),
    "a share of itself above all": ("--config.adapt.mix.switch=2", "adapt.mix.switch is 2", "0 to 1"),
    "an end by nothing watched": ("--config.transfer.finetune.early_stopping_patience=3", "needs rows", "val_fraction"),
    "five crops": ("--config.transfer.finetune.test_crops=5", "test_crops is 5", "expected 1 or 10"),
    "more warm-up than epochs": ("--config.adapt.warmup=10", "phase 'full'", "warmup is 10.0", "0 to 1"),
    "too many groups": ("--config.adapt.partial_groups=99", "adapt.partial_groups is 99", "1 to 18"),
    "a group of another model": ("--config.adapt.cut_after=block4", "adapt.cut_after is 'block4', a layer", "'simplified'"),
    "a kind of data": ("--config.corpus.kind=phantom", "corpus: no kind 'phantom'", "'phantoms'"),
    "no corpus": ("--config.corpus.kind=", "strategy 'full' adapts", "corpus.kind"),
    "a set of phantoms": ("--config.corpus.name=corps", "corpus: phantoms: no set 'corps'", "'corpus'"),
    "the target's images as corpus": ("--config.corpus.name=development", "48 images are in both", "corpus"),
    "other classes outside": ("--config.tasks.leukocytes.external.name=corpus", "external has the classes ery", "neutr"),
    "weights that are not there": ("--config.weights=weights/lite0.pth", "no such weight file", "'imagenet', 'random'"),
    "weights that are none": (f"--config.weights={QUICKSTART}", "quickstart.py: not a weight file", ".safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_that_cannot_be(refused, case):
    flag, *words = SETTINGS[case]
    more = ["--config.strategies=simplified"] if "cut_after" in flag else []
    refused(*small(flag, *more), words=words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), ["no config", "--config=configs/quickstart.py"]),
        (("--config=",), ["no config", "--config=configs/quickstart.py"]),
        ((f"--config={ROOT}/configs/quikstart.py",), ["no config file", "quikstart.py", "quickstart.py'"]),
        ((f"--config={ROOT}/configs/quickstart",), ["no config file", "quickstart.py'"]),
        ((f"--config={ROOT}/configs",), ["no config file", "configs"]),
        ((f"--config={QUICKSTART}", f"--config={QUICKSTART}"), ["--config is given 2 times"]),
        ((f"--config={QUICKSTART}:fast",), ["quickstart.py", "no choice", "'fast'"]),
        ((f"--config={ROOT}/configs/mehmood2022.py:l1bs",), ["unknown arm 'l1bs'", "'l1sb'"]),
    ],
)
def test_a_config_that_is_not_there(refused, flags, words):
    refused(*flags, words=words)


def test_no_workdir(capsys):
    assert run(f"--config={QUICKSTART}") == 2
    assert (
        capsys.readouterr().err
        == "error: no workdir; expected --workdir=FOLDER, such as --workdir=runs/quickstart\n"
    )


CONFIG_LINES = {
    "a setting misspelt": (
        "config.adapt.epcohs = 3",
        ":20: the config has no setting 'epcohs'",
        "'adapt.epochs'",
    ),
    "one misspelt where all is open": (
        "config.unlock(); config.stratgies = ('full',)",
        "'stratgies'",
        "'strategies'",
    ),
    "a wrong type": ("config.adapt.epochs = 'many'", ":20: epochs is many (str)", "a whole number"),
    "a section lost": ("config.transfer.head = {'epochs': 3}", "lacks transfer.head.strengths", "default()"),
    "none for a number": ("config.adapt.lr = None", "adapt.lr is None", "a number, such as 0.0001"),
    "a syntax error": ("config.seeds = (0, 1", "config.py:2", "not Python", "never closed"),
    "an unknown name": ("config.seeds = three", ":20: NameError", "'three'"),
    "a file it misses": ("open('classes.txt')", ":20: FileNotFoundError", "classes.txt"),
    "no return": ("return None", "the config is NoneType", "default()"),
    "a task without sets": ("config.tasks.other = {}", "tasks.other has no development images"),
    "a task that is text": (
        "config.tasks.cells = 'manifest.csv'",
        ":20: cells is manifest.csv (str)",
        "a dict",
    ),
    "a name for no folder": ("config.tasks['a/b'] = config.tasks.cells", "'a/b'", "letters, digits"),
    "a split misspelt": ("config.tasks.cells.extrnal = {}", "no split 'extrnal'", "'external'"),
}


@pytest.mark.parametrize("case", CONFIG_LINES)
def test_a_line_of_a_config_file(refused, tmp_path, case, data):
    line, *words = CONFIG_LINES[case]
    refused(f"--config={write_config(tmp_path, line)}", f"--config.data_dir={data.folder}", words=words)


def test_a_config_file_without_get_config(refused, tmp_path):
    (tmp_path / "empty.py").write_text("epochs = 3\n")
    refused(f"--config={tmp_path / 'empty.py'}", words=["empty.py", "no function get_config()"])


OWN_PHASES = {
    "a pattern of nothing": ("trainable", "('stage9/*',)", "phase 'a': pattern 'stage9/*' matches no parameter", "'stage7'"),
    "batch norm alone": ("trainable", "'stage7/*/norm*'", "matches in 'stage7/block1' only", "batch_norm='affine' or 'train'"),
    "a setting misspelt": ("epohcs", "1", "custom_strategies.mine.phases[0] has no setting 'epohcs'", "'epochs'"),
    "a wrong type": ("epochs", "'1'", "custom_strategies.mine.phases[0]: epochs is '1'", "a whole number"),
    "no epoch": ("epochs", "0", "phase 'a': epochs is 0", "1 or more"),
    "an unknown norm": ("batch_norm", "'frozn'", "phase 'a': unknown batch_norm 'frozn'", "'frozen'"),
    "a norm of no group": ("batch_norm", "{'stage7/block9': 'train'}", "'stage7/block9' matches no layer group", "'stage7/"),
    "a norm that is a number": ("layer_norm", "3", "custom_strategies.mine.phases[0]: layer_norm is 3", "'train'"),
    "a renamed setting": ("norm", "'train'", "phases[0] has no setting 'norm'", "called 'batch_norm' now"),
    "a multiplier of no group": ("lr_multipliers", "{'stage9': 0.1}", "lr_multipliers pattern 'stage9' matches no", "'head'"),
    "a multiplier for all": ("lr_multipliers", "0.1", "phases[0]: lr_multipliers is 0.1", "{'stage4': 0.1}"),
    "a multiplier in words": ("lr_multipliers", "{'head': 'slow'}", "lr_multipliers is {'head': 'slow'}", "a factor"),
    "a multiplier of zero": ("lr_multipliers", "(('head', 0),)", "the lr multiplier of 'head' is 0", "a positive"),
}  # fmt: skip


@pytest.mark.parametrize("case", OWN_PHASES)
def test_a_phase_of_ones_own(refused, tmp_path, data, case):
    key, value, *words = OWN_PHASES[case]
    phase = "{'name': 'a', 'epochs': 1, 'trainable': ('head',), 'lr': 1e-3, '%s': %s}" % (key, value)  # noqa: UP031
    config = write_config(
        tmp_path, "config.strategies = ('mine',)", f"config.custom_strategies.mine = {{'phases': ({phase},)}}"
    )
    refused(f"--config={config}", f"--config.data_dir={data.folder}", words=words)


@pytest.mark.parametrize(
    "entry", ["'full'", "()", "{'phases': {'name': 'a'}}", "{'phases': ()}", "{'phases': ('head',)}"]
)
def test_what_is_no_list_of_phases(refused, tmp_path, entry):
    config = write_config(
        tmp_path, "config.strategies = ('mine',)", f"config.custom_strategies.mine = {entry}"
    )
    refused(f"--config={config}", words=["custom_strategies.mine", "'trainable': ('head',)"])


def test_a_batch_that_does_not_divide_among_devices(refused, monkeypatch):
    monkeypatch.setattr("dapt_jax.runtime.sharding.jax.device_count", lambda: 3)
    refused(*small("--config.adapt.batch_size=32"), words=["adapt.batch_size 32", "3 devices", "30 does"])
    flags = ["--config.adapt.batch_size=30", "--config.transfer.protocols=finetune"]
    refused(*small(*flags), words=["transfer.finetune.batch_size 16", "15 does"])


def test_ten_crops_of_images_that_are_no_larger(refused):
    flags = ["--config.transfer.finetune.test_crops=10", "--config.transfer.protocols=finetune"]
    refused(*small(*flags), words=["test_crops=10", "transfer.finetune.augment.patch", "leukocytes", "32"])


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.weights=imagenett", ["imagenett: no such weight file; did you mean 'imagenet'"]),
        (
            "--config.corpus.crop=9",
            ["no setting 'corpus.crop'", "other keys are added to the description there"],
        ),
    ],
)
def test_a_flag_that_nothing_knows_names_what_is_near_or_where_it_belongs(refused, flag, words):
    refused(*small(flag), words=words)


def test_weights_of_another_model(refused, tmp_path):
    for name in ("resnet18.npz", "resnet18.safetensors"):
        export.write(tmp_path / name, *registry.build("resnet18").init(0))
        refused(
            *small(f"--config.weights={tmp_path / name}"), words=[name, "'efficientnet_lite0'", "resnet18"]
        )
    near = f"--config.weights={tmp_path}/resnet81.npz"
    refused(*small(near), words=["resnet81.npz: no such weight file", "'resnet18.npz'"])


# ---- the workdir
# --------------------------------------------------------------------------------------------------

ALONE = ("--config.strategies=none", "--config.seeds=0", "--config.transfer.protocols=linear")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    assert run(*small(*ALONE), f"--workdir={workdir}") == 0
    return workdir


def test_a_workdir_of_another_config(refused, alone, monkeypatch):
    kept = [path for path in sorted(alone.glob("*.json*")) if path.name != STATUS]
    before = {path: path.read_bytes() for path in kept}
    other = refused(*small(*ALONE, "--config.transfer.head.epochs=7"), workdir=alone)
    assert "holds the study of another config: transfer.head.epochs was 5 there and is 7 now" in other
    monkeypatch.setattr(phantoms, "CELLS_PER_SMEAR", 4)  # the same settings draw other images
    drawn = refused(*small(*ALONE), workdir=alone)
    assert re.search(r"the images of tasks\.leukocytes\.(development|external) are others now", drawn)
    monkeypatch.undo()
    assert before == {path: path.read_bytes() for path in kept}
    assert run(*small(*ALONE), f"--workdir={alone}") == 0
    assert before == {path: path.read_bytes() for path in kept}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", "{", ["config.json:1: not JSON"]),
        ("results.jsonl", '{"strategy": "none"', ["results.jsonl:1: not a line of JSON"]),
        ("results.jsonl", '{"strategy": "none"}', ["results.jsonl:1: no key 'seed'"]),
        ("ledger.jsonl", '{"strategy": "none"}', ["ledger.jsonl:1", "no seed"]),
    ],
)
def test_a_damaged_file_in_the_workdir(refused, alone, tmp_path, name, text, words):
    workdir = Path(shutil.copytree(alone, tmp_path / "damaged"))
    (workdir / name).write_text(text)
    refused(*small(*ALONE), workdir=workdir, words=words)


def test_results_of_an_unknown_config(refused, alone, tmp_path):
    (tmp_path / "old").mkdir()
    shutil.copy(alone / "results.jsonl", tmp_path / "old")
    refused(
        *small(*ALONE), workdir=tmp_path / "old", words=["holds results but no config.json", "new --workdir"]
    )


def test_a_workdir_below_a_file(refused, tmp_path):
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(
            *small(*ALONE), workdir=workdir, words=[str(workdir), "cannot be written to", "another --workdir"]
        )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_workdir_that_may_not_be_written(refused, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(
        *small(*ALONE),
        workdir=tmp_path / "locked",
        words=["locked: cannot be written to (Permission denied)"],
    )


def test_a_report_of_no_study(refused, tmp_path):
    refused(f"--config={QUICKSTART}", "--config.mode=report", words=["workdir/config.json: no such file"])


# ---- what works all the same
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.strategies=full,none"], {"strategies": ("full", "none")}),
        (["--config.strategies=('full','none')"], {"strategies": ("full", "none")}),
        (["--config.strategies=full, none"], {"strategies": ("full", "none")}),
        (["--config.strategies", "full,none"], {"strategies": ("full", "none")}),
        (["--config.strategies=full", "--config.strategies=none"], {"strategies": ("full", "none")}),
        (["--config.seeds=0,1"], {"seeds": (0, 1)}),
        (["--config.seeds=3"], {"seeds": (3,)}),
        (["--config.predict.model=/my runs/a,/b"], {"predict.model": ("/my runs/a", "/b")}),
        (["--config.predict.model", "/my runs/a"], {"predict.model": ("/my runs/a",)}),
        (["--config.predict.model=2024"], {"predict.model": ("2024",)}),
        (["--config.compare=2024,NEW=2025"], {"compare": ("2024", "NEW=2025")}),
        (["--config.compare='/my runs/a,b','c'"], {"compare": ("/my runs/a", "b", "c")}),
        (["--config.compare="], {"compare": ()}),
        (["--config.transfer.protocols=linear,finetune"], {"transfer.protocols": ("linear", "finetune")}),
        (["--noconfig.synthetic"], {"synthetic": False}),
        (["--config.adapt.lr=1"], {"adapt.lr": 1.0}),
        (["--config.tasks.leukocytes.external.n=7"], {"tasks.leukocytes.external.n": 7}),
    ],
)
def test_ways_to_write_a_value(arguments, expected):
    from dapt_jax.settings import flags

    for order in ([f"--config={QUICKSTART}", *arguments], [*arguments, "--config", str(QUICKSTART)]):
        config, workdir = flags.parse(order)
        assert workdir is None
        settings = flat(to_dict(config))
        assert {name: settings[name] for name in expected} == expected


def test_no_epoch_of_the_head_alone(capsys):
    assert run(*small("--config.mode=plan", "--config.adapt.head_epochs=0", "--config.strategies=full")) == 0
    phases_told = capsys.readouterr().out.partition("┡")[2].partition("└")[0]
    assert "│ full " in phases_told
    assert "│ head " not in phases_told


def test_help_lists_the_flags_and_the_settings(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert "--config=FILE" in out
    assert "--config.adapt.epochs=4" in out


def test_from_a_shell(tmp_path):
    """The true exit code, and nothing else on stderr, whatever the libraries would like to say."""
    command = [
        sys.executable,
        "-m",
        "dapt_jax.main",
        *small("--config.strategies=fll"),
        f"--workdir={tmp_path / 'w'}",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr == "error: unknown strategy 'fll'; did you mean 'full'?\n"
    assert not (tmp_path / "w").exists()
