"""What a command leaves behind: a plan, a study, the same study again, a report; and that all configs of ours load."""

import os
import shutil
import subprocess
import sys

import pytest

from dapt_jax.data import phantoms
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.settings import flags
from dapt_jax.study import plan, prepare, strategies, study
from dapt_jax.training import freezing
from tests.command import REQUIRED_ARGUMENTS, ROOT, rows, run, small, write_config

RESULT = {
    "strategy", "seed", "init", "model", "task", "split", "protocol", "metric", "value", "n", "classes",
}  # fmt: skip
LEDGER = {
    "strategy", "seed", "stage", "phase", "steps", "images", "model_flops", "hardware_flops", "train_s", "compile_s",
    "data_s", "eval_s", "checkpoint_s", "wall_s", "peak_bytes", "device", "devices", "energy_kwh", "energy_source",
    "trainable_params", "total_params", "cached",
}  # fmt: skip
PARTS = ("compile_s", "train_s", "data_s", "eval_s", "checkpoint_s", "cache_s")


@pytest.fixture(scope="session")
def planned():
    """FLOPs per arm as planned before anything has run."""
    settings, _ = flags.parse(small())
    ready = prepare.prepare(settings)
    (task,) = ready.tasks
    return {
        (arm.name, arm.seed): {
            "dapt": plan.adaptation_flops(ready, arm),
            **plan.transfer_flops(ready, arm, task),
        }
        for arm in ready.arms
    }


@pytest.fixture(scope="session")
def finished(tmp_path_factory, planned):
    """A finished study, to be read only."""
    workdir = tmp_path_factory.mktemp("study")
    assert run(*small(), f"--workdir={workdir}") == 0
    return workdir


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- plan ---------------------------------------------------------------------------------------------------------


def test_a_plan_prints_a_table_per_strategy_and_writes_nothing(tmp_path, capsys, planned):
    workdir = tmp_path / "workdir"
    assert run(*small(), "--config.mode=plan", f"--workdir={workdir}") == 0
    out = capsys.readouterr().out
    assert not workdir.exists()
    assert "none\n" not in out  # nothing to adapt: no table of phases
    for name in ("full", "partial"):
        table = next(part for part in out.split("└") if f"\n{name} " in part)
        assert "head" in table.partition("┡")[2]
        assert name in table.partition("┡")[2]
    overview = out.rpartition("Quickstart")[2]
    row = next(line for line in overview.splitlines() if line.startswith("│ partial "))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    share = planned["partial", 0]["dapt"] / planned["full", 0]["dapt"]
    assert float(cells[6]) == pytest.approx(share, abs=6e-4)
    assert float(cells[5]) == pytest.approx(planned["partial", 0]["dapt"] / 1e12, rel=0.01)


def test_a_plan_needs_no_workdir(capsys):
    assert run(*small("--config.strategies=none"), "--config.mode=plan") == 0
    assert "│ none " in capsys.readouterr().out


# ---- run ----------------------------------------------------------------------------------------------------------


def test_what_a_study_leaves(finished):
    for name in (
        "config.json",
        "results.jsonl",
        "ledger.jsonl",
        "report.html",
        "report.md",
        "weights.txt",
        "intensities.json",
    ):
        assert (finished / name).stat().st_size, name
    for strategy in ("full", "partial"):
        for seed in (0, 1):
            names = {path.name for path in (finished / "checkpoints" / f"{strategy}-seed{seed}").iterdir()}
            assert names == {"adapted.json", "adapted.safetensors"}
    figures = sorted((finished / "figures").glob("*.png"))
    assert figures
    html = (finished / "report.html").read_text()
    for figure in figures:
        assert figure.read_bytes().startswith(b"\x89PNG")
    assert html.count("data:image/png;base64,") == len(figures)
    stored = {
        path.relative_to(finished / "samples").as_posix() for path in (finished / "samples").rglob("*.npz")
    }
    sets = {path for path in stored if path.startswith("sets/")}
    assert len(sets) == 3
    for strategy in ("none", "full", "partial"):
        of_arm = {path.partition("/")[2] for path in stored if path.startswith(f"{strategy}-seed")}
        assert {path.rpartition("-")[2] for path in of_arm} == {
            "development.npz",
            "external.npz",
            "features.npz",
        }
    assert html.count("data:image/jpeg;base64,") > 3 * 12
    assert "Features of none, seed 0, by class" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "partial" in (finished / "report.md").read_text()


