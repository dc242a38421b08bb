"""The table of models."""

import json

import pytest

from dapt_jax import main
from dapt_jax.export import catalogue, model_rows
from dapt_jax.models import decoders, registry


def test_the_table_needs_no_config_and_no_workdir(capsys: pytest.CaptureFixture) -> None:
    assert main.main(["dapt_jax", "--config.mode=models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for line in lines
        if len(cells := line.split("│")) > 2
    }
    assert rows["resnet18"][:3] == ["11,689,512", "224", "3.36"]
    assert rows["resnet18"][3].startswith("stem, stage1 (2), stage2 (2)")
    assert rows["resnet18"][4].startswith("torchvision:resnet18.v1")
    assert rows["vit_small_dinov3"][1:4] == ["256", "12.49", "stem, block (12), top"]
    assert rows["unet"][4] == "-"
    assert all(decoder in lines[-1] for decoder in decoders.BUILDERS)


def test_the_shipped_table_holds_every_model_and_decoder() -> None:
    """`python -m dapt_jax.export.model_rows` writes it again."""
    shipped = json.loads(catalogue.SHIPPED.read_text())
    assert tuple(shipped["models"]) == tuple(registry.names())
    assert shipped["decoders"] == list(decoders.BUILDERS)
    for name in ("resnet18", "unet"):
        assert shipped["models"][name] == model_rows.row(name)


@pytest.mark.long
def test_the_shipped_table_is_that_of_the_models() -> None:
    assert json.loads(catalogue.SHIPPED.read_text()) == model_rows.table()


def test_other_modes_still_need_a_config(capsys: pytest.CaptureFixture) -> None:
    assert main.main(["dapt_jax", "--config.mode=plan"]) == 2
    assert "no config" in capsys.readouterr().err


def test_groups_are_condensed_by_stage() -> None:
    assert (
        model_rows.condensed(("stem", "stage1/layer1", "stage1/transition", "top")) == "stem, stage1 (2), top"
    )


def test_weights_are_counted_past_the_second() -> None:
    assert model_rows.known(()) == "-"
    assert model_rows.known(("a", "b")) == "a, b"
    assert model_rows.known(("a", "b", "c")) == "a, b, ... (3)"
