import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from dapt_jax.errors import UserError
from dapt_jax.formatting import NONE, number
from dapt_jax.records import intensities
from dapt_jax.records.ledger import Ledger
from dapt_jax.records.study_records import Records
from dapt_jax.report import build, main_table, narrative, tables
from dapt_jax.runtime import atomic_files
from tests import test_report_example as report_example

TASK = "tumour type"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    workdir = report_example.write(tmp_path_factory.mktemp("study"))
    build(workdir)
    return workdir


def read(workdir):
    return (workdir / "report.html").read_text(), (workdir / "report.md").read_text()


def edit(workdir, name, keep):
    lines = [row for row in atomic_files.read(workdir / name) if keep(row)]
    atomic_files.write(workdir / name, lines)


def test_page_is_one_file_and_complete(study):
    page, text = read(study)
    assert "SYNTHETIC images" in page
    assert "SYNTHETIC images" in text
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert not re.search(r"url\(|@import", page)
    names = sorted(path.name for path in (study / "figures").iterdir())
    assert names == ["cost_score_tumour_type.png", "learning_curves.png", "seeds_tumour_type.png", "time.png"]
    assert page.count("data:image/png;base64,") == len(names)
    for name in names:
        assert f"figures/{name}" in text
        with Image.open(study / "figures" / name) as image:
            assert min(image.size) > 300
    for word in (
        "Holm",
        "paired t-test",
        "Student t",
        "Standalone",
        "mean_gradient",
        *report_example.STRATEGIES,
    ):
        assert word in page
        assert word in text
    assert "kWh" in page
    assert "balanced accuracy" in page


def test_numbers_of_the_main_table(study):
    records = Records.read(study)
    table = main_table.table(records, TASK)
    rows = {row[0].text: dict(zip(table.flat, row, strict=True)) for row in table.rows}
    development = [
        row["value"]
        for row in records.results
        if (row["strategy"], row["split"], row["protocol"], row["metric"])
        == ("full", "development", "linear", "auc")
    ]
    assert len(development) == 3
    assert rows["full"]["development"].text == f"{sum(development) / 3:.3f}"
    assert rows["full"]["adapt TFLOP"].text == "5,200"
    # Of partial's 160 TFLOP of head training it ran a tenth; alone it would have run it all.
    assert rows["partial"]["adapt TFLOP"].text == "880"
    assert rows["partial"]["FLOPs"].text == "17%"
    assert rows["partial"]["trained parameters"].text == "4.46 M"
    assert rows["none"]["adapt TFLOP"].text == "0"
    assert rows["full"]["p external, paired"].text == "reference"
    assert rows["baseline"]["development"].text == "0.710"
    assert rows["baseline"]["kWh"].text == NONE
    assert [name for name, row in rows.items() if row["development"].best] == ["full"]
    assert all(
        len(row) == len(table.columns) == sum(width for _, width in table.groups) for row in table.rows
    )


def test_bill_adds_up_and_cost_is_standalone(study):
    records = Records.read(study)
    full = {row[0].text: row for row in tables.totals(records).rows}
    assert (
        full["all"][tables.totals(records).columns.index("wall")].text
        == f"{sum(r.wall_s for r in records.rows):,.0f}"
    )
    rows = [row for row in records.rows if (row.strategy, row.seed) == ("partial", 0)]
    cost = records.costs("partial", TASK)[0]
    assert cost.total_flops == sum(row.model_flops + row.reused_flops for row in rows)
    assert cost.wall_s == pytest.approx(sum(row.wall_s + row.reused_s for row in rows))
    assert cost.kwh == pytest.approx(sum(r.energy_kwh * (1 + r.reused_s / r.wall_s) for r in rows))
    assert cost.trainable == 4_461_569


