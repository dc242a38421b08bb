"""Tasks with official splits: what trains, what is watched, what is scored, and where the lists come from."""

import dataclasses
import itertools

import numpy as np
import pytest

from dapt_jax import metrics
from dapt_jax.data import near_duplicates
from dapt_jax.data.concatenate import concatenate
from dapt_jax.data.decode import ImageStore
from dapt_jax.data.sets import SETS, chest_lists
from dapt_jax.errors import UserError
from dapt_jax.settings import StudySettings, TaskSettings, default, from_json, resolve, to_dict
from dapt_jax.study import leakage
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.classification import HeadRun, finetune_run
from dapt_jax.study.strategies import Strategy
from dapt_jax.study.tasks import ArmKey, Task
from tests import tiny
from tests.small_sets import grey, read, text

SHENZHEN = {"kind": "shenzhen", "path": "Shenzhen"}
KEY = ArmKey("none", 0, "random", "tiny")


def settings_of(**tasks):
    config = default()
    config.tasks.update(tasks)
    config.transfer.head.epochs = 2
    return config


def named(data, prefix):
    """A copy with images and patients of its own names."""
    names = [f"{prefix}/{row}" for row in range(len(data))]
    images = ImageStore.from_arrays(data.images.batch(range(len(data))), data.images.size, names)
    return dataclasses.replace(data, images=images, groups=np.char.add(prefix, data.groups))


def parts(**sizes):
    return {name: named(tiny.dataset(n, seed=n), name) for name, n in sizes.items()}


# --- settings


def test_a_task_that_names_a_set_takes_its_official_lists_and_adds_splits():
    task = resolve(settings_of(tb={**SHENZHEN, "external": {"kind": "montgomery", "path": "M"}})).tasks["tb"]
    wheres = {split: source.get("where") for split, source in task.sources.items()}
    assert wheres == {"train": "split=train", "val": "split=val", "test": "split=test", "external": None}
    narrowed = TaskSettings.from_config(
        {"kind": "covid_qu", "path": "C", "where": "label=COVID-19"}, "tasks.c"
    )
    assert narrowed.sources["val"]["where"] == "split=val,label=COVID-19"


@pytest.mark.parametrize("kind", sorted(kind for kind, entry in SETS.items() if entry.official))
def test_every_official_list_trains_and_tests(kind):
    assert {"train", "test"} <= set(SETS[kind].official) <= {"train", "val", "test"}


def test_settings_of_splits_and_lists_of_sources_survive_a_workdir():
    given = resolve(settings_of(tb={"train": (SHENZHEN, {"kind": "folder", "path": "x"}), "val": SHENZHEN}))
    assert from_json(to_dict(given)).tasks == given.tasks
    assert len(given.tasks["tb"].train) == 2


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"kind": "montgomery", "path": "M"},
            "kind 'montgomery' has no official lists; expected development or",
        ),
        (
            {"train": SHENZHEN, "development": SHENZHEN},
            "has development and train; expected either development,",
        ),
        ({"val": SHENZHEN}, "has no development images, and no train"),
        ({"train": ()}, "tb train: an empty list; expected one source or more"),
        ({"tran": SHENZHEN}, "has no split 'tran'; did you mean 'train'"),
    ],
)
def test_splits_that_do_not_go_together_are_one_line(task, message):
    with pytest.raises(UserError, match=message):
        resolve(settings_of(tb=task))


def test_an_early_stop_needs_a_part_held_out_or_an_official_validation_split():
    config = settings_of(tb=SHENZHEN)
    config.transfer.finetune.early_stopping_patience = 3
    assert resolve(config).transfer.finetune.val_fraction == 0
    config.tasks.other = {"train": SHENZHEN, "test": SHENZHEN}
    with pytest.raises(UserError, match=r"needs rows to watch; expected .*, or a val split in every task"):
        resolve(config)


def test_tasks_of_one_study_have_settings_of_their_own():
    settings = resolve(
        settings_of(
            idrid={
                "kind": "idrid",
                "path": "I",
                "transfer": {"segmentation": {"augment": {"patch": 224}, "epochs": 3}},
            },
            acdc={"kind": "acdc", "path": "A"},
        )
    )
    idrid, acdc = (settings.of_task(name).transfer.segmentation for name in ("idrid", "acdc"))
    assert (idrid.augment.patch, idrid.epochs, idrid.batch_size) == (224, 3, acdc.batch_size)
    assert acdc == settings.transfer.segmentation == settings.of_task("none of them").transfer.segmentation
    assert from_json(to_dict(settings)).tasks == settings.tasks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"segmentation": {"epoch": 3}},
            r"tasks.t.transfer: .* no setting 'segmentation.epoch'; did you mean",
        ),
        (
            {"segmentation": {"epochs": "many"}},
            r"tasks.t.transfer.segmentation.epochs is 'many'; expected a whole",
        ),
        ({"folds": 1}, r"tasks.t.transfer.folds is 1; expected 2 or more"),
        (3, r"tasks.t.transfer is 3; expected settings such as"),
        (
            {"finetune": {"early_stopping_patience": 2}},
            r"tasks.t.transfer.finetune.early_stopping_patience needs",
        ),
    ],
)
def test_settings_of_a_task_that_cannot_be_are_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        resolve(settings_of(t={"kind": "acdc", "path": "A", "transfer": changes}))