def test_the_keys_of_results_and_ledger(finished):
    results, ledger = rows(finished / "results.jsonl"), rows(finished / "ledger.jsonl")
    assert {frozenset(row) for row in results} == {frozenset(RESULT)}
    assert all(set(row) >= LEDGER for row in ledger)
    arms = {(row["strategy"], row["seed"]) for row in results}
    names = ("none", "full", "partial", "baseline")
    assert arms == {(name, seed) for name in names for seed in (0, 1)}
    assert {row["split"] for row in results} == {"development", "external"}
    assert {row["stage"] for row in ledger} == {"dapt", "transfer"}
    assert {row["phase"] for row in ledger if row["strategy"] == "partial" and row["stage"] == "dapt"} == {
        "head",
        "partial",
    }


def test_the_ledger_holds_what_was_planned(finished, planned):
    ledger = rows(finished / "ledger.jsonl")
    for (strategy, seed), expected in planned.items():
        own = [row for row in ledger if (row["strategy"], row["seed"]) == (strategy, seed)]
        spent = dict.fromkeys(expected, 0)
        for row in own:
            part = "dapt" if row["stage"] == "dapt" else row["phase"].partition("/")[2]
            if part == "saliency":  # it explains results, and is no part of their cost
                assert row["model_flops"] == 0
                continue
            spent[part] += row["model_flops"] + row["reused_flops"]
        assert spent == expected


def test_the_phases_hold_what_was_planned(finished):
    settings, _ = flags.parse(small())
    ready = prepare.prepare(settings)
    ledger = {
        (row["strategy"], row["phase"]): row
        for row in rows(finished / "ledger.jsonl")
        if row["stage"] == "dapt" and row["seed"] == 0
    }
    for arm in ready.arms_of(0)[1:]:
        for phase in plan.of_run(ready.run_of(arm)):
            row = ledger[arm.name, phase.name]
            assert row["model_flops"] + row["reused_flops"] == phase.flops
            told = (row["steps"], row["images"], row["trainable_params"], row["total_params"])
            assert told == (phase.steps, phase.images, phase.trainable, phase.total)


def test_the_seconds_of_a_row_add_up(finished):
    for row in rows(finished / "ledger.jsonl"):
        parts = sum(row[part] for part in PARTS)
        assert parts == pytest.approx(row["wall_s"], rel=0.02, abs=0.2), row["phase"]


def test_a_prefix_is_paid_for_once(finished):
    heads = [row for row in rows(finished / "ledger.jsonl") if row["phase"] == "head" and row["seed"] == 0]
    assert [row["cached"] for row in heads] == ["filled", "reused"]
    assert heads[1]["reused_flops"] > 0


def test_a_finished_study_runs_nothing_again(finished, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished, tmp_path / "study")
    monkeypatch.setattr(study, "adapt", lambda *_: pytest.fail("an arm was run again"))
    (workdir / "status.json").unlink()  # says when the study last ran
    before = contents(workdir)
    assert run(*small(), f"--workdir={workdir}") == 0
    (workdir / "status.json").unlink()
    assert contents(workdir) == before


