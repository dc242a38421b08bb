"""`mode=compare`: one report over several workdirs, or a line that says why they cannot be compared."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dapt_jax.errors import UserError
from dapt_jax.records.study_records import Records
from dapt_jax.records.vocabulary import BASELINE
from dapt_jax.report import compare
from dapt_jax.statistics import paired_t
from dapt_jax.study import pace
from tests.command import run

RNG = np.random.default_rng(0)


def workdir(
    folder, task="cells", strategy="none", init="random", seeds=(0, 1, 2), images="a", folds=5, shift=0.0
):
    """A workdir with results and costs, as a study of one task leaves it."""
    folder.mkdir(parents=True)
    config = {
        "title": "t",
        "strategies": [strategy],
        "seeds": list(seeds),
        "report": {"metric": "auc"},
        "transfer": {"folds": folds},
        "weights": init,
        "contents": {f"tasks.{task}.development": {"images": images, "labels": "l"}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    key = {"strategy": strategy, "init": init, "model": "m", "task": task, "split": "development"}
    lines = [
        {**key, "seed": seed, "protocol": "linear", "metric": "auc", "n": 9, "classes": ["x", "y"],
         "value": 0.8 + shift + 0.01 * float(np.sin(3 * seed + len(init)))}
        for seed in seeds
    ]  # fmt: skip
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    costs = [
        {
            "strategy": strategy,
            "seed": seed,
            "stage": "transfer",
            "phase": f"{task}/linear",
            "model_flops": 10**12,
        }
        for seed in seeds
    ]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in costs))
    return str(folder)


def test_settings_of_the_report_that_the_command_gives_count_or_are_refused(tmp_path, capsys):
    entries = [workdir(tmp_path / init, init=init) for init in ("random", "imagenet")]
    flags = (
        "--config.mode=compare",
        f"--config.compare={','.join(entries)}",
        f"--workdir={tmp_path / 'all'}",
    )
    for flag, words in (
        ("--config.report.metric=mcc", "report.metric is 'mcc', which no workdir has; valid: 'auc'"),
        ("--config.report.protocol=mlp_small", "report.protocol is 'mlp_small', which no workdir has"),
        ("--config.energy.watts=9", "--config.energy.watts: mode=compare shows what the workdirs record"),
    ):
        assert run(*flags, flag) == 2
        assert words in capsys.readouterr().err
    assert run(*flags, "--config.report.margin=0.2") == 0
    assert "margin of 0.2 AUC" in (tmp_path / "all" / "report.md").read_text()


def test_initialisation_by_task_is_one_table_with_the_statistics_of_a_study(tmp_path):
    entries = [
        workdir(tmp_path / f"{task}-{init}", task, init=init, shift=shift)
        for task in ("cells", "lungs")
        for init, shift in (("random", 0.0), ("imagenet", 0.1), ("moco", 0.0))
    ]
    for entry in entries:
        with (Path(entry) / "results.jsonl").open("a") as file:
            line = json.loads((Path(entry) / "results.jsonl").read_text().splitlines()[0])
            file.write(
                json.dumps({**line, "strategy": BASELINE, "model": "none", "protocol": "scalar"}) + "\n"
            )
    flag = f"--config.compare={','.join(entries)}"
    assert run("--config.mode=compare", flag, f"--workdir={tmp_path / 'all'}") == 0
    records = compare.CombinedRecords([compare.Part.read(entry) for entry in entries])
    assert records.strategies == ["random", "imagenet", "moco"]
    assert records.tasks == ["cells", "lungs"]
    first, second = (Records.read(tmp_path / f"lungs-{init}") for init in ("random", "imagenet"))
    values = [each.values("none", "lungs", "development", "linear", "auc") for each in (first, second)]
    assert records.values("imagenet", "lungs", "development", "linear", "auc") == values[1]
    text = (tmp_path / "all" / "report.md").read_text()
    overview = text[text.index("## Overview") : text.index("## cells")]
    assert "| arm | cells, AUC development | lungs, AUC development |" in overview
    best = np.mean(values[1])
    assert f"**{best:.3f}**" in overview
    assert "| imagenet |" in overview
    assert "- model: m\n" in text
    assert "Equivalence to random" in overview
    assert "| weights | random | imagenet | moco | random | imagenet | moco |" in overview
    assert "Ranks over the tasks, development" in text
    assert (tmp_path / "all" / "figures" / "overview.png").exists()
    assert paired_t(values[1], values[0]).p is not None
    assert [cost.total_flops for cost in records.costs("moco", "lungs").values()] == [10**12] * 3


def test_many_workdirs_are_rows_of_the_table_of_settings(tmp_path):
    entries = [
        workdir(tmp_path / f"d{n}", init=f"i{n}", seeds=(0, 1)) for n in range(compare.WORKDIRS_ACROSS + 1)
    ]
    table = compare._differing([compare.Part.read(entry) for entry in entries])
    assert [[cell.text for cell in row] for row in table.rows][:2] == [["d0", "i0"], ["d1", "i1"]]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([[{"name": "a", "lr": 1}], [{"name": "a", "lr": 2}], "–"], ["a: lr 1", "a: lr 2", "–"]),
        ([[{"name": "a"}], [{"name": "a", "image_size": 48}]], ["a", "a: image_size 48"]),
        (
            [[{"name": "a", "lr": 1}, {"name": "b", "lr": 1}], [{"name": "b", "lr": 2}]],
            ["a; b: lr 1", "b: lr 2"],
        ),
        ([["x", "y"], []], ["x, y", "–"]),
        ([0.1, "z" * 70], ["0.1", "z" * 59 + "…"]),
    ],
)
def test_phases_are_shown_by_what_differs_between_them(values, shown):
    assert compare._shown(values) == shown


def test_budgets_and_strategies_of_one_workdir_alone_are_no_settings_that_differ(tmp_path):
    phases = [{"name": "head", "epochs": 1}, {"name": "all", "epochs": 2}]
    changes = (
        {
            "cache": {"disk_mb": 1},
            "custom_strategies": {"own": {"phases": phases}},
            "strategies": ["a", "own"],
        },
        {"cache": {"disk_mb": 2}, "custom_strategies": {"own": {"phases": phases[1:]}, "b": {"phases": []}}},
    )
    entries = []
    for number, change in enumerate(changes):
        entries.append(workdir(tmp_path / f"d{number}", init="i"))
        file = Path(entries[-1]) / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "strategies": ["b"], **change}))
    table = compare._differing([compare.Part.read(entry) for entry in entries])
    assert {tuple(cell.text for cell in row) for row in table.rows} == {
        ("custom_strategies.own.phases", "head, all", "all"), ("strategies", "a, own", "b"),
    }  # fmt: skip


def test_given_names_join_workdirs_to_rows_and_equal_strategies_are_told_apart(tmp_path):
    a, b = (workdir(tmp_path / name, init="imagenet", shift=0.01 * n) for n, name in enumerate("ab"))
    found = [compare.Part.read(each) for each in (a, b)]
    assert compare.CombinedRecords(found).strategies == ["a none", "b none"]
    named = [compare.Part.read(each) for each in (f"first={a}", f"second={b}")]
    assert compare.CombinedRecords(named).strategies == ["first", "second"]
    with pytest.raises(UserError, match="two workdirs of one task are named 'x'; expected a name each"):
        compare.CombinedRecords([compare.Part.read(f"x={each}") for each in (a, b)])


def test_the_cost_of_one_row_over_workdirs_of_several_tasks_is_that_of_all_of_them(tmp_path):
    tasks = {"a": ("cells", 1), "b": ("lungs", 2), "c": ("brain", 4)}
    for name, (task, seconds) in tasks.items():
        path = Path(workdir(tmp_path / name, task=task)) / "ledger.jsonl"
        path.write_text(path.read_text().replace("}", f', "train_s": {seconds}.0, "wall_s": {seconds}.0}}'))
    records = compare.CombinedRecords([compare.Part.read(f"one={tmp_path / name}") for name in tasks])
    assert {cost.wall_s for cost in records.costs("one").values()} == {7.0}
    assert {cost.total_flops for cost in records.costs("one").values()} == {3 * 10**12}
    assert [cost.wall_s for cost in records.costs("one", "lungs").values()] == [2.0] * 3


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ({"task": "lungs"}, "b has the task lungs, and the others have cells"),
        ({"images": "b"}, "have other images or labels of cells development (images); expected the same set"),
        ({"folds": 3}, "divide task 'cells' by transfer.folds of 5 and 3; expected the same splits"),
    ],
)
def test_studies_that_cannot_be_compared_are_refused_with_the_reason(tmp_path, other, line, capsys):
    entries = workdir(tmp_path / "a"), workdir(tmp_path / "b", **other)
    if "task" in other:
        entries = entries[::-1]
        line = line.replace(
            "b has the task lungs, and the others have cells", "b has the task lungs, and the others"
        )
    flags = ("--config.mode=compare", f"--workdir={tmp_path / 'all'}")
    assert run(*flags, f"--config.compare={','.join(entries)}") == 2
    assert line in capsys.readouterr().err
    assert run(*flags, f"--config.compare={entries[0]},") == 2
    assert "compare names 1 workdirs; expected two or more" in capsys.readouterr().err
    assert run(*flags, f"--config.compare=x={entries[0]},{entries[0]}/") == 2
    assert f"{entries[0]}/ is there twice; expected each once" in capsys.readouterr().err
    assert run(*flags, f"--config.compare={tmp_path / 'c'},{entries[0]}") == 2
    assert "holds no study" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("protocol", "metric", "section"),
    [("finetune", "auc", "finetune"), ("frozen", "dice", "segmentation"), ("linear", "auc", "")],
)
def test_studies_that_score_the_images_of_other_folds_are_refused(tmp_path, protocol, metric, section):
    entries = []
    for count in (1, 5):
        entries.append(workdir(tmp_path / f"d{count}", init=f"i{count}"))
        for name in ("config.json", "results.jsonl"):
            file = Path(entries[-1]) / name
            text = file.read_text().replace('"linear"', f'"{protocol}"').replace('"auc"', f'"{metric}"')
            own = {"finetune": {"folds": count}, "segmentation": {"folds": count}}
            file.write_text(text.replace('{"folds": 5}', json.dumps({"folds": 5, **own})))
    parts = [compare.Part.read(entry) for entry in entries]
    if not section:
        assert compare.check(parts) == []
        return
    with pytest.raises(
        UserError, match=rf"divide task 'cells' by transfer.{section}.folds of 1 and 5; expected"
    ):
        compare.check(parts)


def test_results_of_other_versions_of_the_computation_are_a_warning(tmp_path):
    entries = [workdir(tmp_path / name, init=name) for name in "abc"]
    for entry, version in zip(entries, ("2", "3", "3"), strict=True):
        file = Path(entry) / "config.json"
        file.write_text(
            file.read_text().replace('"contents": {', f'"contents": {{"code": {{"version": "{version}"}}, ')
        )
    lines = compare.check([compare.Part.read(entry) for entry in entries])
    assert [line.rpartition(" of version ")[0] for line in lines] == [
        f"cells: {entries[0]} has results of version 2 of the computation, and {other}"
        for other in entries[1:]
    ]
    assert compare.check([compare.Part.read(entry) for entry in entries[1:]]) == []


def test_seeds_that_are_not_shared_are_a_warning(tmp_path):
    parts = [
        compare.Part.read(workdir(tmp_path / "a")),
        compare.Part.read(workdir(tmp_path / "b", init="imagenet", seeds=(7, 8))),
    ]
    assert "share no seed, so there is no paired test" in compare.check(parts)[0]


def test_what_a_workdir_says_of_its_own_numbers_is_said_of_the_comparison_too(tmp_path):
    entries = [workdir(tmp_path / name, init=name, shift=0.01 * n) for n, name in enumerate("ab")]
    for place, seed in zip(entries, (7, -1), strict=True):
        folder = Path(place)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "adapt": {"seed": seed}}))
        row = {"strategy": "none", "seed": max(seed, 0), "stage": "dapt", "phase": "all", "model_flops": 1}
        with (folder / "ledger.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        lines = ["development: few patients", f"external: few patients of {place}"]
        (folder / "few_samples.json").write_text(json.dumps({"cells": lines}))
    compare.build(entries, tmp_path / "all")
    text = (tmp_path / "all" / "report.md").read_text()
    assert "- seeds: 0, 1, 2\n" in text
    assert "Adaptations: one of a (adapt.seed): intervals and tests say nothing" in text
    assert text.count("cells: development: few patients.") == 1
    assert text.count("cells: external: few patients of ") == 2


def test_what_a_task_has_for_itself_is_a_setting_that_differs_and_where_its_images_are_is_none(tmp_path):
    entries = [workdir(tmp_path / name, init="i") for name in "abc"]
    tasks = (
        {"cells": {"development": {"path": "here"}, "transfer": {"head": {"epochs": 5}}}},
        {"cells": {"development": {"path": "there"}, "auc_classes": ["x"]}},
        {"lungs": {"development": {"path": "there"}}},
    )
    for entry, of_task in zip(entries, tasks, strict=True):
        file = Path(entry) / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "tasks": of_task}))
    parts = [compare.Part.read(entry) for entry in entries]
    assert [[cell.text for cell in row] for row in compare._differing(parts[:2]).rows] == [
        ["tasks.cells.transfer.head.epochs", "5", "–"],
        ["tasks.cells.auc_classes", "–", "x"],
    ]
    assert not compare._differing(parts[2:] + parts[2:]).rows


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("contents", [], "contents is []; expected a JSON object"),
        ("contents", {"code": "2"}, "contents: code is '2'; expected a JSON object"),
        ("images", 3, "images is 3; expected a JSON object"),
        ("transfer", None, "transfer is None; expected a JSON object"),
        ("tasks", {"cells": 1}, "tasks: cells is 1; expected a JSON object"),
    ],
)
def test_damaged_settings_of_a_workdir_are_one_line(tmp_path, key, value, line):
    folder = Path(workdir(tmp_path / "a"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match=re.escape(f"config.json: {line}")):
        compare.Part.read(str(folder))


def test_a_model_that_is_named_without_settings_is_an_encoder_too(tmp_path):
    folder = Path(workdir(tmp_path / "a"))
    for model in ("m", {"name": "m"}):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model": model}))
        ledger = {
            "strategy": "none",
            "seed": 0,
            "stage": "transfer",
            "phase": "cells/linear",
            "model_flops": 9,
        }
        (folder / "ledger.jsonl").write_text(json.dumps({**ledger, "wall_s": 1.0}) + "\n")
        assert "time at the pace of" in pace.line(str(folder), "m", 1e12)
        assert pace.line(str(folder), "n", 1e12) == ""
