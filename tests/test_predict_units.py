"""Patients of new images: the study's own aggregated predictions are the oracle."""

import csv
import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

import dapt_jax as dj
from dapt_jax.errors import UserError
from dapt_jax.inference import target_model, units
from dapt_jax.inference.predictor import Ensemble, Predictor
from dapt_jax.inference.units import Naming, UnitRule
from dapt_jax.records import predictions
from dapt_jax.settings import default
from tests import command, medical_files

SIDE, EACH = 32, 3


def write_set(folder, name, n):
    """Images of patients with one class each, three in a row, the last two of which are one scan."""
    data = dj.load_dataset("phantoms", name=name, n=n, image_size=SIDE)
    lines = ["image,label,patient,scan"]
    for number in range(n):
        Image.fromarray(data.images[number]).save(folder / f"{name}-{number:02d}.png")
        patient = number // EACH
        lines.append(f"{name}-{number:02d}.png,{'ab'[patient % 2]},{name} {patient},{min(number % EACH, 1)}")
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_set(folder, "development", 36)
    write_set(folder, "external", 18)
    return folder


@pytest.fixture(scope="module")
def workdir(data, tmp_path_factory):
    """Heads of one seed on the first block of an encoder, for two tasks: patients, and scans of patients."""
    config = default()
    config.strategies, config.seeds, config.model.image_size = ("cut",), (0,), SIDE
    config.custom_strategies.cut = {"cut_after": "stage1/block1"}
    sets = {
        split: {"kind": "manifest", "path": str(data / f"{split}.csv")}
        for split in ("development", "external")
    }
    config.tasks.patients = {**sets, "unit": "patient", "aggregate": "vote"}
    config.tasks.scans = {**sets, "unit": "scan"}
    config.transfer.protocols, config.transfer.folds = ("linear",), 2
    config.cache.memory_mb, config.cache.disk_mb = 64, 0
    folder = tmp_path_factory.mktemp("study")
    dj.run_study(config, folder)
    return folder


def model_of(workdir, task):
    return workdir / "models" / task / "cut-linear" / "seed0.safetensors"


def predict(model, place, out, *flags):
    return command.run(
        "--config.mode=predict",
        f"--config.predict.model={model}",
        f"--config.predict.images={place}",
        f"--workdir={out}",
        *flags,
    )


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def stored(workdir, task, protocol):
    return predictions.read(predictions.path_of(workdir, "cut", 0, task, "external"), protocol)


def columns(rows, prefix="p_"):
    return np.array([[float(row[f"{prefix}{name}"]) for name in "ab"] for row in rows])


@pytest.mark.long
@pytest.mark.parametrize(
    ("task", "protocol"),
    [("patients", "linear by patient (vote)"), ("scans", "linear by scan (mean)")],
)
def test_units_have_the_probabilities_that_the_study_stored(workdir, data, tmp_path, task, protocol):
    assert predict(model_of(workdir, task), data / "external.csv", tmp_path) == 0
    rows, expected = table(tmp_path / "predict" / "units.csv"), stored(workdir, task, protocol)
    patients = [f"external {number}" for number in range(6)]
    each = 2 if task == "scans" else 1
    assert [row["patient"] for row in rows] == [name for name in patients for _ in range(each)]
    assert [int(row["images"]) for row in rows] == ([1, 2] * 6 if task == "scans" else [3] * 6)
    assert expected.groups.tolist() == [row["patient"] for row in rows]
    assert columns(rows) == pytest.approx(expected.probabilities, abs=2e-5)
    assert [row["predicted"] for row in rows] == ["ab"[k] for k in expected.probabilities.argmax(1)]
    images = table(tmp_path / "predict" / "predictions.csv")
    assert [row["patient"] for row in images] == [name for name in patients for _ in range(EACH)]
    card = (model_of(workdir, task).parent / "README.md").read_text()
    assert f"| patients or volumes | by {protocol.partition(' by ')[2]}" in card
    assert f"| external | by {protocol.partition(' by ')[2]} | 0 |" in card


@pytest.mark.long
@pytest.mark.parametrize("rule", ["mean", "max", "vote"])
def test_python_gives_the_same_and_the_spread_is_over_members_of_which_each_is_aggregated(
    workdir, data, rule
):
    model = target_model.read(model_of(workdir, "patients"))
    other = dataclasses.replace(model.about, units=UnitRule("patient", rule))
    predictor = Predictor(Ensemble([dataclasses.replace(model, about=other)]))
    rows = table(data / "external.csv")
    paths, names = [data / row["image"] for row in rows], [row["patient"] for row in rows]
    found = predictor(paths, units=names).units
    expected = stored(workdir, "patients", f"linear by patient ({rule})")
    assert found.names == tuple(dict.fromkeys(names))
    assert found.probabilities == pytest.approx(expected.probabilities, abs=2e-5)
    alone = []
    for fold in range(2):
        about = dataclasses.replace(other, folds=(fold,), temperatures=())
        member = dataclasses.replace(model, about=about, members=(model.members[fold],))
        alone.append(Predictor(Ensemble([member]))(paths, units=names).units)
    assert found.spread == pytest.approx(np.std([each.probabilities for each in alone], 0), abs=1e-6)
    assert not any(each.spread.any() for each in alone)
    assert predictor(paths).units is None
    with pytest.raises(UserError, match="17 units of 18 images"):
        predictor(paths, units=names[1:])
    plain = Predictor(Ensemble([dataclasses.replace(model, about=dataclasses.replace(other, units=None))]))
    with pytest.raises(UserError, match=r"tasks\.NAME\.unit=patient"):
        plain(paths, units=names)


