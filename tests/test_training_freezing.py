"""What is frozen stays, bit for bit, and is never computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from dapt_jax.cost import flops
from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import Encoder, LayerGroup
from dapt_jax.models.segmenter import Segmenter
from dapt_jax.parameters import Kind
from dapt_jax.settings.schema import ModelSettings
from dapt_jax.training import accounting, freezing
from dapt_jax.training.optim import Optimizer
from dapt_jax.training.phases import Phase
from tests import tiny

ENCODER = tiny.encoder()


def one_step(run, number=0, params=None):
    program = run.programs[number]
    params, batch_stats = params or program.model.init(0)
    state = program.init_state(params, batch_stats)
    rows = run.train_rows[: run.batch_size]
    batch = {
        "image": run.dataset.images.batch(rows),
        "label": run.dataset.labels[rows].astype(np.int32),
        "weight": np.ones(len(rows), np.float32),
        "index": rows.astype(np.int32),
    }
    draw = {"seed": np.uint32(0), "view": np.int32(0)}
    return state, jax.jit(program.train_step)(state, batch, draw, np.float32(1e-2)), (program, batch, draw)


def leaves(tree):
    return {freezing.path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("trainable", [("head",), ("stage3", "head"), ("stage2", "head"), ("*",)])
@pytest.mark.parametrize("norm", ["frozen", "stats", "train"])
def test_exactly_the_trainable_leaves_change(trainable, norm):
    run = tiny.make_run([Phase("p", 1, trainable, 1e-2, norm)], encoder=ENCODER, data=tiny.dataset())
    before, after, (program, _, _) = one_step(run)
    for path, old in leaves(before["params"]).items():
        is_same = np.array_equal(old, leaves(after["params"])[path])
        assert is_same == (path not in program.mask.trainable), path
    for path, old in leaves(before["batch_stats"]).items():
        group = freezing.group_of(path, program.model.groups)
        assert np.array_equal(old, leaves(after["batch_stats"])[path]) == (
            group not in program.mask.batch_norm_modes
        ), path


def test_frozen_batch_norm_keeps_its_affine_parameters_out_of_training():
    run = tiny.make_run([tiny.FULL], encoder=ENCODER, data=tiny.dataset())
    assert not [path for path in run.programs[0].mask.trainable if "norm" in path]
    trained = tiny.make_run([Phase("p", 1, ("*",), 1e-2, "train")], encoder=ENCODER, data=tiny.dataset())
    assert len([path for path in trained.programs[0].mask.trainable if "norm" in path]) == 6


def parameters_of(model):
    return set(freezing.paths(model.abstract()[0]))


def trained_by(phase, model):
    return set(freezing.resolve_trainable(phase, model.groups, model.kinds).trainable)


@pytest.mark.parametrize("name", registry.names())
def test_full_trains_every_parameter_that_is_not_of_frozen_batch_norm(name):
    model = Classifier(registry.build(name), 2)
    every = parameters_of(model)
    # A convolutional block's norm has running statistics beside its scale and bias; a layer norm has none.
    statistics = freezing.paths(model.abstract()[1])
    of_batch_norm = {path.rpartition("/")[0] for path in statistics}
    affine = {path for path in every if path.rpartition("/")[0] in of_batch_norm}
    assert trained_by(Phase("full", 1, ("*",), 1e-4), model) == every - affine
    assert trained_by(Phase("full", 1, (*model.encoder.groups, "head"), 1e-4), model) == every - affine
    assert trained_by(Phase("full", 1, ("*",), 1e-4, batch_norm="stats"), model) == every - affine
    assert trained_by(Phase("full", 1, ("*",), 1e-4, batch_norm="train"), model) == every


@pytest.mark.parametrize(
    ("name", "norms"), [("vit_small", 50), ("convnext_tiny", 46), ("swin_tiny", 58), ("resnet18", 0)]
)
def test_layer_norm_can_be_frozen_by_itself_and_by_group(name, norms):
    model = Classifier(registry.build(name), 2)
    full = trained_by(Phase("p", 1, ("*",), 1e-4), model)
    frozen = full - trained_by(Phase("p", 1, ("*",), 1e-4, layer_norm="frozen"), model)
    assert len(frozen) == norms
    assert {model.kinds[path] for path in frozen} <= {Kind.LAYER_NORM_SCALE, Kind.LAYER_NORM_BIAS}
    last = model.encoder.groups[-1]
    mixed = trained_by(Phase("p", 1, ("*",), 1e-4, layer_norm=((last, "frozen"),)), model)
    assert full - mixed == {path for path in frozen if path.startswith(f"{last}/")}


@pytest.mark.parametrize("decoder", ["unet", "attention_unet", "swin_unet", "upernet"])
def test_a_segmenter_trains_whole_where_batch_norm_trains(decoder):
    model = Segmenter(registry.build("swin_tiny"), 2, decoder)
    assert trained_by(Phase("p", 1, ("*",), 1e-4, batch_norm="train"), model) == parameters_of(model)


def test_the_biases_of_a_transformer_hold_those_of_its_layer_norms():
    model = Classifier(registry.build("vit_small"), 2)
    trained = trained_by(Phase("bitfit", 1, ("*/bias", "head"), 1e-4), model)
    assert trained == {path for path in parameters_of(model) if path.endswith("/bias")} | {"head/kernel"}
    assert sum(model.kinds[path] is Kind.LAYER_NORM_BIAS for path in trained) == 25


@pytest.mark.parametrize("pattern", ["*/bias", "stage1/*/bias", "*/norm*", "stage4/block2/norm1/scale"])
def test_a_pattern_of_frozen_batch_norm_alone_is_told_of(pattern):
    model = Classifier(registry.build("resnet18"), 2)
    with pytest.raises(
        UserError, match=r"phase 'p': pattern '.*' matches in '.*' only parameters of batch norm"
    ):
        trained_by(Phase("p", 1, (pattern, "head"), 1e-4), model)
    trained = trained_by(Phase("p", 1, (pattern, "head"), 1e-4, batch_norm="train"), model)
    assert trained == {path for path in parameters_of(model) if freezing.matches(path, pattern)} | {
        "head/kernel",
        "head/bias",
    }


def test_a_group_that_is_nothing_but_batch_norm_can_be_named():
    model = Classifier(registry.build("densenet121"), 2)
    assert trained_by(Phase("p", 1, ("top", "head"), 1e-4), model) == {"head/kernel", "head/bias"}
    with pytest.raises(UserError, match="phase 'p' trains nothing: top holds only parameters of batch norm"):
        trained_by(Phase("p", 1, ("top",), 1e-4), model)


def test_a_phase_without_patterns_is_refused_before_there_is_a_network():
    with pytest.raises(UserError, match=r"phase 'p': trainable is empty; expected .* such as \('head',\)"):
        Phase("p", 1, (), 1e-4)


def test_a_parameter_without_a_kind_is_refused():
    class Bare(nnx.Module):
        def __init__(self):
            self.gain = nnx.Param(jnp.ones(3))

    encoder = Encoder("bare", [LayerGroup("stem", Bare, 3, 1)], preprocess=ENCODER.preprocess)
    with pytest.raises(TypeError, match="stem/gain is a Param; expected one of the classes"):
        encoder.kinds  # noqa: B018


def test_clipping_and_moments_see_the_trained_leaves_alone():
    optimizer = Optimizer("adamw", weight_decay=0.1, clip=0.5, ema=0.9)
    run = tiny.make_run([tiny.PARTIAL], encoder=ENCODER, data=tiny.dataset(), optimizer=optimizer)
    state, _, (program, _, _) = one_step(run)
    sizes = freezing.count(program.model.abstract()[0], program.mask.trainable)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim)
    assert moments == 2 * sizes
    assert sum(leaf.size for leaf in jax.tree.leaves(state["ema"])) == sizes


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_the_frozen_backward_pass_is_neither_counted_nor_compiled(clip):
    data = tiny.dataset(size=32)
    optimizer = Optimizer(clip=clip)
    cost = {}
    for name, phase in {"full": tiny.FULL, "partial": tiny.PARTIAL, "head": tiny.HEAD}.items():
        run = tiny.make_run([phase], encoder=ENCODER, data=data, optimizer=optimizer)
        state, _, (program, batch, draw) = one_step(run)
        counted = accounting.image_cost(program, 32)
        step = jax.jit(program.train_step).lower(state, batch, draw, np.float32(1)).compile()
        cost[name] = (counted.prefix + counted.suffix, step.cost_analysis()["flops"])
    forward = accounting.forward(run.programs[0].model, 32, 3)
    per_group = [accounting.forward(run.programs[0].model, 32, stop).model for stop in range(4)]
    head = 2 * 8 * 3
    first = per_group[1]
    # Forward once; the input's gradient of the first convolution is never needed; every weight gradient is.
    assert cost["full"][0].model == 3 * (forward.model + head) - first
    assert cost["partial"][0].model == forward.model + 3 * head + (per_group[3] - per_group[2])
    assert cost["head"][0].model == forward.model + 2 * head
    assert cost["head"][1] < cost["partial"][1] < 0.8 * cost["full"][1]


def test_counting_agrees_with_a_matrix_product_that_xla_counts():
    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    compiled = jax.jit(lambda a, b: a @ b).lower(shape, shape).compile().cost_analysis()["flops"]
    assert flops.count(lambda a, b: a @ b, shape, shape).model == compiled


def test_a_pattern_that_matches_nothing_names_near_ones():
    with pytest.raises(UserError, match=r"pattern 'stage4' matches no parameter; did you mean 'stage"):
        tiny.make_run([Phase("p", 1, ("stage4",), 1e-2)], encoder=ENCODER, data=tiny.dataset())


def test_a_phase_of_frozen_norms_alone_is_refused():
    with pytest.raises(UserError, match="only parameters of batch norm"):
        tiny.make_run([Phase("p", 1, ("*/norm",), 1e-2)], encoder=ENCODER, data=tiny.dataset())


@given(st.sets(st.sampled_from(freezing.paths(ENCODER.abstract()[0]))))
def test_partition_and_combine_are_inverse(chosen):
    params, _ = ENCODER.init(0)
    train, rest = freezing.partition(params, chosen)
    assert set(freezing.paths(train)) == chosen
    assert set(freezing.paths(freezing.prune(train))) == chosen
    again = freezing.combine(train, rest)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True)
    )
    marked = jax.tree.map(np.ones_like, train)
    restored = freezing.overlay(jax.tree.map(np.zeros_like, params), freezing.prune(train))
    ones = freezing.overlay(jax.tree.map(np.zeros_like, params), freezing.prune(marked))
    assert {path for path, leaf in leaves(ones).items() if leaf.all()} == chosen
    assert {path for path, leaf in leaves(ones).items() if leaf.any()} == chosen
    for path, leaf in leaves(restored).items():
        np.testing.assert_array_equal(leaf, leaves(params)[path] if path in chosen else np.zeros_like(leaf))


@given(st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
def test_the_boundary_is_the_longest_frozen_run_of_leading_groups(trains):
    groups = (*ENCODER.groups, "head")
    chosen = tuple(group for group, is_trained in zip(groups, trains, strict=True) if is_trained)
    run = tiny.make_run([Phase("p", 1, chosen, 1e-2)], encoder=ENCODER, data=tiny.dataset())
    assert run.programs[0].mask.boundary == trains.index(True)


def test_a_group_whose_norm_adapts_is_above_the_boundary():
    phase = Phase("p", 1, ("head",), 1e-2, batch_norm=(("stage2", "stats"),))
    mask = tiny.make_run([phase], encoder=ENCODER, data=tiny.dataset()).programs[0].mask
    assert mask.boundary == 1
    assert mask.batch_norm_modes == {"stage2/block1": "stats"}


def test_what_a_step_drops_follows_from_seed_and_step_alone():
    settings = ModelSettings(name="resnet18", drop_path=0.5, remat=("stage1/block1",))
    encoder = settings.encoder().truncate("stage1/block2")
    assert settings.encoder() is settings.encoder()
    assert encoder.is_stochastic
    assert encoder.remat == {"stage1/block1"}
    run = tiny.make_run(
        [Phase("full", 1, ("*",), 1e-2)],
        encoder=encoder,
        data=tiny.dataset(size=32),
        optimizer=Optimizer("sgd"),
    )
    program = run.programs[0]
    state = program.init_state(*program.model.init(0))
    batch = {
        "image": run.dataset.images.batch(np.arange(8)),
        "label": run.dataset.labels[:8].astype(np.int32),
        "weight": np.ones(8, np.float32),
        "index": np.arange(8, dtype=np.int32),
    }
    step = jax.jit(program.train_step)

    def loss(seed, number):
        draw = {"seed": np.uint32(seed), "view": np.int32(0)}
        return float(step({**state, "step": np.int32(number)}, batch, draw, np.float32(0.1))["loss"])

    assert loss(0, 3) == loss(0, 3)
    assert len({loss(0, 3), loss(0, 4), loss(1, 3)}) == 3