def test_utilisation_and_carbon_follow_ledger_and_region(tmp_path):
    workdir = report_example.write(tmp_path, seeds=(0, 1), strategies=("full", "none"))
    assert "peak is not known" in tables.totals(Records.read(workdir)).note
    ledger = Ledger(workdir / "ledger.jsonl")
    for row in ledger.rows():
        rate = row.model_flops / (row.train_s + row.cache_s)
        ledger.put(dataclasses.replace(row, peak_flops=4 * rate, hardware_flops=2 * row.model_flops))
    table = tables.totals(Records.read(workdir))
    bill = dict(zip(table.columns, table.rows[-1], strict=True))
    assert (bill["MFU"].text, bill["HFU"].text) == ("25%", "50%")
    config = json.loads((workdir / "config.json").read_text())
    kwh = sum(row.energy_kwh for row in ledger.rows())
    for region, grams in (("world", 475.0), ("france", 51.28)):
        (workdir / "config.json").write_text(json.dumps({**config, "energy": {"region": region}}))
        build(workdir)
        assert f"{number(kwh * grams / 1000)} kg of CO2 equivalent at {grams:g} g/kWh" in read(workdir)[1]


def test_words_do_not_overstate(study):
    text = " ".join(narrative.summary(Records.read(study), TASK))
    assert "full reaches AUC" in text
    assert "does not show that they are equal" in text
    # Clearly worse when tested alone: not to be sold as a bargain.
    assert "is none, at" not in text


def test_a_clear_difference_is_said_to_be_one(tmp_path):
    workdir = report_example.write(tmp_path, seeds=range(6), strategies=("full", "none"))
    text = " ".join(narrative.summary(Records.read(workdir), TASK))
    assert "Significantly different from full: none by -0.0" in text
    assert "Nothing that costs fewer FLOPs than full reaches its score." in text


def test_one_seed(tmp_path):
    workdir = report_example.write(tmp_path, seeds=(3,))
    build(workdir)
    page, _ = read(workdir)
    assert "One seed: no interval" in page
    assert "With one seed there is no test." in page


def test_no_external_set_but_a_test_set(tmp_path):
    workdir = report_example.write(
        tmp_path, seeds=(0, 1), splits=("development", "test"), strategies=("full", "none")
    )
    build(workdir)
    page, _ = read(workdir)
    assert "No external set: no generalization gap." in page
    assert '<th scope="col">test</th>' in page
    assert not (workdir / "figures" / "seeds_tumour_type.png").exists()


def test_reference_is_the_first_where_full_is_absent(tmp_path):
    workdir = report_example.write(tmp_path, strategies=("partial", "none"))
    assert "partial reaches AUC" in " ".join(narrative.summary(Records.read(workdir), TASK))


def test_unfinished_study(tmp_path):
    workdir = report_example.write(tmp_path)
    edit(
        workdir,
        "results.jsonl",
        lambda row: (row["strategy"], row["seed"]) not in {("hybrid", 2), ("partial", 1)},
    )
    build(workdir)
    page, _ = read(workdir)
    assert "Unfinished: 2 of 15 arms have no result yet (strategy seed): partial 1, hybrid 2." in page
    assert set(Records.read(workdir).costs("hybrid")) == {0, 1}


def test_undefined_values_and_mixed_devices(tmp_path):
    workdir = report_example.write(tmp_path)
    rows = atomic_files.read(workdir / "results.jsonl")
    for row in rows:
        if row["split"] == "external" and row["strategy"] != "full":
            row["value"] = None
    atomic_files.write(workdir / "results.jsonl", rows)
    ledger = Ledger(workdir / "ledger.jsonl")
    ledger.put(dataclasses.replace(ledger.rows()[0], device="TPU v4", energy_source="green-algorithms"))
    build(workdir)
    page, _ = read(workdir)
    assert "results are undefined and left out of means" in page
    assert "different devices: seconds and kWh are not comparable" in page
    assert "Energy was obtained in different ways" in page
    assert "No other strategy has a score to compare." in page


@pytest.mark.parametrize("missing", ["results.jsonl", "ledger.jsonl", "both"])
def test_missing_records_render_with_a_clear_line(tmp_path, missing):
    workdir = report_example.write(tmp_path)
    for name in ("results.jsonl", "ledger.jsonl") if missing == "both" else (missing,):
        (workdir / name).unlink()
    build(workdir)
    page, text = read(workdir)
    for line in {"results.jsonl": ["No results yet"], "ledger.jsonl": ["No costs"]}.get(
        missing, ["No results", "No costs"]
    ):
        assert line in page
        assert line in text


