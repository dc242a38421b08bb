"""A grid of studies: planned and run point by point, in shards, past failures and kills."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import pytest

from dapt_jax.errors import UserError
from dapt_jax.runtime.preemption import RESTART_CODE
from dapt_jax.settings import flags, resolve
from dapt_jax.study import grid as grids
from dapt_jax.study import plan, prepare
from tests.command import ROOT, run
from tests.configs import tiny_study

TAHER = ROOT / "configs" / "taher2021.py"
CONFIG = """\
from tests.configs.pretraining import get_config as tiny

def get_grid(workdir):
    return {"pre": "pretraining", "bad": "none", "again": "pretraining"}

def get_config(part):
    if part == "none":
        raise ValueError("no such part")
    return tiny(part)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


def made(file, folder, *more):
    return flags.grid([f"--config={file}:grid", f"--workdir={folder}", *more], str(folder))


def test_a_failed_point_does_not_stop_the_others_and_is_tried_again(file, tmp_path):
    ran = []

    def study(arguments):
        ran.append(next(each for each in arguments if each.startswith("--workdir=")).rpartition("/")[2])
        if ran[-1] == "bad":
            raise ValueError("a defect")
        return 0

    grid = made(file, tmp_path, "--config.adapt.lr=1e-3")
    assert grids.run(grid, tmp_path, study) == 2
    assert ran == ["pre", "bad", "again"]
    assert {n: each["code"] for n, each in json.loads((tmp_path / grids.FILE).read_text()).items()} == {
        "pre": 0, "bad": 1, "again": 0,
    }  # fmt: skip
    assert grids.run(grid, tmp_path, lambda arguments: ran.append("once") or 0) == 0
    assert ran[3:] == ["once"]
    other = made(file, tmp_path, "--config.adapt.lr=1e-2")
    assert grids.run(other, tmp_path, lambda arguments: ran.append("other") or 0) == 0
    assert ran[4:] == ["other"] * 3  # of other flags nothing has run yet


