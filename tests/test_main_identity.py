"""The command line says what it took for what, before anything is trained, and refuses what it cannot know."""

import json

import pytest

from tests.command import rows, run, write_config

RANDOM = "config.weights = 'random'"


@pytest.fixture
def planned(tmp_path, data, capsys):
    """Plans the study of a manifest, with more lines in its config; returns what is printed."""

    def plan(*more):
        config = write_config(tmp_path, RANDOM, *more)
        flags = (f"--config={config}", f"--config.data_dir={data.folder}", "--config.mode=plan")
        assert run(*flags) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return plan


def test_columns_taken_by_another_name_are_said_once_for_each_set(planned, data):
    data.change(1, "patient", "Smear_ID")
    data.change(1, "label", "class")
    data.change(1, "image", "file_name")
    out = planned("config.corpus.group = 'Smear_ID'", "config.tasks.cells.development.group = 'smear id'")
    assert out.count("'class' holds the labels") == 3
    assert "warning: corpus: " in out
    assert "warning: cells external: " in out
    assert (
        "group='Smear_ID' keeps each of them on one side of every split" in out
    )  # external, which does not use it


def test_look_alikes_are_counted_beside_the_patients(planned, data):
    first, copy = (
        row for row, line in enumerate(data.lines, 1) if line.endswith(",development") and row in (38, 47)
    )
    data.spoil(copy, data.image(first).read_bytes())
    out = planned()
    assert "patients, 2 look-alikes merged" in out
    assert "warning: cells development: 2 images of different patients look alike (1 pairs, first: " in out
    out = planned("config.tasks.cells.development.merge_look_alikes = False")
    assert "look-alikes merged" not in out


def test_a_corpus_of_one_patient_names_the_corpus_and_the_setting(refused_data, planned, data):
    for row, line in enumerate(data.lines, 1):
        if line.endswith(",corpus"):
            data.change(row, "patient", "only-one")
    refused_data(
        RANDOM, words=["corpus: all 36 images are of one patient (only-one)", "corpus.val_fraction=0"]
    )
    planned("config.corpus.val_fraction = 0.0")


def test_named_grades_without_an_order_are_refused(refused_data):
    words = [
        "cells development: ",
        "grades need an order",
        "basophil, eosinophil",
        "classes='LOWEST,...,HIGHEST'",
    ]
    refused_data(RANDOM, "config.transfer.head.loss.name = 'ordinal'", words=words)
    words = ["corpus: ", "grades need an order", "erythrocyte, leukocyte, platelet"]
    refused_data(RANDOM, "config.adapt.loss.name = 'ordinal'", words=words)


def test_a_class_of_one_patient_is_named_with_its_fold(planned, data):
    development = [row for row, line in enumerate(data.lines, 1) if line.endswith(",development")]
    for row in development:
        if "basophil" in data.lines[row - 1]:
            data.change(row, "patient", "with-basophils")
    assert "class 'basophil' has 1 patient: the training part of fold " in planned()


def test_images_without_content_are_told_of(planned, data):
    from PIL import Image

    for row in (3, 4):
        path = data.image(row)
        path.unlink()
        Image.new("RGB", (32, 32), (0, 0, 0)).save(path)
    assert "warning: corpus: 2 of 36 images (5.6%) are without content (all black 2), first: " in planned()


def test_leaks_between_sets_are_refused_dropped_or_marked(refused_data, planned, data, tmp_path, capsys):
    inside = next(row for row, line in enumerate(data.lines, 1) if line.endswith(",development"))
    outside = next(row for row, line in enumerate(data.lines, 1) if line.endswith(",external"))
    data.spoil(outside, data.image(inside).read_bytes())
    words = [
        "1 image is in both cells external and cells development (by content 1)",
        "data.leaks='drop_train'",
    ]
    refused_data(RANDOM, words=words)
    assert (
        "warning: leaks dropped: 6 images of cells external (5 as others of the same patients), since"
        in planned("config.data.leaks = 'drop_eval'")
    )
    config = write_config(
        tmp_path, RANDOM, "config.data.leaks = 'mark'", "config.strategies = ('none',)",
        "config.transfer.head.loss.name = 'ordinal'",
        "for split in ('development', 'external'):",
        "    config.tasks.cells[split].classes = 'basophil,eosinophil,lymphocyte,monocyte,neutrophil'",
    )  # fmt: skip
    workdir = tmp_path / "marked"
    assert run(f"--config={config}", f"--config.data_dir={data.folder}", f"--workdir={workdir}") == 0
    assert "warning: leaks kept, and marked in every table: 1 image is in both" in capsys.readouterr().out
    assert json.loads((workdir / "leaks.json").read_text()) == {
        "cells": {"external": "1 image (by content 1)"}
    }
    assert "external ‡" in (workdir / "report.md").read_text()
    # Own data that is declared ordinal, by its loss, has a quadratic kappa too.
    metrics = {row["metric"] for row in rows(workdir / "results.jsonl")}
    assert "kappa_quadratic" in metrics