LOWER = """
import hashlib, jax, numpy as np
from tests import tiny
run = tiny.make_run([tiny.HEAD, tiny.PARTIAL, tiny.FULL], encoder=tiny.encoder(), data=tiny.dataset())
program = run.programs[-1]
state = program.init_state(*program.model.init(0))
images, labels = np.zeros((8, 16, 16, 3), np.uint8), np.zeros(8, np.int32)
batch = {"image": images, "label": labels, "weight": np.ones(8, np.float32), "index": labels}
draw = {"seed": np.uint32(0), "view": np.int32(0)}
text = jax.jit(program.train_step).lower(state, batch, draw, np.float32(1)).as_text()
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_the_next_start_has_the_same_programs():
    """Whatever order Python's sets have in a process: else a program is compiled anew at every start."""
    found = set()
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", LOWER]
        found.add(
            subprocess.run(
                command, capture_output=True, check=True, cwd=ROOT, env=environment, timeout=120
            ).stdout
        )
    assert len(found) == 1


def test_an_arm_that_lacks_results_runs_alone(finished, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished, tmp_path / "study")
    lines = (workdir / "results.jsonl").read_text().splitlines(keepends=True)
    lost = [line for line in lines if '"partial"' in line and '"seed": 1' in line]
    (workdir / "results.jsonl").write_text("".join(line for line in lines if line not in lost))
    monkeypatch.setattr(
        "dapt_jax.training.loop.train", lambda *_: pytest.fail("adapted weights are there already")
    )
    assert run(*small(), f"--workdir={workdir}") == 0
    assert (workdir / "results.jsonl").read_text().splitlines(keepends=True)[-len(lost) :] == lost


def test_a_manifest_and_phases_of_ones_own(tmp_path):
    phantoms.write(tmp_path / "data", 36, 32)
    config = write_config(
        tmp_path,
        "config.strategies = ('mine',)",
        "config.custom_strategies.mine = {'cut_after': 'stage3/block2', 'phases': (",
        "    {'name': 'top', 'epochs': 1, 'trainable': 'head', 'lr': 1e-3, 'augment': False},",
        "    {'name': 'kernels', 'epochs': 1, 'trainable': ('stage3/*/kernel', 'head'), 'lr': 1e-4},",
        ")}",
    )
    workdir = tmp_path / "workdir"
    assert run(f"--config={config}", f"--config.data_dir={tmp_path / 'data'}", f"--workdir={workdir}") == 0
    ledger = [row for row in rows(workdir / "ledger.jsonl") if row["stage"] == "dapt"]
    assert [row["phase"] for row in ledger] == ["top", "kernels"]
    encoder = registry.build("efficientnet_lite0").truncate("stage3/block2")
    shapes, _ = Classifier(encoder, 3).abstract()
    kernels = [
        path for path in freezing.paths(shapes) if path.startswith("stage3/") and path.endswith("/kernel")
    ]
    expected = freezing.count(shapes, [*kernels, "head/kernel", "head/bias"])
    assert ledger[1]["trainable_params"] == expected
    assert ledger[1]["total_params"] == freezing.count(shapes)
    results = rows(workdir / "results.jsonl")
    assert {row["n"] for row in results if row["metric"] == "auc"} == {36}


# ---- report
# -------------------------------------------------------------------------------------------------------


