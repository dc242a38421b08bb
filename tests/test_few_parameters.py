"""Few parameters: leaf patterns, norm-only and bias-only training, low-rank updates merged exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import dapt_jax as dj
from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import DEFAULT
from dapt_jax.models.encoders import vit
from dapt_jax.models.lora import LoraSettings
from dapt_jax.models.row_changes import RowSettings
from dapt_jax.parameters import Kind
from dapt_jax.settings import StrategySpec, StudySettings
from dapt_jax.settings.training import AdaptSettings
from dapt_jax.study import built_in_strategies, plan, strategies
from dapt_jax.training import accounting, freezing, loop, patterns
from dapt_jax.training.context import RunContext
from dapt_jax.training.phases import Phase
from dapt_jax.weights.paths import flatten
from tests import command, tiny

ENCODER = tiny.encoder()
LORA = LoraSettings(rank=2, alpha=3)
VIT = Classifier(registry.build("vit_small"), 2)
LITE = Classifier(registry.build("efficientnet_lite0"), 2)


def trained_by(model, *trainable, **options):
    return freezing.resolve_trainable(Phase("p", 1, trainable, 1e-2, **options), model.groups, model.kinds)


def of_kind(model, *kinds):
    return {path for path, kind in model.kinds.items() if kind in kinds}


@pytest.mark.parametrize(
    ("model", "pattern", "expected"),
    [
        (VIT, "block9..12/attention/project", {f"block{n}/attention/project/" for n in range(9, 13)}),
        (VIT, "block11..12/attention/project:bias", {f"block{n}/attention/project/bias" for n in (11, 12)}),
        (LITE, "stage6*:depthwise_kernel", {f"stage6/block{n}/depthwise/kernel" for n in range(1, 5)}),
        (LITE, "stage6..7/block1/depthwise", {f"stage{n}/block1/depthwise/" for n in (6, 7)}),
        (VIT, "block1:norm", {"block1/norm1/", "block1/norm2/"}),
    ],
)
def test_a_pattern_chooses_the_leaves_that_it_names_and_no_others(model, pattern, expected):
    every = {path for path, kind in model.kinds.items() if not kind.is_statistic}
    wanted = {path for path in every if any(path.startswith(each) for each in expected)}
    assert wanted
    spec = trained_by(model, pattern)
    assert spec.trainable == wanted
    # The boundary is the lowest group with a trained leaf, so that all below it can be cached.
    lowest = min(model.groups.index(freezing.group_of(path, model.groups)) for path in wanted)
    assert spec.boundary == lowest


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        ("block9..13/attention", r"pattern 'block9..13/attention' \('block13/attention'\) matches no"),
        ("block1:bais", "unknown kind of parameter 'bais'; did you mean 'bias'"),
        ("block1:conv_kernel", "matches no parameter of the kind 'conv_kernel'; .*dense_kernel"),
        ("block12..9", "the range 12..9 is not one; expected FIRST..LAST"),
        ("block1..99999999", "the range 1..99999999 is not one"),
        ("block1/atention", "did you mean 'block1/attention"),
    ],
)
def test_a_pattern_that_fits_nothing_is_one_line_with_the_nearest(pattern, line):
    with pytest.raises(UserError, match=f"phase 'p': .*{line}"):
        trained_by(VIT, pattern)


def test_affine_batch_norm_trains_scale_and_bias_and_keeps_statistics():
    phase = Phase("p", 2, ("*:norm",), 1e-2, batch_norm="affine")
    run = tiny.make_run([phase], encoder=ENCODER, data=tiny.dataset())
    params, batch_stats = run.model.init(0)
    trained = loop.train(run, params, batch_stats)
    moved = {
        freezing.path_name(path)
        for (path, old), new in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(trained.params), strict=True
        )
        if not np.array_equal(old, new)
    }
    assert moved == of_kind(run.model, Kind.BATCH_NORM_SCALE, Kind.BATCH_NORM_BIAS)
    same = jax.tree.map(np.array_equal, batch_stats, trained.batch_stats)
    assert all(jax.tree.leaves(same))
    assert run.programs[0].mask.batch_norm == ()


@pytest.mark.parametrize(
    ("name", "number", "least", "most"),
    # Shares of a full step at full depth, from the FLOPs of the forward pass alone: a step without weight
    # gradients costs two of three passes.
    [
        ("norm_tuning", 0, 0.66, 0.68),
        ("attention_output", 0, 0.68, 0.70),
        ("lora", 0, 0.68, 0.72),
        ("attention_output", 4, 0.12, 0.26),
        ("apla", 0, 0.65, 0.67),
        ("explora", 2, 0.18, 0.21),
    ],
)
def test_a_step_of_few_parameters_costs_what_the_arithmetic_says(name, number, least, most):
    adapt = AdaptSettings(head_epochs=0, peft_groups=number)
    encoder = registry.build("vit_small")
    (phase,) = built_in_strategies.STRATEGIES[name].phases(encoder, adapt)
    full = Phase("full", 1, ("*",), 1e-4)
    cost = {}
    for each in (phase, full):
        own = patterns.with_rows(patterns.with_lora(encoder, (each,), adapt.lora), (each,), adapt.rows)
        run = tiny.make_run([each], encoder=own, data=tiny.dataset(size=16 * 7))
        cost[each.name] = accounting.image_cost(run.programs[0], 112).suffix
    assert not cost[name].unknown
    assert least < cost[name].model / cost["full"].model < most


def test_a_strategy_that_the_encoder_has_no_leaves_for_names_those_that_it_has():
    lite = LITE.encoder
    for name, line in (
        ("attention_output", "expected a transformer"),
        ("apla", "strategy 'apla' .*expected a transformer"),
        ("explora", "has 0 layer groups below"),
    ):
        adapt = AdaptSettings(partial_groups=len(lite.groups))
        with pytest.raises(UserError, match=line):
            built_in_strategies.STRATEGIES[name].phases(lite, adapt)
    with pytest.raises(UserError, match=r"adapt.peft_groups is 99; efficientnet_lite0 has 1 to 18"):
        built_in_strategies.STRATEGIES["lora"].phases(lite, AdaptSettings(peft_groups=99))


def test_the_plan_says_that_few_parameters_below_the_cache_cost_the_backward_pass():
    run = tiny.make_run(
        [Phase("low", 1, ("stage1:norm",), 1e-2, batch_norm="affine"), Phase("top", 1, ("head",), 1e-2)],
        encoder=ENCODER,
        data=tiny.dataset(),
    )
    low, top = plan.of_run(run)
    assert (low.lowest, top.lowest) == ("stage1/block1", "head")
    assert "trains 1.01% of the encoder from stage1/block1 up" in low.depth
    assert "down to there" in low.depth
    assert not top.depth


def test_two_strategies_with_a_plus_between_them_follow_one_another():
    adapt = AdaptSettings(head_epochs=1, epochs=5, hybrid_epochs=2, peft_groups=4, warmup=0.5)
    found = strategies.resolve("lora+full", LITE.encoder, StudySettings(adapt=adapt))
    assert [(phase.name, phase.epochs) for phase in found.phases] == [("head", 1), ("lora", 2), ("full", 3)]
    for name, own in (("lora", found.phases[1]), ("full", found.phases[2])):
        alone = strategies.resolve(name, LITE.encoder, StudySettings(adapt=adapt)).phases[1]
        assert dataclasses.replace(alone, epochs=own.epochs) == own
    mine = StudySettings(adapt=adapt, custom_strategies={"mine": StrategySpec(like="norm_tuning+partial")})
    named = [phase.name for phase in strategies.resolve("mine", LITE.encoder, mine).phases]
    assert named == ["head", "norm_tuning", "partial"]


@pytest.mark.parametrize(
    ("name", "epochs", "line"),
    [
        ("lora+fulll", 1, "'fulll' is none to switch between; did you mean 'full'"),
        ("lora+hybrid", 1, "'hybrid' is none to switch between"),
        ("lora+lora", 1, "expected two different strategies, such as 'lora\\+full'"),
        ("lora+", 1, "'' is none to switch between"),
        ("lora+full", 5, "adapt.hybrid_epochs is 5 of 5 epochs"),
    ],
)
def test_what_cannot_follow_one_another_is_one_line(name, epochs, line):
    settings = StudySettings(adapt=AdaptSettings(epochs=5, hybrid_epochs=epochs))
    with pytest.raises(UserError, match=line):
        strategies.resolve(name, LITE.encoder, settings)


def with_lora(*trainable, settings=LORA):
    phases = [Phase("p", 2, trainable, 1e-1)]
    return patterns.with_lora(ENCODER, phases, settings), phases


@pytest.mark.parametrize("name", ["efficientnet_lite0", "vit_small", "resnext50"])
def test_merged_updates_give_the_features_of_unmerged_ones(name):
    encoder = registry.build(name)
    last = encoder.groups[-4:]
    tuned = patterns.with_lora(encoder, [Phase("p", 1, tuple(f"{each}:lora" for each in last[:2]), 1)], LORA)
    params, batch_stats = tuned.init(0)
    rng = np.random.default_rng(0)
    params = jax.tree.map_with_path(
        lambda path, leaf: rng.normal(0, 0.1, leaf.shape).astype("f4") if "lora" in str(path) else leaf,
        params,
    )
    start = encoder.groups.index(last[0])
    shape = accounting.boundary_shape(Classifier(encoder, 1), start, 64 if "vit" not in name else 32)
    x = jnp.asarray(rng.normal(size=(2, *shape.shape)), "float32")

    @jax.jit
    def unmerged(params):
        return tuned.apply(params, batch_stats, x, start=start)[0]

    @jax.jit
    def plain(params):
        return encoder.apply(params, batch_stats, x, start=start)[0]

    merged = tuned.merged(params)
    assert jax.tree.structure(merged) == jax.tree.structure(encoder.abstract()[0])
    ours, theirs = unmerged(params), plain(merged)
    scale = np.abs(ours).max()
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-5)
    untouched = jax.tree.map(lambda leaf: 0 * leaf, params)
    assert np.abs(plain(tuned.merged(untouched)) - plain(merged)).max() > 0.01 * scale


def test_updates_start_at_the_network_and_alone_change():
    encoder, phases = with_lora("stage2..3:lora", "head")
    run = tiny.make_run(phases, encoder=encoder, data=tiny.dataset(), cache="on")
    params, batch_stats = run.model.init(0)
    assert run.model.base.encoder is ENCODER
    for old, new in zip(
        jax.tree.leaves(ENCODER.init(0)[0]),
        jax.tree.leaves(encoder.merged(params | {"head": {}})),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)
    spec = run.programs[0].mask
    assert spec.trainable == of_kind(run.model, Kind.LORA_DOWN, Kind.LORA_UP) | {"head/kernel", "head/bias"}
    assert spec.boundary == 1
    trained = loop.train(run, params, batch_stats)
    kernel = params["stage2"]["block1"]["conv"]["kernel"]
    np.testing.assert_array_equal(trained.params["stage2"]["block1"]["conv"]["kernel"], kernel)
    change = encoder.merged(trained.params)["stage2"]["block1"]["conv"]["kernel"] - kernel
    assert np.linalg.matrix_rank(np.asarray(change).reshape(-1, kernel.shape[-1]), tol=1e-5) == LORA.rank


def test_a_star_trains_the_network_and_leaves_updates_alone():
    encoder, phases = with_lora("stage3:lora")
    full = Phase("full", 1, ("*",), 1e-3)
    run = tiny.make_run([*phases, full], encoder=encoder, data=tiny.dataset())
    low_rank = of_kind(run.model, Kind.LORA_DOWN, Kind.LORA_UP)
    assert run.programs[0].mask.trainable == low_rank
    assert not run.programs[1].mask.trainable & low_rank
    assert run.programs[1].mask.boundary == 0


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        ("stage9:lora", "pattern 'stage9' matches no kernel; did you mean 'stage"),
        ("stage1/block1/norm:lora", "matches no kernel"),
        ("stage3:lora", "adapt.lora.rank is 99, and no kernel there has a rank above 8; expected 1 to 7"),
    ],
)
def test_updates_of_no_kernel_are_refused(pattern, line):
    with pytest.raises(UserError, match=line):
        with_lora(pattern, settings=LoraSettings(rank=99))


def test_a_group_without_kernels_is_not_what_was_meant():
    with pytest.raises(UserError, match=r"pattern 'top' matches no kernel; (?!.*'top')"):
        patterns.with_lora(VIT.encoder, [Phase("p", 1, ("top:lora",), 1)], LORA)


def test_updates_of_depthwise_kernels_are_refused():
    with pytest.raises(UserError, match="only kernels of depthwise or grouped convolutions"):
        patterns.with_lora(LITE.encoder, [Phase("p", 1, ("stage6/*/depthwise:lora",), 1)], LORA)


def test_cost_of_updates_planned_and_spent_is_equal_and_cached_equals_uncached():
    encoder, phases = with_lora("stage3:lora", "head")
    results = {}
    for cache in ("on", "off"):
        phase = dataclasses.replace(phases[0], augment=False)
        run = tiny.make_run([phase], encoder=encoder, data=tiny.dataset(), cache=cache)
        context = RunContext()
        results[cache] = loop.train(run, *run.model.init(0), context)
        assert sum(row.model_flops for row in results[cache].costs) == run.flops()
        assert sum(each.flops for each in plan.of_run(run)) == run.flops()
    for one, other in zip(*(jax.tree.leaves(each.params) for each in results.values()), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_trained_encoder_is_an_ordinary_one(tmp_path):
    encoder = dj.load_encoder("efficientnet_lite0", cut_after="stage1/block1")
    corpus = dj.load_dataset("phantoms", name="corpus", n=24, image_size=32)
    phases = [dj.Phase("p", 1, trainable=("stage1:lora", "head"), lr=1e-2)]
    run = dj.adaptation_run(encoder, corpus, phases, lora=LORA)
    adapted = dj.train(run, encoder).encoder
    assert adapted.encoder is encoder.encoder
    adapted.save(tmp_path / "adapted.safetensors")
    again = dj.load_encoder(
        "efficientnet_lite0", str(tmp_path / "adapted.safetensors"), cut_after="stage1/block1"
    )
    kernels = [each.params["stage1"]["block1"]["project"]["kernel"] for each in (adapted, again, encoder)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[1] - kernels[2]).max() > 0


SMALL_VIT = vit.network("vit_small", vit.Size(16, 2, 2), vit.MAE._replace(patch=4, image_size=16), DEFAULT)
ROWS = RowSettings(number=3, seed=1)
ROW_PHASES = [Phase("p", 2, ("block2/attention/project:rows", "head"), 1e-1)]


def test_rows_that_train_are_drawn_once_and_all_others_keep_their_bits():
    tuned = patterns.with_rows(SMALL_VIT, ROW_PHASES, ROWS)
    assert tuned is patterns.with_rows(SMALL_VIT, ROW_PHASES, ROWS)  # seeds share what is compiled
    assert tuned.base is SMALL_VIT
    run = tiny.make_run(ROW_PHASES, encoder=tuned, data=tiny.dataset())
    params, batch_stats = run.model.init(0)
    trained = loop.train(run, params, batch_stats).params
    before, after = (
        flatten({key: value for key, value in tuned.merged(each).items() if key != "head"})
        for each in (params, trained)
    )
    chosen = np.asarray(ROWS.drawn("block2/attention/project/kernel", 16))
    others = np.setdiff1d(np.arange(16), chosen)
    names = {f"block2/attention/project/{leaf}" for leaf in ("kernel", "bias")}
    assert set(before) == set(flatten(SMALL_VIT.abstract()[0]))
    for path, old in before.items():
        if path not in names:
            np.testing.assert_array_equal(old, after[path], err_msg=path)
            continue
        np.testing.assert_array_equal(old[..., others], after[path][..., others])
        assert (old[..., chosen] != after[path][..., chosen]).any(0).all()
    assert len({RowSettings(3, seed).drawn("a/kernel", 16) for seed in range(5)}) > 1


def test_changes_of_other_rows_are_not_gone_on_with(tmp_path):
    def train(seed):
        tuned = patterns.with_rows(SMALL_VIT, ROW_PHASES, RowSettings(number=3, seed=seed))
        run = tiny.make_run(ROW_PHASES, encoder=tuned, data=tiny.dataset())
        return loop.train(run, *run.model.init(0), RunContext(checkpoint_dir=tmp_path)).params

    kept = flatten(train(seed=1))
    assert all(np.array_equal(kept[path], leaf) for path, leaf in flatten(train(seed=1)).items())
    with pytest.raises(UserError, match="another run: other are its weight rows; expected the run as it was"):
        train(seed=2)


def test_moments_exist_for_the_rows_alone_and_their_gradient_is_that_of_the_whole_kernel_there():
    tuned = patterns.with_rows(SMALL_VIT, ROW_PHASES, ROWS)
    run = tiny.make_run(ROW_PHASES, encoder=tuned, data=tiny.dataset())
    program = run.programs[0]
    state = program.init_state(*run.model.init(0))
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim)
    of_head = [leaf.size for leaf in jax.tree.leaves(run.model.init(0)[0]["head"])]
    assert sizes == sorted(2 * [*of_head, 16 * 3, 3])  # two moments of each
    params, batch_stats = jax.tree.map(jnp.asarray, tuned.init(0))
    rows = params["block2"]["attention"]["project"]["rows"]
    rows |= {key: jnp.full(leaf.shape, 0.1) for key, leaf in rows.items()}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 17, 16)), jnp.float32)

    def of(encoder, params):
        def loss(each):
            return (encoder.apply(each, batch_stats, x, start=2)[0] ** 3).sum()

        return jax.jit(jax.value_and_grad(loss))(params)

    loss, found = of(tuned, params)
    merged_loss, whole = of(SMALL_VIT, jax.tree.map(jnp.asarray, tuned.merged(params)))
    np.testing.assert_allclose(loss, merged_loss, rtol=1e-6)
    chosen = np.asarray(ROWS.drawn("block2/attention/project/kernel", 16))
    own, plain = (each["block2"]["attention"]["project"] for each in (found, whole))
    for leaf in ("kernel", "bias"):
        np.testing.assert_allclose(own["rows"][leaf], plain[leaf][..., chosen], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(own[leaf], plain[leaf], rtol=1e-4, atol=1e-5)  # as apla+full needs it
    np.testing.assert_allclose(
        found["block2"]["attention"]["qkv"]["kernel"],
        whole["block2"]["attention"]["qkv"]["kernel"],
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_step_of_rows_costs_the_gradient_of_these_rows_and_the_plan_is_the_ledger():
    cost = {}
    for number in (1, 3, 16):
        tuned = patterns.with_rows(SMALL_VIT, ROW_PHASES, RowSettings(number)) if number < 16 else SMALL_VIT
        pattern = "block2/attention/project"
        phases = ROW_PHASES if number < 16 else [Phase("p", 2, (pattern, "head"), 1e-1)]
        run = tiny.make_run(phases, encoder=tuned, data=tiny.dataset())
        cost[number] = accounting.image_cost(run.programs[0], 16).suffix.model
    # 17 tokens, 16 inputs, a multiply-accumulate is 2
    assert cost[3] - cost[1] == 2 * 17 * 16 * 2
    assert cost[16] - cost[3] == 2 * 17 * 16 * 13
    run = tiny.make_run(
        ROW_PHASES, encoder=patterns.with_rows(SMALL_VIT, ROW_PHASES, ROWS), data=tiny.dataset()
    )
    (row,), (planned,) = loop.train(run, *run.model.init(0), RunContext()).costs, plan.of_run(run)
    assert row.model_flops == planned.flops == run.flops()
    assert (
        row.trainable_params
        == planned.trainable
        == 16 * 3 + 3 + sum(leaf.size for leaf in jax.tree.leaves(run.model.init(0)[0]["head"]))
    )


@pytest.mark.parametrize(
    ("pattern", "number", "line"),
    [
        ("block2/attention/projekt:rows", 3, "matches no kernel of a dense layer; did you mean"),
        ("stem:rows", 3, "pattern 'stem' matches no kernel of a dense layer"),
        ("block2/attention/project:rows", 16, "has 16 rows; expected 1 to 15, or 'block2/attention/project'"),
    ],
)
def test_rows_of_no_dense_layer_or_more_than_it_has_are_refused(pattern, number, line):
    with pytest.raises(UserError, match=line):
        patterns.with_rows(SMALL_VIT, [Phase("p", 1, (pattern,), 1)], RowSettings(number))


@pytest.mark.long
def test_an_arm_with_updates_leaves_an_ordinary_encoder_and_the_planned_cost(tmp_path, capsys):
    flags = command.small(
        "--config.strategies=explora",
        "--config.seeds=0",
        "--config.adapt.peft_groups=2",
        "--config.adapt.checkpoints=1",
        "--config.transfer.protocols=linear",
    )
    assert command.run(*flags, "--config.mode=plan") == 0
    assert "lowest trained" in capsys.readouterr().out
    assert command.run(*flags, f"--workdir={tmp_path}") == 0
    folder = tmp_path / "checkpoints" / "explora-seed0"
    keys = set(freezing.paths(LITE.abstract()[0])) | set(freezing.paths(LITE.abstract()[1]))
    for file in (folder / "adapted.safetensors", *folder.glob("epochs/*.safetensors")):
        assert set(safetensors.numpy.load_file(file)) == keys
    source = dj.load_encoder("efficientnet_lite0").params
    adapted = safetensors.numpy.load_file(folder / "adapted.safetensors")
    changed = {
        freezing.group_of(path, LITE.groups)
        for path, leaf in zip(freezing.paths(source), jax.tree.leaves(source), strict=True)
        if not np.array_equal(adapted[path], leaf)
    }
    assert changed == {"stage6/block2", "stage6/block3", "stage6/block4", "stage7/block1", "top"}
    rows = [row for row in command.rows(tmp_path / "ledger.jsonl") if row["phase"] == "explora"]
    assert [row["cached"] for row in rows] == ["off"]  # new views each epoch
