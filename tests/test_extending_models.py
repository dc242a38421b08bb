"""An encoder family is one new file, a name table another, a strategy one function, a label-free objective one class."""

import dataclasses
import importlib
import sys
import textwrap
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dapt_jax.models import encoders, registry
from dapt_jax.models.classifier import HEAD, pool
from dapt_jax.models.entry import MODELS
from dapt_jax.objectives import SelfDistillation
from dapt_jax.objectives.base import cosine, dense, dense_parameters
from dapt_jax.parameters import Kind
from dapt_jax.settings import flags
from dapt_jax.study import built_in_strategies, plan, prepare
from dapt_jax.training.phases import Phase
from dapt_jax.weights import export, tables
from dapt_jax.weights.paths import flatten
from dapt_jax.weights.tables.scheme import Scheme
from tests import command
from tests.test_label_free_training import rows_of_agreeing_runs, run_of

FAMILY = '''
    """Patches, and layer norm."""

    import functools

    import jax
    from flax import nnx

    from dapt_jax.models.encoder import Encoder, LayerGroup, Options
    from dapt_jax.models.entry import register_model
    from dapt_jax.models.layers import Conv, LayerNorm
    from dapt_jax.models.preprocess import IMAGENET


    class Patches(nnx.Module):
        def __init__(self, inputs, outputs):
            self.project = Conv(inputs, outputs, 4, stride=4, bias=True)
            self.scaling = LayerNorm(outputs)

        def __call__(self, x, mode):
            return jax.nn.relu(self.scaling(self.project(x)))


    @register_model("patchnet")
    def patchnet(options: Options) -> Encoder:
        groups = [
            LayerGroup("fine", functools.partial(Patches, options.channels, 4), 4, 4),
            LayerGroup("coarse", functools.partial(Patches, 4, 8), 8, 16),
        ]
        return Encoder("patchnet", groups, preprocess=IMAGENET.for_channels(options.channels))
'''


@pytest.fixture
def family(tmp_path, monkeypatch):
    """A file among those of `dapt_jax.models.encoders`, and a name table for it."""
    (tmp_path / "patchnet.py").write_text(textwrap.dedent(FAMILY))
    monkeypatch.setattr(encoders, "__path__", [*encoders.__path__, str(tmp_path)])
    importlib.import_module("dapt_jax.models.encoders.patchnet")
    names = Scheme("other", "torch", lambda encoder, group, part: f"{group}.{part[:4]}", "fc")
    monkeypatch.setitem(tables.SCHEMES, "patchnet", (names,))
    yield names
    del MODELS["patchnet"], sys.modules["dapt_jax.models.encoders.patchnet"], encoders.patchnet
    registry.configured.cache_clear()


@pytest.fixture
def biases_only():
    @built_in_strategies.strategy("biases_only", "The biases and the head (arXiv 2106.10199).")
    def phases(encoder, adapt):
        last = Phase("biases", adapt.epochs, ("*/bias", HEAD), adapt.lr, adapt.batch_norm, adapt.layer_norm)
        return (*built_in_strategies.head_first(adapt), last)

    yield
    del built_in_strategies.STRATEGIES["biases_only"]


def test_every_file_of_the_folder_is_a_family_that_is_known():
    files = {path.stem for path in command.ROOT.glob("dapt_jax/models/encoders/*.py")} - {"__init__"}
    assert files == {
        name.rpartition(".")[2] for name in sys.modules if name.startswith(f"{encoders.__name__}.")
    }
    assert all(registry.build(name).name == name for name in registry.names())


