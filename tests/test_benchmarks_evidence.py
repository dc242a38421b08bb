"""The tables of docs/evidence.md are drawn from whatever records there are."""

import json

import numpy as np
import pytest

from benchmarks import common, evidence, paper_arms
from dapt_jax.errors import UserError
from dapt_jax.records import arrays, case_scores, predictions
from dapt_jax.records.ledger import Ledger, Row
from dapt_jax.runtime import atomic_files
from dapt_jax.statistics import Aggregation, mean_interval

LEVELS = {"none": 0.70, "full": 0.90, "full_10": 0.80, "partial_10": 0.895, "full_30": 0.92}
COSTS = {"none": 0, "full": 1000, "full_10": 100, "partial_10": 90, "full_30": 300}


def study(folder, levels=LEVELS, seeds=4, images="", metric="auc"):
    """Write the records of a study whose scores differ by level, with luck that strategies share by seed."""
    folder.mkdir(parents=True)
    config = {
        "strategies": list(LEVELS),
        "seeds": list(range(seeds)),
        "report": {"metric": metric, "margin": 0.01},
        "tasks": {"t": {"external": images or folder.name}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    rows, ledger = [], Ledger(folder / "ledger.jsonl")
    for place, (name, level) in enumerate(levels.items()):
        for seed in range(seeds):
            for split, shift in (("development", 0.0), ("external", -0.1)):
                key = {"strategy": name, "seed": seed, "task": "t", "split": split, "protocol": "linear"}
                luck = 0.01 * seed + 0.001 * ((seed * 7 + place * 3) % 4)
                rows.append({**key, "metric": metric, "value": level + shift + luck, "n": 60})
            ledger.put(Row(name, seed, "dapt", "p", model_flops=COSTS[name] * 10**9, wall_s=COSTS[name] / 10))
            ledger.put(
                Row(name, seed, "transfer", "t/linear", model_flops=10**9, wall_s=1.0, energy_kwh=1e-5)
            )
    atomic_files.write(folder / "results.jsonl", rows)
    return folder


def drawn(tmp_path, text=f"above\n{evidence.BEGIN}\nold\n{evidence.END}\nbelow\n"):
    page = tmp_path / "page.md"
    page.write_text(text)
    code = evidence.main([f"--records={tmp_path / 'records'}", f"--page={page}"])
    return code, page.read_text()


def test_the_best_length_is_chosen_on_development_and_the_claim_is_tested_against_it(tmp_path):
    study(tmp_path / "records" / "mine")
    code, text = drawn(tmp_path)
    assert code == 0
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "\nold\n" not in text
    assert "Full at its best length on development images: `full_30`. Margin 0.01." in text
    assert "Non-inferior to `full_30` at 10% of its longest FLOPs or less: none shown." in text
    partial = next(line for line in text.splitlines() if line.startswith("| `partial_10`"))
    assert "| 9% |" in partial
    assert "+0.09" in partial.split("|")[8], "against full of equal FLOPs"
    assert (tmp_path / "evidence" / "figures" / "mine_t_external.png").stat().st_size > 5000


def test_a_claim_is_won_where_it_is_shown(tmp_path):
    study(tmp_path / "records" / "mine", {**LEVELS, "partial_10": 0.925})
    _, text = drawn(tmp_path)
    assert "10% of its longest FLOPs or less: `partial_10`." in text


def test_unfinished_studies_and_none_at_all_are_drawn_too(tmp_path):
    _, text = drawn(tmp_path)
    assert "No records yet." in text
    study(tmp_path / "records" / "mine", {"none": 0.7, "full": 0.9})
    _, text = drawn(tmp_path)
    assert "Partial: 12 arms of `mine` have not run." in text
    assert "Full at its best length on development images: `full`." in text


def test_a_data_set_counts_once_over_the_data_sets(tmp_path):
    folder = tmp_path / "records"
    study(folder / "a", images="same")
    study(folder / "b", images="same")
    assert evidence.over_data_sets(evidence.panels(folder)) == []
    study(folder / "c")
    lines = evidence.over_data_sets(evidence.panels(folder))
    assert [line.split("|")[1:3] for line in lines if "partial_10" in line] == [[" `partial_10` ", " 2 "]]
    study(folder / "d", metric="dice")  # no difference in AUC
    assert evidence.over_data_sets(evidence.panels(folder)) == lines
    study(folder / "e", metric="dice")
    both = evidence.over_data_sets(evidence.panels(folder))
    assert [line for line in both if line.startswith("#")] == [
        f"### Over the data sets, {m}" for m in ("AUC", "Dice")
    ]


def test_patients_count_where_predictions_are_kept_and_widen_the_interval(tmp_path):
    folder = study(tmp_path / "records" / "mine")
    (before,) = evidence.panels(folder.parent)
    alone, said = before.compare("partial_10", "full")
    assert said == "seeds alone"
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    for name in ("full", "partial_10"):
        for seed in range(4):
            p = np.clip(0.5 + 0.2 * (labels - 0.5) + rng.normal(0, 0.2, 60), 0, 1)
            path = predictions.path_of(folder, name, seed, "t", "external")
            path.parent.mkdir(parents=True, exist_ok=True)
            both = np.stack([1 - p, p], 1)
            np.savez(path, label=labels, group=np.arange(60).astype(str), **{"probability/linear": both})
    both, said = before.compare("partial_10", "full")
    assert said == "60 images"
    assert both.error > alone.error


def test_what_is_published_of_a_study_draws_the_same_page(tmp_path):
    folder = study(tmp_path / "records" / "mine")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "data_dir": "/home/someone/images"}))
    labels = np.arange(60) % 2
    for name in LEVELS:
        for seed in range(4):
            p = np.random.default_rng(seed).uniform(0, 1, 60)
            held = {"label": labels, "group": np.arange(60).astype(str), "image": np.arange(60).astype(str)}
            for split in ("external", "development"):
                path = predictions.path_of(folder, name, seed, "t", split)
                arrays.write(
                    path,
                    {
                        **held,
                        "probability/linear": np.stack([1 - p, p], 1),
                        "seen/linear": np.ones((60, 2), bool),
                    },
                )
    other = {
        "strategy": "full",
        "seed": 0,
        "task": "t",
        "split": "external",
        "protocol": "linear",
        "metric": "f1",
    }
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps({**other, "value": 0.5, "n": 60}) + "\n")
    assert evidence.main([f"--publish={folder}", f"--records={tmp_path / 'published'}"]) == 0
    published = tmp_path / "published" / "mine"
    assert evidence.page(evidence.panels(published.parent)) == evidence.page(evidence.panels(folder.parent))
    kept = predictions.path_of(published, "full", 0, "t", "external")
    assert (
        predictions.read(kept, "linear") is None
    )  # what a report computes of probabilities is not computed of their order
    assert "someone" not in "".join(path.read_text() for path in published.glob("*.json*"))
    assert {path.name for path in published.rglob("*.npz")} == {"t-external.npz"}


