"""Every family: published sizes and FLOPs, levels, norms, bfloat16, rematerialisation, dropout, channels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dapt_jax import ops
from dapt_jax.cost import flops
from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import DEFAULT, Encoder, Options
from dapt_jax.models.encoders import vit
from dapt_jax.models.layers import dropout
from dapt_jax.parameters import Kind
from dapt_jax.settings.schema import ModelSettings
from dapt_jax.training import accounting
from dapt_jax.weights.paths import flatten
from tests.test_models_parity import ENCODERS

# With a 1000-way head. torchvision's model pages; for DINOv2 and DINOv3 timm's counts of the body, Keras' for
# its own.
PARAMETERS = {
    "efficientnet_lite0": 4_652_008,
    "efficientnet_lite1": 5_416_680,
    "efficientnet_b0": 5_288_548,
    "efficientnet_b0_keras": 5_288_548,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet50d": 25_576_264,
    "wide_resnet50_2": 68_883_240,
    "resnext50": 25_028_904,
    "resnet50_keras": 25_583_592,
    "resnet101_keras": 44_601_832,
    "resnet152_keras": 60_268_520,
    "densenet121": 7_978_856,
    "densenet169": 14_149_480,
    "densenet121_keras": 7_978_856,
    "densenet169_keras": 14_149_480,
    "convnext_tiny": 28_589_128,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
    "vit_small": 22_050_664,
    "vit_base": 86_567_656,
    "vit_large": 304_326_632,
    "vit_base_mae": 86_567_656,
    "vit_large_mae": 304_326_632,
    "vit_small_dinov2": 22_056_576 + 385_000 - 384,  # the published files hold a mask token as well
    "vit_base_dinov2": 86_580_480 + 769_000 - 768,
    "vit_large_dinov2": 304_368_640 + 1_025_000 - 1024,
    "swin_tiny": 28_288_354,
    "swin_small": 49_606_258,
    "swin_base": 87_768_224,
}


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    assert count(Classifier(registry.build(name), 1000).abstract()[0]) == PARAMETERS[name]


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_registers_and_rotary_positions_change_the_count_by_what_they_are(size: str) -> None:
    plain, registers, rotary = (
        count(registry.build(f"vit_{size}_{variant}").abstract()[0])
        for variant in ("dinov2", "dinov2_registers", "dinov3")
    )
    features = registry.build(f"vit_{size}_dinov2").features
    blocks = len(registry.build(f"vit_{size}_dinov2").groups) - 2
    assert registers - plain == 4 * features
    # No learnt positions, no biases of queries, keys and values, and patches of 16 pixels for those of 14.
    assert rotary - registers == features * (-(1 + 37**2) - 3 * blocks + 3 * (16**2 - 14**2))


@pytest.mark.parametrize(
    ("name", "billions"),
    # torchvision's model pages, multiply-accumulates
    [
        ("resnet50", 4.09),
        ("resnext50", 4.23),
        ("wide_resnet50_2", 11.4),
        ("densenet121", 2.83),
        ("efficientnet_b0", 0.39),
        ("convnext_tiny", 4.46),
        ("vit_base", 17.56),
        ("swin_tiny", 4.49),
    ],
)
def test_flops_are_as_many_as_published(name: str, billions: float) -> None:
    encoder = registry.build(name)
    counted = accounting.forward(Classifier(encoder, 1000), 224, len(encoder.groups))
    head = 2 * encoder.features * 1000
    assert round((counted.padded + head) / 2e9, 2 if billions < 10 else 1) == round(
        billions, 2 if billions < 10 else 1
    )


def small(case: str) -> tuple[Encoder, jax.Array, dict, dict]:
    """A small member of a family, images, and parameters that are not degenerate."""
    make, side = ENCODERS[case]
    encoder = make()
    params, batch_stats = jax.tree.map(jnp.asarray, encoder.init(0))
    params = jax.tree.map_with_path(lambda path, leaf: leaf + 0.3 * ("gamma" in str(path[-1])), params)
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3)).astype(np.uint8)
    return encoder, jnp.asarray(images), params, batch_stats


FAMILIES = ["resnext50", "densenet121", "efficientnet_b0", "convnext_tiny", "vit_small_dinov3", "swin_tiny"]


@pytest.mark.parametrize("case", FAMILIES)
def test_levels_are_as_declared(case: str) -> None:
    make, side = ENCODERS[case]
    encoder = make()
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.bfloat16)
    _, maps, _ = jax.eval_shape(encoder.run, *encoder.abstract(), images)
    assert {each.dtype for each in maps.values()} == {jnp.bfloat16.dtype}
    assert set(maps) == {level.name for level in encoder.pyramid_levels}
    for level in encoder.pyramid_levels:
        assert maps[level.name].shape[-1] == level.features
        assert abs(maps[level.name].shape[1] * level.reduction - images.shape[1]) < level.reduction


# XLA:CPU is slow at EfficientNet's depthwise convolutions in bfloat16.
@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in FAMILIES if case != "efficientnet_b0"])
def test_bfloat16_is_near_and_norms_say_what_changed(case: str) -> None:
    encoder, images, params, batch_stats = small(case)

    group = encoder.groups[1]

    @jax.jit
    def run(params, batch_stats, images):
        x = encoder.preprocess(images)
        half, _ = encoder.apply(params, batch_stats, x.astype(jnp.bfloat16))
        whole, _ = encoder.apply(params, batch_stats, x)
        return whole, half, encoder.apply(params, batch_stats, x, stop=2, batch_norm={group: "train"})[1]

    with ops.formulation("lax"):  # compiles sooner
        whole, half, after = run(params, batch_stats, images)
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(np.float32) - whole).max() < 0.1 * np.abs(whole).max()
    changed = {
        path for path, leaf in flatten(after).items() if not np.array_equal(leaf, flatten(batch_stats)[path])
    }
    assert changed == {path for path in flatten(batch_stats) if path.startswith(f"{group}/")}


@pytest.mark.long
def test_rematerialised_groups_cost_more_and_change_nothing() -> None:
    encoder, images, params, batch_stats = small("vit_small_dinov3")
    other = encoder.rematerialised(encoder.groups[1])
    gradients, counts = [], []
    for each in (encoder, other):

        def loss(params, each=each):
            x, _ = each.apply(params, batch_stats, each.preprocess(images))
            return jnp.square(x.astype(jnp.float32)).mean()

        gradients.append(jax.jit(jax.grad(loss))(params))
        counts.append(flops.count(jax.value_and_grad(loss), params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), *gradients)
    assert counts[1].model == counts[0].model == counts[0].hardware < counts[1].hardware


def test_an_unknown_group_to_rematerialise_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'stage1/block1'"):
        registry.build("resnet18").rematerialised("stage1/blok1")


def test_truncated_transformers_end_in_a_level() -> None:
    encoder = registry.build("vit_small").truncate("block4")
    assert [level.name for level in encoder.pyramid_levels] == ["block3", "block4"]
    assert registry.build("vit_small").feature_trunk.groups[-1] == "block12"
    assert registry.build("efficientnet_b0").feature_trunk.groups[-1] == "stage7/block1"
    whole = registry.build("resnet18")
    assert whole.feature_trunk is whole


def test_copies_keep_what_they_do_not_change() -> None:
    encoder = registry.build("vit_small").rematerialised("block1", "block12")
    other = encoder.with_preprocess(encoder.preprocess.for_channels(1)).truncate("block2")
    assert other.remat == {"block1"}
    assert (other.channels, other.image_size, other.as_map) == (1, 224, encoder.as_map)
    assert other.feature_trunk.preprocess == other.preprocess


def test_dropout_keeps_the_mean() -> None:
    x = jnp.ones((4000, 2, 3))
    dropped = dropout(x, 0.25, jax.random.key(0))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(4 / 3)}
    assert abs(float(dropped.mean()) - 1) < 0.03
    assert dropout(x, 0.25, None) is x


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"name": "densenet121", "drop_path": 0.1},
            r"^model\.drop_path is 0\.1, but model 'densenet121' has no residual branches \(a decoder's are .*'resnet50'$",
        ),
        (
            {"name": "resnet18", "dropout": 0.1},
            r"^model\.dropout is 0\.1, but model 'resnet18' has no layers with",
        ),
        (
            {"name": "resnet18", "drop_path_subset": True},
            r"^model\.drop_path_subset is true, but model\.drop_path is 0, so that no branch is skipped: expected",
        ),
    ],
)
def test_an_option_without_effect_is_refused_in_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ModelSettings(**values).encoder()


def test_what_an_architecture_has_is_taken() -> None:
    for name in registry.names():
        is_transformer = name.startswith(("vit", "swin"))
        has_branches = not name.startswith(("densenet", "unet"))
        if is_transformer:
            ModelSettings(name=name, dropout=0.1).encoder()
        if has_branches:
            ModelSettings(name=name, drop_path=0.1, drop_path_subset=True).encoder()


def test_randomness_is_the_key_s_alone() -> None:
    options = Options(drop_path=0.5, dropout=0.5)
    encoder = vit.network("vit_small", vit.Size(16, 2, 2), vit.MAE._replace(patch=4, image_size=16), options)
    plain = vit.network("vit_small", vit.Size(16, 2, 2), vit.MAE._replace(patch=4, image_size=16), DEFAULT)
    params, batch_stats = jax.tree.map(jnp.asarray, encoder.init(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16, 3)), jnp.float32)
    run = jax.jit(lambda rng: encoder.apply(params, batch_stats, x, rng=rng)[0])
    one, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1
    still, _ = jax.jit(lambda: encoder.apply(params, batch_stats, x))()
    np.testing.assert_array_equal(still, jax.jit(lambda: plain.apply(params, batch_stats, x))()[0])


def test_the_head_s_dropout_needs_a_key() -> None:
    encoder = vit.network("vit_small", vit.Size(16, 1, 2), vit.MAE._replace(patch=4, image_size=16), DEFAULT)
    model = Classifier(encoder, 3, dropout=0.5)
    params, batch_stats = jax.tree.map(jnp.asarray, model.init(0))
    pooled = jnp.ones((2, 16))
    plain, _ = model.suffix(params, batch_stats, pooled, len(encoder.groups))
    dropped, _ = model.suffix(params, batch_stats, pooled, len(encoder.groups), rng=jax.random.key(0))
    assert np.abs(plain - dropped).max() > 0
    np.testing.assert_allclose(
        plain, Classifier(encoder, 3).suffix(params, batch_stats, pooled, len(encoder.groups))[0]
    )


def test_transformers_refuse_images_that_are_no_grid() -> None:
    encoder = registry.build("vit_small_dinov2")
    images = jax.ShapeDtypeStruct((1, 100, 100, 3), jnp.float32)
    with pytest.raises(UserError, match=r"100 x 100 pixels.*multiple of their patch's 14, such as 98 x 98"):
        jax.eval_shape(lambda *args: encoder.apply(*args, stop=1), *encoder.abstract(), images)


@pytest.mark.parametrize(
    "name", [name for name in registry.names() if "large" not in name and "base" not in name]
)
def test_channels_are_free(name: str) -> None:
    encoder = registry.build(name, Options(channels=5))
    assert encoder.channels == 5
    side = 2 * encoder.specs[0].reduction * 8
    params, batch_stats = encoder.abstract()
    x = jax.ShapeDtypeStruct((1, side, side, 5), jnp.float32)
    after = jax.eval_shape(lambda p, s, x: encoder.apply(p, s, x, stop=1)[0], params, batch_stats, x)
    assert after.shape[-1] == encoder.specs[0].features


INITIAL = {
    Kind.BIAS: 0,
    Kind.BATCH_NORM_SCALE: 1,
    Kind.BATCH_NORM_BIAS: 0,
    Kind.LAYER_NORM_SCALE: 1,
    Kind.LAYER_NORM_BIAS: 0,
    Kind.LAYER_SCALE: 1e-6,
    Kind.RUNNING_MEAN: 0,
    Kind.RUNNING_VARIANCE: 1,
}


def drawn_variance(kind: Kind, shape: tuple[int, ...]) -> float:
    """He et al. by fan-out for convolutions, LeCun by fan-in for dense layers, 0.02 squared for embeddings."""
    if kind is Kind.DENSE_KERNEL:
        return 1 / shape[0]
    if kind in (Kind.CONV_KERNEL, Kind.GROUPED_KERNEL, Kind.DEPTHWISE_KERNEL):
        return 2 / (shape[0] * shape[1] * (1 if kind is Kind.DEPTHWISE_KERNEL else shape[3]))
    return 0.02**2


@pytest.mark.parametrize(
    "name", ["vit_small_dinov2_registers", "convnext_tiny", "swin_tiny", "efficientnet_b0"]
)
def test_initial_values_follow_from_kinds(name: str) -> None:
    model = Classifier(registry.build(name), 2)
    params, batch_stats = (flatten(tree) for tree in model.init(0))
    assert model.kinds.keys() == params.keys() | batch_stats.keys()
    for path, array in (params | batch_stats).items():
        kind = model.kinds[path]
        if kind in INITIAL:
            assert (array == np.float32(INITIAL[kind])).all(), path
        else:
            variance = drawn_variance(kind, array.shape)
            # The variance of a normal sample of n values deviates by about sqrt(2 / n) of it.
            assert array.var() == pytest.approx(variance, rel=6 * (2 / array.size) ** 0.5), path