def test_a_report_is_made_from_the_records_alone(finished, tmp_path):
    """In a Python that cannot import JAX, with nothing in the folder but records, predictions and samples."""
    workdir = tmp_path / "study"
    workdir.mkdir()
    for name in ("config.json", "results.jsonl", "ledger.jsonl", "intensities.json", "few_samples.json"):
        shutil.copy(finished / name, workdir)
    for name in ("predictions", "samples"):
        shutil.copytree(finished / name, workdir / name)
    records = contents(workdir)
    code = (
        "import sys; sys.modules['jax'] = sys.modules['flax'] = None; "
        "from dapt_jax.main import main; sys.exit(main(sys.argv))"
    )
    command = [sys.executable, "-c", code, *small(), "--config.mode=report", f"--workdir={workdir}"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"report: {workdir / 'report.html'}" in ended.stdout
    assert {path: path.read_bytes() for path in records} == records
    unread = {"checkpoints", "models"}
    names = {path.relative_to(finished) for path in finished.rglob("*") if not unread & set(path.parts)}
    assert {path.relative_to(workdir) for path in workdir.rglob("*")} == {
        name
        for name in names
        if name.name not in ("checkpoints", "weights.txt", "metrics.jsonl", "status.json")
    }
    assert (workdir / "report.md").read_bytes() == (finished / "report.md").read_bytes()


@pytest.mark.parametrize("mode", ["report", "status"])
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.nonsense=1", "the config has no setting 'nonsense'"),
        ("--config.report.metrc=auc", "did you mean 'report.metric'"),
        ("--nonsense", "no flag '--nonsense'"),
        ("nonsense", "unexpected argument 'nonsense'"),
    ],
)
def test_modes_that_read_records_refuse_what_is_no_setting(finished, capsys, mode, flag, words):
    assert run(f"--config.mode={mode}", flag, f"--workdir={finished}") == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("report.metric=balanced_accuracy", "report.metric=balanced_accuracy: mode=report shows what"),
        ("report.margin=0.2", "config.json records, 0.01"),
        ("energy.region=france", "expected the study's own command, --config.mode=run, with this flag"),
    ],
)
def test_a_report_of_other_settings_is_refused_and_the_study_itself_makes_it(finished, capsys, flag, words):
    assert run("--config.mode=report", f"--config.{flag}", f"--workdir={finished}") == 2
    assert words in capsys.readouterr().err


def test_a_report_takes_the_settings_that_are_recorded(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "study")
    flags = ("--config.report.metric", "auc", "--config.report.margin=1e-2", "--config.corpus.n=48")
    assert run("--config.mode=report", *flags, f"--workdir={workdir}") == 0
    other = "--config.report.metric=balanced_accuracy"
    assert run("--config.mode=report", other, f"--workdir={workdir}") == 2
    assert run(*small(other), f"--workdir={workdir}") == 0
    assert run("--config.mode=report", other, f"--workdir={workdir}") == 0


# ---- the configs of this repository
# -------------------------------------------------------------------------------

CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_its_strategies_resolve(path):
    argument = REQUIRED_ARGUMENTS.get(path.stem, "")
    config, _ = flags.parse([f"--config={path}{argument and ':'}{argument}"])
    encoder = registry.build(config.model.name)
    paths = freezing.paths(Classifier(encoder, 2).abstract()[0])
    for name in config.strategies:
        strategy = strategies.resolve(name, encoder, config)
        model = Classifier(strategy.encoder, 2)
        for phase in strategy.phases:
            mask = freezing.resolve_trainable(phase, model.groups, model.kinds)
            assert mask.trainable <= set(paths)


@pytest.mark.parametrize(
    ("arm", "trainable", "total"),
    [
        ("full", [2_049, 23_483_521], 23_589_761),
        ("l1sb", [2_049, 4_461_569], 23_589_761),
        ("l2sb", [2_049, 8_921_089], 23_589_761),
        ("l1sb_pft", [2_049, 4_461_569, 23_483_521], 23_589_761),
        ("l2sb_pft", [2_049, 8_921_089, 23_483_521], 23_589_761),
        ("f1b", [257, 224_129], 230_017),
        ("f2b", [513, 1_440_385], 1_460_609),
    ],
)
def test_the_seven_arms_of_the_paper_train_what_it_reports(arm, trainable, total):
    """Counts of trained parameters as published with arXiv 2204.13280; batch norm is frozen throughout."""
    config, _ = flags.parse([f"--config={ROOT / 'configs' / 'mehmood2022.py'}:{arm}"])
    assert config.strategies == (arm,)
    strategy = strategies.resolve(arm, registry.build(config.model.name), config)
    model = Classifier(strategy.encoder, 1)
    params, batch_stats = model.abstract()
    masks = [freezing.resolve_trainable(phase, model.groups, model.kinds) for phase in strategy.phases]
    assert [freezing.count(params, mask.trainable) for mask in masks] == trainable
    assert freezing.count(params) + freezing.count(batch_stats) == total
    for mask in masks:
        assert not any(model.kinds[path].is_batch_norm for path in mask.trainable)
        assert mask.batch_norm_modes == {}