def further(folder, seeds=(4, 5), **changes):
    """Write the records of a study's further seeds of two arms."""
    levels = {"none": 0.7, "full": 0.915}
    study(folder, levels, seeds=6, images="mine")
    config = json.loads((folder / "config.json").read_text())
    config |= {"seeds": list(seeds), "strategies": list(levels), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("results.jsonl", "ledger.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        atomic_files.write(folder / name, [row for row in rows if row["seed"] in seeds])
    return folder


def test_further_seeds_are_added_to_a_published_study(tmp_path):
    published = study(tmp_path / "published" / "mine", {**LEVELS, "full": 0.915})
    (before,) = evidence.panels(published.parent)
    assert before.best_full() == "full_30"
    workdir = further(tmp_path / "further" / "mine")
    add = [f"--publish={workdir}", "--further-seeds", f"--records={published.parent}"]
    assert evidence.main(add) == 0
    (panel,) = evidence.panels(published.parent)
    assert [len([v for v in panel.values(name) if v is not None]) for name in LEVELS] == [6, 6, 4, 4, 4]
    assert panel.values("full_10")[:4] == before.values("full_10")
    # Seeds 4 and 5 raise the mean of full above that of full_30, which did not run with them.
    assert panel.best_full() == "full_30"
    lines = evidence.page([panel]).splitlines()
    assert "Further seeds of `mine`, 4, 5, have run for `none`, `full` alone." in lines
    assert not any(line.startswith("Partial") for line in lines)
    assert evidence.main(add) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": {"t": {"external": "others"}}}, "tasks.t.external differs from"),
        ({"strategies": ["none", "new"]}, "'new' is no strategy of"),
        ({"seeds": [3]}, "seed 3 is in"),
    ],
)
def test_further_seeds_of_another_study_are_not_added(changes, said, tmp_path, capsys):
    published = study(tmp_path / "published" / "mine")
    before = {path: path.read_bytes() for path in published.iterdir()}
    workdir = further(tmp_path / "further" / "mine", **changes)
    add = [f"--publish={workdir}", "--further-seeds", f"--records={published.parent}"]
    assert evidence.main(add) == 2
    assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in published.iterdir()} == before


def test_published_scores_of_masks_are_those_of_the_same_images(tmp_path):
    folder, names = study(tmp_path / "records" / "mine"), np.array([f"{n}.png" for n in range(9, -1, -1)])
    for seed in (0, 1):
        dice = np.random.default_rng(seed).random((10, 2), np.float32)
        scores = case_scores.CaseScores(dice, names.astype(object), names)
        case_scores.write(case_scores.path_of(folder, "full", seed, "m", "external", "frozen"), scores)
    assert evidence.main([f"--publish={folder}", f"--records={tmp_path / 'published'}"]) == 0
    kept = [
        case_scores.read(case_scores.path_of(each, "full", seed, "m", "external", "frozen"))
        for each in (folder, tmp_path / "published" / "mine")
        for seed in (0, 1)
    ]
    assert np.array_equal(kept[1].dice, kept[3].dice)
    assert kept[2].same_images(kept[3])
    assert np.array_equal(np.argsort(kept[2].groups), np.argsort(kept[0].groups))