def test_the_report_over_all_studies_leaves_out_pre_trainings_without_a_target(file, tmp_path, monkeypatch):
    for name, lines in (("pre", ""), ("bad", "{}\n"), ("again", "{}\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text(lines)
    built = []
    monkeypatch.setattr(grids.compare, "build", lambda folders, out: built.append((folders, out)))
    assert grids.run(made(file, tmp_path), tmp_path, lambda arguments: 0) == 0
    assert built == [([str(tmp_path / "bad"), str(tmp_path / "again")], tmp_path / "compared")]


def test_a_study_that_is_told_to_stop_stops_the_grid_which_goes_on_there(file, tmp_path):
    ran = []
    codes = iter([0, RESTART_CODE, 0, 0])
    grid = made(file, tmp_path)
    study = lambda arguments: ran.append(arguments[1]) or next(codes)  # noqa: E731
    assert grids.run(grid, tmp_path, study) == RESTART_CODE
    assert grids.run(grid, tmp_path, study) == 0
    assert [each.rpartition("/")[2] for each in ran] == ["pre", "bad", "bad", "again"]


def test_shards_divide_the_papers_grid_and_a_point_stays_in_its_shard(tmp_path):
    def names(shard):
        return [point.name for point in grids.points(made(TAHER, tmp_path, f"--shard={shard}"), tmp_path)]

    whole = names("1/1")
    parts = [names(f"{number}/4") for number in (1, 2, 3, 4)]
    assert sorted(name for part in parts for name in part) == sorted(whole)
    assert all(parts)
    assert "shenzhen-imagenet" in whole
    assert "chestxray14-chestxray14" not in whole
    for shard in ("5/4", "0/4", "a"):
        with pytest.raises(UserError, match="expected I/N with I from 1 to N"):
            names(shard)


@pytest.mark.parametrize("name", [".", "..", "cache", "compared", grids.FILE, "a/b", ""])
def test_a_point_whose_workdir_would_not_be_its_own_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=rf"a point is named {re.escape(repr(name))}.*; expected"):
        grids.points(flags.Grid(TAHER, {"a": "x", name: "y"}, (), ""), tmp_path)


def test_a_point_is_in_the_shard_of_all_whose_weights_it_takes_and_after_them(tmp_path):
    """Whatever the folder is called, and of several that one takes weights of."""
    for folder in (Path("."), Path("runs/t"), tmp_path):
        choices = {
            "c": f"x,{folder / 'a'},{folder / 'b'}", "a": "pre,a", "b": f"pre,b,{folder / 'a'}",
            "d": f"x,{folder / 'ab'}", "ab": "pre", "e": "x", "f": "pre", "g": f"x,{folder / 'f'}@epoch=2,{folder / 'ab'}",
        }  # fmt: skip
        grid = flags.Grid(TAHER, choices, (), "")
        families = grids._families(grid, folder)
        assert {name: depth for name, (depth, _) in families.items()} == {
            "c": 2, "a": 0, "b": 1, "d": 1, "ab": 0, "e": 0, "f": 0, "g": 1,
        }  # fmt: skip
        family = {name: of for name, (_, of) in families.items()}
        assert {family[name] for name in "abc"} == {"a"}
        assert {family[name] for name in ("d", "ab", "f", "g")} == {"ab"}
        assert family["e"] == "e"
        found = []
        for number in range(1, 5):
            part = dataclasses.replace(grid, shard=f"{number}/4")
            with contextlib.suppress(UserError):  # no point belongs to it
                names = [point.name for point in grids.points(part, folder)]
                assert all(
                    set(names) >= {name for name in family if family[name] == family[each]} for each in names
                )
                found += names
        assert sorted(found) == sorted(choices)


def test_four_pre_trainings_serve_the_tasks_of_the_benchmark(tmp_path):
    choices = made(TAHER, tmp_path).choices
    alone = [name for name in choices if name.startswith("pre-")]
    assert (len(alone), len(choices)) == (4, 178)
    assert choices["shenzhen-imagenet-to-chexpert"].endswith(f",{tmp_path / 'pre-imagenet-to-chexpert'}")
    for arm in ("pretraining,imagenet", "shenzhen,imagenet,RUN", "pretraining,imagenet->chexpert,RUN"):
        with pytest.raises(
            UserError, match=r"expected pretraining,SOURCE->CORPUS or TASK,SOURCE->CORPUS,RUN"
        ):
            flags.parse((f"--config={TAHER}:{arm}", f"--workdir={tmp_path}"))


def test_six_pre_trainings_serve_eighteen_targets(tmp_path):
    choices = made(ROOT / "configs" / "hidy2024.py", tmp_path).choices
    alone = [name for name in choices if name.startswith("pre-")]
    assert (len(alone), len(choices)) == (6, 24)
    assert choices["acdc-swin-advanced"].endswith(f",{tmp_path / 'pre-swin-advanced'}")


@pytest.mark.long
def test_targets_and_their_five_seeds_share_one_pre_training_and_the_plan_says_so(tmp_path, capsys):
    images = "corpus=4096/10,acdc.train=48,acdc.test=24"
    grid = made(ROOT / "configs" / "hidy2024.py", tmp_path, f"--config.plan.images={images}")
    names = ("pre-swin-simple", "acdc-swin-simple")
    grid = dataclasses.replace(grid, choices={name: grid.choices[name] for name in names})
    assert grids.show(grid, tmp_path) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in out.splitlines() if line[:1] == "│"]
    assert rows == [[names[0], "5", "1"], [names[1], "50", "0"]]
    assert "grid: 1 adaptations of " in out
    assert "; 1 studies take the weights of another" in out