@pytest.mark.long
def test_units_after_a_cut_anywhere_are_those_without_one(workdir, data, tmp_path):
    flags = ("--config.predict.batch_size=4", "--config.data.on_bad_image=skip")
    folder = tmp_path / "in"
    shutil.copytree(data, folder)
    for number in (4, 9, 10, 11):  # an image of one patient, and all of another
        (folder / f"external-{number:02d}.png").write_bytes(b"torn")
    model, place = model_of(workdir, "patients"), folder / "external.csv"
    assert predict(model, place, tmp_path / "whole", *flags) == 0
    files = ("predictions.csv", "units.csv", "members.f32")
    whole = {name: (tmp_path / "whole" / "predict" / name).read_bytes() for name in files}
    rows = table(tmp_path / "whole" / "predict" / "units.csv")
    assert [int(row["images"]) for row in rows] == [3, 2, 3, 0, 3, 3]
    assert rows[3]["p_a"] == rows[3]["predicted"] == ""
    for share in (0.0, 0.4, 0.73):
        other = tmp_path / f"cut{share}"
        shutil.copytree(tmp_path / "whole", other)
        (other / "predict" / "units.csv").unlink()
        (other / "predict" / "predictions.csv").write_bytes(
            whole["predictions.csv"][: int(share * len(whole["predictions.csv"]))]
        )
        assert predict(model, place, other, *flags) == 0
        assert {name: (other / "predict" / name).read_bytes() for name in files} == whole
    (other / "predict" / "members.f32").write_bytes(b"")
    assert predict(model, place, other, *flags) == 2


@pytest.mark.long
def test_dicom_headers_name_patients_and_slices_of_a_volume_are_one(workdir, tmp_path, capsys):
    rng = np.random.default_rng(0)
    folder = tmp_path / "in"
    for number in range(4):
        patient = {"PatientID": f"P{number // 2}"}
        values = rng.integers(0, 255, (SIDE, SIDE), np.uint8)
        medical_files.dicom(folder / f"{number}.dcm", values, **patient)
    medical_files.nifti(folder / "scan.nii.gz", rng.integers(0, 255, (8, 8, 5)).astype(np.float32))
    model = model_of(workdir, "patients")
    assert predict(model, folder, tmp_path / "out") == 0
    rows = table(tmp_path / "out" / "predict" / "units.csv")
    assert [(row["patient"], row["images"]) for row in rows] == [
        ("P0", "2"),
        ("P1", "2"),
        ("scan.nii.gz", "5"),
    ]
    paths = [folder / f"{number}.dcm" for number in range(4)]
    found = dj.load_predictor(model)(paths).units
    assert found.names == ("P0", "P1")
    assert columns(rows[:2]) == pytest.approx(found.probabilities, abs=1e-5)
    capsys.readouterr()
    assert predict(model, tmp_path / "absent.csv", tmp_path / "absent") == 2
    assert "absent.csv: no such images" in capsys.readouterr().err
    assert predict(model_of(workdir, "scans"), folder, tmp_path / "scans") == 0
    assert "is no table, which alone can have the column 'scan'" in capsys.readouterr().out
    assert not (tmp_path / "scans" / "predict" / "units.csv").exists()


def test_a_table_names_patients_by_one_column_or_is_refused(tmp_path):
    place = tmp_path / "t.csv"
    by_patient = UnitRule("patient", "mean")

    def named(header, *rows, rule=by_patient):
        place.write_text("\n".join([header, *rows]) + "\n")
        return units.naming(rule, place)

    assert named("image,Patient ID", "a.png,P1") == Naming("Patient ID")
    assert named("image,case", "a.png,case", "b.png,control") == Naming()
    assert named("image,case,patient", "a.png,P2,C3") == Naming("patient")
    with pytest.raises(UserError, match=r"columns 'PatientID' and 'case' may both name patients"):
        named("image,case,PatientID", "a.png,P2,C3")
    of_lesions = UnitRule("patient", "mean", column="lesion")
    assert named("image,patient,lesion", "a.png,P1,L2", rule=of_lesions) == Naming("lesion")
    assert "has no column 'lesion'" in named("image,patient", "a.png,P1", rule=of_lesions)
    assert (
        units.naming(UnitRule("patient", "mean", pattern=r"(P\d+)_"), tmp_path).patient_in("P3_1.png") == "P3"
    )