def test_the_auc_of_chosen_classes_is_the_mean_of_theirs():
    rng = np.random.default_rng(0)
    labels, said = rng.integers(0, 2, (50, 4)).astype(float), rng.random((50, 4))
    labels[:, 3] = 0
    scores = {
        s.metric: s for s in metrics.classification(labels, said, tuple("abcd"), subset=("c", "a", "d"))
    }
    assert scores["auc_subset"].classes == ("c", "a")  # d has no positive
    assert scores["auc_subset"].value == pytest.approx((scores["auc/a"].value + scores["auc/c"].value) / 2)
    assert "auc_subset" not in {s.metric for s in metrics.classification(labels, said, tuple("abcd"))}
    with pytest.raises(UserError, match=r"tasks.t.auc_classes: no class 'clas1'; did you mean 'class1'"):
        Task.of("t", {"development": tiny.dataset(6)}, auc_classes=("clas1",))


# --- what trains and what is watched


def test_all_of_train_trains_and_the_loss_is_watched_on_val():
    task = Task.of("t", parts(train=30, val=10, test=12))
    assert [list(map(len, fold)) for fold in task.folds(5, 0)] == [[30, 10]]
    arm = Arm(Strategy("none", tiny.encoder(), (), "random"), 3)
    run = finetune_run(Study(StudySettings()), arm, task, tiny.encoder(), 0, task.folds(5, 3)[0][0])
    assert (run.train_rows.tolist(), run.val_rows.tolist()) == (list(range(30)), list(range(30, 40)))
    without = Task.of("t", parts(train=30, test=12))
    run = finetune_run(Study(StudySettings()), arm, without, tiny.encoder(), 0, without.folds(5, 3)[0][0])
    assert (len(run.train_rows), len(run.val_rows)) == (30, 0)


@pytest.mark.parametrize(
    ("protocol", "splits"),
    [("linear", {"train": 30, "val": 10, "test": 12}), ("mlp_small", {"train": 30, "test": 12})],
)
def test_heads_are_scored_on_val_and_test_and_val_chooses(splits, protocol, monkeypatch):
    task = Task.of("t", parts(**splits))
    if "val" in splits:
        monkeypatch.setattr(near_duplicates, "merged", lambda _: pytest.fail("nothing is divided"))
        ((inner,),) = task.inner_folds([np.arange(30)], 3, 0)
        assert [rows.tolist() for rows in inner] == [list(range(30)), list(range(30, 40))]
    rng = np.random.default_rng(0)
    features = {
        split: rng.normal(size=(len(data), 4)).astype(np.float32) for split, data in task.datasets.items()
    }
    settings = resolve(settings_of(t=SHENZHEN))
    rows = HeadRun(settings, task, KEY, protocol).measure(features, None)
    assert {row["split"]: row["n"] for row in rows} == {k: n for k, n in splits.items() if k != "train"}


def test_one_split_seed_is_one_split_whatever_the_seed_of_training():
    data = {"development": tiny.dataset(40)}
    free, fixed = Task.of("t", data), Task.of("t", data, split_seed=7)

    def folds(task, seed):
        return [held.tolist() for _, held in task.folds(4, seed)]

    assert folds(free, 1) != folds(free, 2)
    assert folds(fixed, 1) == folds(fixed, 2) == folds(free, 7)
    inner = [fixed.inner_split(np.arange(40), 0.25, seed)[1].tolist() for seed in (1, 2)]
    assert inner[0] == inner[1]


def test_patients_of_train_in_val_are_refused_in_one_line():
    shared = parts(train=30, val=10)
    shared["val"] = dataclasses.replace(
        shared["val"], groups=np.append(shared["val"].groups[:8], shared["train"].groups[:2])
    )
    with pytest.raises(UserError, match="1 patient is in both t val and t train, first: trainp0") as caught:
        leakage.resolve([Task.of("t", shared)], {})
    assert "\n" not in str(caught.value)
    kept = leakage.resolve([Task.of("t", shared)], {}, "drop_train").tasks[0]
    assert (len(kept.parts["train"]), len(kept.parts["val"]), len(kept.development)) == (28, 10, 38)


# --- several sources