@pytest.mark.long
def test_studies_that_differ_in_weights_alone_are_planned_once_at_the_cost_of_each(
    tmp_path, capsys, monkeypatch
):
    images = ",".join(
        f"shenzhen.{split}={count}" for split, count in (("train", 40), ("val", 8), ("test", 9))
    )
    whole = made(TAHER, tmp_path, f"--config.plan.images={images}")
    names = ("shenzhen-imagenet", "shenzhen-swav", "shenzhen-simclr-v1", "shenzhen-random")
    prepared = []
    real = prepare.prepare
    monkeypatch.setattr(prepare, "prepare", lambda settings: prepared.append(settings) or real(settings))

    def rows(*chosen):
        grid = dataclasses.replace(whole, choices={name: whole.choices[name] for name in chosen})
        assert grids.show(grid, tmp_path) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]

    together = rows(*names)
    assert len(prepared) == 2  # images of SimCLR's weights are normalised otherwise
    alone = [line for name in names for line in rows(name)]
    assert [line.split() for line in together] == [line.split() for line in alone]
    assert float(together[0].split("│")[4].replace(",", "")) > 0


CHAIN = """\
from tests.configs.pretraining import get_config as tiny

def get_grid(workdir):
    return {"target": f"run:{workdir / 'pre'}@epoch=all", "pre": "pretraining"}

def get_config(part):
    config = tiny("target" if part.startswith("run:") else part)
    if part.startswith("run:"):
        config.custom_strategies.own = {"weights": part, "cut_after": "stage1/block1"}
    return config
"""


def test_a_plan_costs_a_target_whose_pre_training_has_not_run(tmp_path, capsys):
    path = tmp_path / "chain.py"
    path.write_text(CHAIN)
    grid = made(path, tmp_path)
    assert [point.name for point in grids.points(grid, tmp_path)] == ["pre", "target"]
    parts = []
    for shard in range(1, 6):
        with contextlib.suppress(UserError):  # nothing belongs to the others
            parts.append(grids.points(made(path, tmp_path, f"--shard={shard}/5"), tmp_path))
    assert [[point.name for point in part] for part in parts] == [["pre", "target"]]
    assert grids.show(grid, tmp_path) == 0
    (line,) = (each for each in capsys.readouterr().out.splitlines() if each.startswith("│ target"))
    assert "to run, after pre" in line
    assert line.split("│")[2].split() == ["3"]  # epochs 1, 2 and 3 will be kept


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"adapt.seed": 3},
        {"checkpoint_scoring.downstream": True, "checkpoint_selection.score": "knn"},
        {"compute_budget": 0.9, "checkpoint_selection.score": "knn"},
    ],
)
def test_the_cost_of_a_point_is_the_work_of_its_study(changed):
    config = tiny_study.get_config()
    config.strategies, config.seeds = ("none", "switching", "full"), (0, 1)
    config.checkpoint_scoring.update({"images": 16, "budget": 0.9, "level": 1})
    config.adapt.update({"head_epochs": 2, "epochs": 12})
    for name, value in changed.items():
        config.update_from_flattened_dict({name: value})
    settings = resolve(config)
    study = prepare.prepare(settings)
    found = grids._cost(settings)
    assert found.adapting + found.transfer == plan.work_of(study, study.arms)
    assert found.adapting <= len(study.settings.adaptation_seeds) * sum(
        plan.adaptation_flops(study, arm) for arm in study.arms_of(0)
    )


def test_the_command_plans_and_runs_with_exit_code_2_for_a_bad_point(file, tmp_path, capsys):
    flags_ = (f"--config={file}:grid", f"--workdir={tmp_path / 'runs'}")
    assert run(*flags_, "--config.mode=plan") == 0
    out = capsys.readouterr().out
    assert "grid: 2 adaptations" in out
    assert "1 studies cannot be planned yet" in out
    assert run(*flags_) == 2
    out, err = capsys.readouterr()
    assert "2 of 3 finished" in out, out + err
    assert "no such part" in err
    assert (tmp_path / "runs" / "again" / "report.md").exists()
    assert run(*flags_, "--config.mode=export") == 2
    assert "--config.mode=export of a grid; expected run or plan" in capsys.readouterr().err
