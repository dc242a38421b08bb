import dataclasses

import pytest

from dapt_jax.errors import UserError
from dapt_jax.records.ledger import Ledger, Row

KEYS = (
    "strategy seed stage phase steps images model_flops hardware_flops head_flops target_flops "
    "train_s compile_s data_s eval_s checkpoint_s cache_s wall_s peak_bytes "
    "device devices energy_kwh energy_source trainable_params total_params cached reused_flops reused_s peak_flops "
    "approximations curve"
)


def test_row_has_exactly_the_agreed_keys():
    assert [field.name for field in dataclasses.fields(Row)] == KEYS.split()


def test_putting_a_row_again_replaces_it(tmp_path):
    ledger = Ledger(tmp_path / "deep" / "ledger.jsonl")
    assert ledger.rows() == []
    first = Row("full", 0, "dapt", "head", model_flops=10**18, curve=[{"epoch": 1, "loss": 0.5}])
    second = Row("full", 0, "dapt", "body", train_s=2.5)
    ledger.put(first)
    ledger.put(second)
    again = dataclasses.replace(first, model_flops=7)
    ledger.put(again)
    assert Ledger(ledger.path).rows() == [again, second]
    for other in (
        dataclasses.replace(first, seed=1),
        dataclasses.replace(first, stage="transfer"),
        dataclasses.replace(first, strategy="none"),
    ):
        ledger.put(other)
    assert len(ledger.rows()) == 5
    assert [path.name for path in ledger.path.parent.iterdir()] == ["ledger.jsonl"]


def test_errors_name_file_and_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with pytest.raises(UserError, match="stage is 'dept'; did you mean 'dapt'"):
        Row("full", 0, "dept", "head")
    with pytest.raises(UserError, match="cached is 'on'"):
        Row("full", 0, "dapt", "head", cached="on")
    path.write_text('{"strategy": "full", "seed": 0, "stage": "dapt", "phase": "a"}\n{"strategy": "full"}\n')
    with pytest.raises(UserError, match=r"ledger.jsonl:2: ledger row: no seed or stage or phase"):
        Ledger(path).rows()
    path.write_text('{"strategy": "full", "seed": 0, "stage": "dapt", "phase": "a", "train_sec": 1}\n')
    with pytest.raises(UserError, match=r":1: ledger row: unknown key 'train_sec'; did you mean 'train_s'"):
        Ledger(path).rows()
    path.write_text("{torn\n")
    with pytest.raises(UserError, match=r"ledger.jsonl:1: not a line of JSON"):
        Ledger(path).rows()