def test_published_predictions_of_units_stay_probabilities_and_patients_keep_their_numbers(tmp_path):
    folder = study(tmp_path / "records" / "mine")
    p = np.random.default_rng(0).random(12)
    for name, first in (("full", 0), ("none", 100)):
        patients = np.array([f"Smith {first + n // 2}" for n in range(12)])
        held = {"label": np.arange(12) // 2 % 2, "group": patients, "image": patients, "unit": patients}
        probabilities = {"probability/linear": np.stack([1 - p, p], 1).astype(np.float32)}
        arrays.write(predictions.path_of(folder, name, 0, "t", "external"), {**held, **probabilities})
    assert evidence.main([f"--publish={folder}", f"--records={tmp_path / 'published'}"]) == 0
    protocol = Aggregation("patient", "mean").protocol("linear")
    found = {
        name: [
            predictions.read(predictions.path_of(each, name, 0, "t", "external"), protocol)
            for each in (folder, tmp_path / "published" / "mine")
        ]
        for name in ("full", "none")
    }
    for before, after in found.values():
        assert before.auc(np.arange(6)) == after.auc(np.arange(6))
    assert not found["full"][1].same_images(found["none"][1])
    assert not any(b"Smith" in path.read_bytes() for path in (tmp_path / "published").rglob("*.npz"))


def test_published_probabilities_keep_order_and_ties():
    n = evidence.MOST_LEVELS + 1
    drawn = np.random.default_rng(0).random((n, 2), np.float32) ** 9
    drawn[: n // 4] = drawn[n // 4 : 2 * (n // 4)]
    assert evidence.ordered(np.linspace(0, 1, n)[:, None]) is None
    assert evidence.ordered(np.array([[0.5], [np.nan]])) is None
    assert len(np.unique(evidence.ordered(np.linspace(0, 1, 1024)[:, None]))) == 1024
    kept = evidence.ordered(drawn)
    assert kept.min() >= 0
    assert kept.max() <= 1
    for before, after in zip(drawn.T, kept.T, strict=True):
        assert np.array_equal(
            np.unique(before, return_inverse=True)[1], np.unique(after, return_inverse=True)[1]
        )


def test_a_study_is_not_published_onto_itself(tmp_path, capsys):
    folder = study(tmp_path / "records" / "mine")
    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    assert evidence.main([f"--publish={folder}", f"--records={folder.parent}"]) == 2
    assert "is written anew; expected a workdir outside of it" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*.json*")} == before


def test_a_page_without_marks_is_refused_in_one_line(tmp_path, capsys):
    code, text = drawn(tmp_path, "no marks\n")
    assert (code, text) == (2, "no marks\n")
    assert "page.md: no lines <!-- begin" in capsys.readouterr().err
    with pytest.raises(UserError, match="expected both"):
        common.between_marks(evidence.BEGIN, evidence.BEGIN, "new", tmp_path)


def test_the_page_has_every_arm_of_the_committed_records_with_its_score():
    sections = evidence.PAGE.read_text(encoding="utf-8").split("\n### ")
    for panel in evidence.panels(evidence.FOLDER):
        (section,) = [each for each in sections if each.startswith(f"{panel.title}\n")]
        rows = {
            line.split("|")[1].strip(" `"): line for line in section.splitlines() if line.startswith("| `")
        }
        assert set(rows) == set(panel.arms), "run python -m benchmarks.evidence"
        for name, row in rows.items():
            mean = f"{mean_interval(panel.values(name)).mean:.3f}"
            assert row.split("|")[4].split()[0] == mean, "run python -m benchmarks.evidence"


def test_the_papers_arms_stand_beside_its_table_as_their_records_say(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"{paper_arms.BEGIN}\n{common.END}\n")
    assert paper_arms.main([f"--page={page}"]) == 0
    table = page.read_text().partition(common.END)[0]
    assert table in paper_arms.PAGE.read_text(), "run python -m benchmarks.paper_arms"
    # One of the 21 pairs of arms is in the other order: (20 - 1) / 21.
    assert "| `f1b` | 0.872 | 0.822 | 0.812 | 0.688 |" in table
    assert "this one: +0.90 inside, +0.05 outside." in table
    study(tmp_path / "another")
    assert paper_arms.main([f"--page={page}", f"--records={tmp_path / 'another'}"]) == 2
    assert (
        "full has no AUC of tumour; expected the records of configs/evidence/mehmood2022.py"
        in capsys.readouterr().err
    )
