"""Configs of published recipes: every argument makes a config, and one of each kind runs on small files in the true layout."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.settings import flags, resolve
from dapt_jax.study import plan, prepare, strategies
from dapt_jax.study.runs import classification_loss
from dapt_jax.weights import zoo
from tests import command, tiny

SMALL = (
    "--config.model.name=resnet18", "--config.seeds=0", "--config.transfer.folds=3",
)  # fmt: skip


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, command.ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TAHER, MEDMNIST = recipe("taher2021"), recipe("medmnist")


def own(task, init):
    return task in TAHER.IN_DOMAIN and init.endswith(task)


@pytest.mark.parametrize("task", TAHER.TASKS)
def test_every_init_of_the_benchmark_is_a_config_that_can_run(task):
    encoder = registry.build("resnet50")
    for init in TAHER.inits():
        if own(task, init):
            with pytest.raises(UserError, match=f"has learnt from {task} itself"):
                TAHER.get_config(f"{task},{init}")
            continue
        config = TAHER.get_config(f"{task},{init}")
        settings = resolve(config)
        assert len(config.seeds) == 10
        assert config.weights == "random" or zoo.entry(config.weights).model == "resnet50"
        if init != "table":
            (strategy,) = (strategies.resolve(name, encoder, settings) for name in settings.strategies)
            assert bool(strategy.phases) == ("->" in init)
        tasks = settings.tasks[task].sources.values()
        for sets in (*tasks, *([config.corpus] if config.corpus.kind else [])):
            assert set(sets) >= {"kind", "path"}


def test_the_table_s_arms_leave_out_those_made_from_the_task_s_own_set():
    assert TAHER.get_config("montgomery,table").strategies == TAHER.TABLE
    assert TAHER.get_config("chexpert,table").strategies == (
        "random",
        "imagenet",
        "chestxray14",
        "imagenet-chestxray14",
    )
    assert TAHER.get_config("chestxray14,table").custom_strategies.chexpert["weights"] == "taher2021:chexpert"
    assert len(TAHER.released()) == 20  # and the supervised one make the benchmark's 21


def test_the_classification_recipe_s_loss_is_one_sigmoid_of_two_classes_and_one_each_of_several_labels():
    settings = resolve(TAHER.get_config("shenzhen,random")).transfer.finetune
    assert classification_loss(tiny.dataset(classes=2), settings.loss).outputs == 1


@pytest.mark.parametrize("name", MEDMNIST.SETS)
def test_every_set_and_size_of_medmnist_is_a_config(name):
    for size in MEDMNIST.SIZES:
        config = MEDMNIST.get_config(f"{name},{size}")
        assert resolve(config).tasks[name].val["pixels"] == int(size)


@pytest.mark.parametrize(
    ("module", "arm", "message"),
    [
        (TAHER, "shenzen,random", "unknown 'shenzen'.*did you mean 'shenzhen'"),
        (TAHER, "shenzhen,imagnet", "unknown 'imagnet'.*did you mean 'imagenet'"),
        (TAHER, "shenzhen", "unknown ''"),
        (MEDMNIST, "pathmnist,32", "unknown '32'"),
        (MEDMNIST, "pathmnst,28", "did you mean 'pathmnist'"),
    ],
)
def test_arguments_that_are_none_are_named(module, arm, message):
    with pytest.raises(UserError, match=message):
        module.get_config(arm)


def picture(path, rng, side=48):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (side, side), np.uint8)).save(path)


@pytest.mark.long
def test_the_classification_recipe_runs_on_files_in_the_layout_of_shenzhen(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "data" / "Shenzhen"
    names = [f"CHNCXR_{number:04d}_{number % 2}.png" for number in range(36)]
    for name in names:
        picture(folder / "CXR_png" / name, rng)
    for part, chosen in {"train": names[:24], "valid": names[24:30], "test": names[30:]}.items():
        lines = [f"{name},{name[-5]}\n" for name in chosen]
        (folder / f"ShenzenCXR_{part}_data.txt").write_text("".join(lines))
    workdir = tmp_path / "run"
    finetune = "--config.transfer.finetune"
    chosen = [
        f"--config={command.ROOT}/configs/taher2021.py:shenzhen,random", f"--config.data_dir={tmp_path / 'data'}", *SMALL,
        "--config.model.image_size=40", f"{finetune}.augment.patch=32", f"{finetune}.epochs=3", f"{finetune}.batch_size=8",
        f"{finetune}.mix.mixup=0.4",
    ]  # fmt: skip
    assert command.run(*chosen, f"--workdir={workdir}") == 0
    rows = {(row["split"], row["metric"]): row for row in command.rows(workdir / "results.jsonl")}
    assert rows["test", "auc"]["n"] == 6
    assert rows["val", "auc"]["n"] == 6
    (ledger,) = [row for row in command.rows(workdir / "ledger.jsonl") if row["steps"]]
    assert [set(point) >= {"val_loss", "val_auc"} for point in ledger["curve"]] == [True] * 3
    assert ledger["images"] == 3 * 24  # all of the official training list
    settings, _ = flags.parse(chosen)
    ready = prepare.prepare(settings)
    planned = plan.transfer_flops(ready, ready.arms[0], ready.tasks[0])
    assert ledger["model_flops"] == planned["finetune"]  # mixing costs none


def test_the_segmentation_recipe_runs_on_files_in_the_layout_of_montgomery(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "data" / "Montgomery"
    for number in range(12):
        name = f"MCUCXR_{number:04d}_{number % 2}.png"
        picture(folder / "CXR_png" / name, rng)
        for lung, columns in {"leftMask": slice(0, 12), "rightMask": slice(30, 44)}.items():
            mask = np.zeros((48, 48), np.uint8)
            mask[8:40, columns] = 255
            (folder / "ManualMask" / lung).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(folder / "ManualMask" / lung / name)
    workdir = tmp_path / "run"
    part = "--config.transfer.segmentation"
    chosen = [
        f"--config={command.ROOT}/configs/taher2021.py:montgomery,random", f"--config.data_dir={tmp_path / 'data'}", *SMALL,
        "--config.model.image_size=32", f"{part}.epochs=2", f"{part}.batch_size=4",
    ]  # fmt: skip
    assert command.run(*chosen, f"--workdir={workdir}") == 0
    rows = {(row["split"], row["metric"]): row for row in command.rows(workdir / "results.jsonl")}
    assert 0 <= rows["development", "dice"]["value"] <= 1
    assert rows["development", "dice"]["classes"] == ["lung"]
    (ledger,) = command.rows(workdir / "ledger.jsonl")
    assert all("val_dice" in point for point in ledger["curve"])