def test_a_new_family_and_a_new_strategy_run_from_end_to_end(family, biases_only, tmp_path, capsys):
    encoder = registry.build("patchnet")
    assert encoder.kinds["fine/scaling/bias"] is Kind.LAYER_NORM_BIAS  # the name of a module says nothing
    params, batch_stats = encoder.init(7)
    np.savez(tmp_path / "other.npz", **export.named(encoder, params, batch_stats, family))
    study = command.small(
        "--config.model.name=patchnet",
        f"--config.weights={tmp_path / 'other.npz'}",
        "--config.strategies=none,biases_only,partial",
        "--config.adapt.partial_groups=1",
        "--config.seeds=0",
    )
    workdir = f"--workdir={tmp_path / 'run'}"
    assert command.run(*study, workdir, "--config.mode=plan") == 0
    assert "biases_only" in capsys.readouterr().out
    ready = prepare.prepare(flags.parse(study)[0])
    planned = {arm.name: plan.adaptation_flops(ready, arm) for arm in ready.arms if arm.name != "none"}
    assert command.run(*study, workdir) == 0
    spent = dict.fromkeys(planned, 0)
    for row in command.rows(tmp_path / "run" / "ledger.jsonl"):
        if row["stage"] == "dapt":
            spent[row["strategy"]] += row["model_flops"] + row["reused_flops"]
    assert spent == planned
    adapted = safetensors.numpy.load_file(
        tmp_path / "run" / "checkpoints" / "biases_only-seed0" / "adapted.safetensors"
    )
    changed = {path for path, array in flatten(params).items() if not np.array_equal(array, adapted[path])}
    assert changed == {path for path in flatten(params) if path.endswith("/bias")}
    assert {row["strategy"] for row in command.rows(tmp_path / "run" / "results.jsonl")} >= {
        "none",
        "biases_only",
    }
    adapted = safetensors.numpy.load_file(
        tmp_path / "run" / "checkpoints" / "partial-seed0" / "adapted.safetensors"
    )
    changed = {path for path, array in flatten(params).items() if not np.array_equal(array, adapted[path])}
    assert changed == {
        path for path in flatten(params) if path.startswith("coarse/")
    }  # layer norm among them


def test_a_strategy_is_listed_with_what_it_trains(biases_only):
    table = built_in_strategies.listing().splitlines()
    assert "| `biases_only` | The biases and the head (arXiv 2106.10199). |" in table
    assert len(table) == 2 + len(built_in_strategies.STRATEGIES)


def test_a_name_is_registered_once(biases_only):
    with pytest.raises(ValueError, match="a strategy 'biases_only' is registered already"):
        built_in_strategies.strategy("biases_only", "Again.")(lambda encoder, adapt: ())
    with pytest.raises(ValueError, match="a model 'resnet18' is registered already"):
        registry.register_model("resnet18")(lambda options: registry.build("resnet34"))


@dataclasses.dataclass(frozen=True)
class Byol(SelfDistillation):
    """BYOL (arXiv 2006.07733): the prediction of one view's projection by the average from the other view."""

    name: ClassVar[str] = "byol"
    is_paired: ClassVar[bool] = True

    def head(self, encoder):
        return dense_parameters("project", encoder.features, 16) | dense_parameters("predict", 16, 16)

    def outputs(self, head, x, as_map):
        projected = dense(head["project"], pool(x))
        return [jnp.split(each, 2) for each in (projected, dense(head["predict"], jax.nn.relu(projected)))]

    def label_shape(self, batch, side):
        return [jax.ShapeDtypeStruct((batch, 16), jnp.float32)] * 2

    def momentum(self, step, total_steps):
        return 1 - 0.01 * (1 + jnp.cos(jnp.pi * step / total_steps)) / 2

    def targets(self, outputs, kept, epoch):
        return outputs[0]

    def losses(self, outputs, targets, weights):
        predicted = outputs[1]
        return 2 - cosine(predicted[0], targets[1]) - cosine(predicted[1], targets[0])


def test_an_objective_of_one_s_own_is_cached_planned_and_averaged_as_the_others():
    phases = (Phase("head", 1, ("head",), 1e-2, views=2), Phase("full", 1, ("*",), 1e-2, views=2))
    runs = {cache: run_of(Byol(), "cnn", cache, phases) for cache in ("on", "off")}
    rows, _ = rows_of_agreeing_runs(runs)
    assert [row.cached for row in rows] == ["filled", "off"]
    assert all(0 < row.target_flops < row.model_flops for row in rows)