def test_smallest_config_and_hostile_names(tmp_path):
    workdir = report_example.write(tmp_path, seeds=(0, 1), strategies=("full", "none"))
    (workdir / "config.json").write_text("{}")
    rows = atomic_files.read(workdir / "results.jsonl")
    for row in rows:
        row["task"] = "<b>a|b</b>/../x"
    atomic_files.write(workdir / "results.jsonl", rows)
    build(workdir)
    page, _ = read(workdir)
    assert "<b>a" not in page
    assert all(path.parent == workdir / "figures" for path in workdir.rglob("*.png"))


def test_errors(tmp_path):
    with pytest.raises(UserError, match=r"config.json: no such file"):
        build(tmp_path)
    workdir = report_example.write(tmp_path, seeds=(0,), strategies=("full",))
    (workdir / "results.jsonl").write_text('{"strategy": "full"}\n')
    with pytest.raises(UserError, match=r"results.jsonl:1: no key 'seed'"):
        build(workdir)
    (workdir / "results.jsonl").write_text("{torn")
    with pytest.raises(UserError, match=r"results.jsonl:1: not a line of JSON"):
        build(workdir)
    row = dict.fromkeys(("strategy", "seed", "task", "split", "protocol", "metric"), "x") | {
        "value": "0.9",
        "seed": 0,
    }
    atomic_files.write(workdir / "results.jsonl", [row])
    with pytest.raises(UserError, match=r"results.jsonl:1: value is '0.9'"):
        build(workdir)
    atomic_files.write(workdir / "results.jsonl", [{**row, "value": 0.9, "metric": "acc"}])
    with pytest.raises(UserError, match=r"results.jsonl:1: unknown metric 'acc'; "):
        build(workdir)
    (workdir / "config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="expected a JSON object, found list"):
        build(workdir)


def test_report_needs_no_jax():
    code = "import sys, dapt_jax.report; sys.exit(any(name in sys.modules for name in ('jax', 'matplotlib.pyplot')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_report_says_how_each_set_got_its_range_and_old_records_have_no_such_part(study, tmp_path):
    assert "How intensities were read" not in (study / "report.html").read_text()
    workdir = tmp_path / "study"
    shutil.copytree(study, workdir)
    row = {"origin": "depth of the set's 16-bit grey (12 bits)", "images": 3, "low": [0.0, 0.0]}
    intensities.write(workdir, {"corpus": [{**row, "high": [4095.0, 4095.0], "example": "/a/b <&>.png"}]})
    build(workdir)
    html, text = read(workdir)
    assert "b &lt;&amp;&gt;.png" in html
    assert "| corpus | depth of the set's 16-bit grey (12 bits) | 3 | 0 | 4095 | b <&>.png |" in text


def test_distances_are_shown_with_the_unit_that_results_name_and_without_where_records_are_older():
    row = {
        "strategy": "full",
        "seed": 0,
        "task": TASK,
        "split": "external",
        "protocol": "frozen",
        "value": 3.0,
    }
    rows = [{**row, "metric": "hd95", "unit": "mm"}, {**row, "metric": "dice"}, {**row, "metric": "assd"}]
    records = Records({"report": {"metric": "hd95"}}, rows, [])
    assert "HD95 (mm)" in [group for group, _ in tables.everything(records, TASK).groups]
    assert "reaches HD95 (mm) 3.000" in narrative.summary(records, TASK)[0]
    assert records.display_name(TASK, "dice") == "Dice"
    assert records.display_name(TASK, "assd") == "ASSD"


HOSTILE = "<script>x</script> ![p](http://h/p.png) [l](http://h) `c` a|b *e* _e_ $x$ &lt; \x1b[2J \n# h"


def test_what_comes_from_outside_is_text_on_the_markdown_page_too(tmp_path):
    workdir = report_example.write(tmp_path, seeds=(0,), strategies=("none", "full"))
    for name in ("config.json", "results.jsonl"):
        text = (workdir / name).read_text()
        (workdir / name).write_text(text.replace("tumour type", json.dumps(HOSTILE)[1:-1]))
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**config, "title": HOSTILE, "note": HOSTILE}))
    build(workdir)
    text = (workdir / "report.md").read_text()
    assert not re.search(r"(?<!\\)<script|(?<!\\)\]\(http|(?<!\\)`|(?<!\\)\$|\x1b|^# h", text, re.MULTILINE)
    assert all("\x1b" not in (workdir / name).read_text() for name in ("report.md", "report.html"))
    assert text.startswith("# \\<script>x\\</script>")