def test_concatenated_sets_hold_the_images_in_order():
    sets = [named(tiny.dataset(n, seed=n), f"s{n}") for n in (6, 4, 5)]
    whole = concatenate(sets)
    pixels = np.concatenate([data.images.batch(range(len(data))) for data in sets])
    np.testing.assert_array_equal(whole.images.batch(range(15)), pixels)
    rows = [14, 0, 7, 7, 9]
    part = whole.take(rows)
    np.testing.assert_array_equal(part.images.batch(range(5)), pixels[rows])
    assert part.labels.tolist() == np.concatenate([data.labels for data in sets])[rows].tolist()
    assert len(set(whole.images.names)) == 15
    digests = {whole.take(order).fingerprint() for order in itertools.permutations((0, 6, 10))}
    assert len(digests) == 6
    assert whole.images.constant().tolist() == [False] * 15
    seen = near_duplicates.looks(whole.images)
    near_duplicates.remember(part.images, seen.take(np.array(rows)))
    np.testing.assert_array_equal(seen.digests[:6], near_duplicates.looks(sets[0].images).digests)


def test_equal_names_in_two_cohorts_are_two_patients():
    here, there = (
        dataclasses.replace(tiny.dataset(6, seed=n), cohort=name) for n, name in ((1, "A"), (2, "B"))
    )
    both = concatenate([here, there])
    assert sorted(set(both.groups)) == [f"p{n} ({name})" for n in range(3) for name in "AB"]
    alone = dataclasses.replace(tiny.dataset(2, seed=3), cohort="A")
    (leak,) = leakage.between(both, alone, "both", "alone")
    assert (leak.patient, leak.rows_a, leak.rows_b) == ("p0", (0, 1), (0, 1))
    same = concatenate([dataclasses.replace(data, cohort="") for data in (here, there)])
    assert len(set(same.groups)) == 3


def test_sources_of_other_classes_are_one_line():
    other = dataclasses.replace(tiny.dataset(6), classes=("a", "b", "c"), name="other")
    with pytest.raises(
        UserError, match="classes of other are a, b, c, of tiny class0, class1, class2; expected"
    ):
        concatenate([tiny.dataset(6), other])


# --- conditions and lists


def test_a_condition_takes_several_values_and_labels():
    data = dataclasses.replace(tiny.dataset(6), columns={"split": np.array(["train", "VAL", "test"] * 2)})
    assert len(data.where("split=train|val")) == 4
    assert set(data.where("label=class0|class2").labels) == set(data.labels) - {1}
    with pytest.raises(UserError, match=r"no row has 'split=train\|vall'; valid: 'VAL', 'test', 'train'"):
        data.where("split=train|vall")
    flags = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]], np.float32)
    several = dataclasses.replace(data, labels=flags)
    assert several.where("label=class1").labels.tolist() == flags[:2].tolist()
    assert len(several.where("label=class1|class2")) == 3


def test_lists_of_the_published_length_are_read_whole(tmp_path):
    start, counts = 0, {"train": 75_312, "val": 11_212, "test": 25_596}
    for split, count in counts.items():
        lines = (f"{row:08d}_000.png" + " 0" * 14 for row in range(start, start + count))
        text(tmp_path / f"Xray14_{split}_official.txt", "\n".join(lines))
        start += count
    found = [record.columns["split"] for record in chest_lists.chestxray14(tmp_path)]
    assert {split: found.count(split) for split in counts} == counts
    assert start == 112_120


def test_shenzhen_without_folds_is_what_its_lists_say(tmp_path):
    names = {"train": (0, 1, 1), "valid": (0, 1), "test": (1, 0)}
    number = itertools.count()
    for split, labels in names.items():
        rows = [(f"CHNCXR_{next(number):04d}_{label}.png", label) for label in labels]
        for name, _ in rows:
            grey(tmp_path / "CXR_png" / name)
        content = "\n".join(f"{name},{label}" for name, label in rows)
        text(tmp_path / f"ShenzenCXR_{split}_data.txt", content)
    spec = TaskSettings.from_config({"kind": "shenzhen", "path": str(tmp_path)}, "tasks.tb")
    task = Task.of(
        "tb",
        {s: read(tmp_path, "shenzhen", where=source["where"]) for s, source in spec.sources.items()},
    )
    assert {split: len(data) for split, data in task.parts.items()} == {"train": 3, "val": 2, "test": 2}
    assert task.development.labels.tolist() == [0, 1, 1, 0, 1]


def test_siim_names_its_splits_by_folder(tmp_path):
    for split, number in (("train", 0), ("train", 1), ("test", 2)):
        for kind, value in (("images", None), ("masks", 0)):
            grey(tmp_path / split / kind / f"{number}.png", value=value)
    assert read(tmp_path, "siim_acr").columns["split"].tolist() == ["test", "train", "train"]
    assert len(read(tmp_path, "siim_acr", where="split=train")) == 2
