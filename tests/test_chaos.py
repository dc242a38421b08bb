"""Studies that are killed at file operations, while caches are filled, exported and pushed, end as quiet ones."""

import numpy as np
import pytest

from benchmarks import chaos


@pytest.mark.parametrize(
    "where",
    [pytest.param("files", marks=pytest.mark.long), *(pytest.param(each, marks=pytest.mark.chaos) for each in chaos.WHERE)],
)  # fmt: skip
def test_a_killed_study_ends_with_the_bytes_of_the_quiet_one(where):
    kills = 1 if where == "files" else 5
    tally = chaos.measure(where, kills)
    assert not tally.findings, tally.findings
    assert tally.same == kills
    assert tally.killed


def test_what_differs_in_results_weights_or_predictions_is_seen(tmp_path):
    def write(folder, value):
        (folder / "predictions").mkdir(parents=True)
        (folder / "results.jsonl").write_text("{}\n")
        (folder / "encoder.safetensors").write_bytes(b"weights")
        (folder / "status.json").write_text(str(value))  # of no run alike
        np.savez(folder / "predictions" / "a.npz", label=np.full(3, value))
        return chaos.digests(folder)

    one, same, other = (write(tmp_path / name, value) for name, value in (("a", 1), ("b", 1), ("c", 2)))
    assert one == same
    assert [name for name in one if one[name] != other[name]] == ["predictions/a.npz"]
    (tmp_path / "b" / "encoder.safetensors").write_bytes(b"other")
    assert chaos.digests(tmp_path / "b") != one
