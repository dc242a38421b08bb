"""FLOPs of whole networks against formulas that are written down from their architectures, mask by mask."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from benchmarks import our_step
from dapt_jax.cost.flops import count
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.training import accounting

SIZE = 64


def hits(length, taps, stride, pad):
    """Pairs of output position and kernel tap along an axis that meet a pixel: per tap, positions within the image."""
    positions = (length + 2 * pad - taps) // stride + 1
    total = 0
    for tap in range(taps):
        first = max(0, -(-(pad - tap) // stride))
        last = min(positions - 1, (length - 1 + pad - tap) // stride)
        total += max(0, last - first + 1)
    return total


def conv(length, taps, stride, inputs, outputs):
    return 2 * hits(length, taps, stride, (taps - 1) // 2) ** 2 * inputs * outputs


def resnet50(size):
    """FLOPs of each convolution by group, in order, from table 1 of arXiv 1512.03385 with the stride on the 3x3."""
    groups = {"stem": [conv(size, 7, 2, 3, 64)]}
    side, channels = size // 4, 64
    for stage, (depth, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for block in range(1, depth + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            skip = [conv(side, 1, stride, channels, 4 * width)] if block == 1 else []
            small = side // stride
            groups[f"stage{stage}/block{block}"] = [
                conv(side, 1, 1, channels, width),
                conv(side, 3, stride, width, width),
                conv(small, 1, 1, width, 4 * width),
                *skip,
            ]
            side, channels = small, 4 * width
    return groups


def test_resnet50_is_the_published_figure():
    groups = registry.build("resnet50").groups
    forward = accounting.forward(Classifier(registry.build("resnet50"), 1000), 224, len(groups))
    assert forward.padded + 2 * 2048 * 1000 == 2 * 4_089_184_256
    assert forward.unknown == ()
    assert forward.model == sum(sum(each) for each in resnet50(224).values())


@pytest.mark.parametrize(
    "last", ["head", "stage4/block3", "stage4/block2", "stage3/block1", "stage1/block1", "*"]
)
def test_resnet50_for_each_mask(last):
    """Forward once; above the boundary every convolution has a weight gradient, and an input gradient unless it is first."""
    groups = resnet50(SIZE)
    names = list(groups)
    trained = {"*": ("*",), "head": ("head",)}.get(last) or (*names[names.index(last) :], "head")
    made = our_step.program("resnet50", trained)
    cost = accounting.image_cost(made, SIZE)
    below = names.index(last) if last in names else (0 if last == "*" else len(names))
    head = 2 * 2048 * our_step.CLASSES
    assert cost.prefix.model == sum(sum(groups[name]) for name in names[:below])
    above = [groups[name] for name in names[below:]]
    flops = 3 * sum(map(sum, above)) + 3 * head
    if above:
        # Nothing asks for the gradient of what comes in; a block takes it in twice where its skip has a
        # convolution.
        first = above[0]
        flops -= first[0] + (first[3] if len(first) == 4 else 0)
    else:
        flops -= head
    assert cost.suffix.model == cost.suffix.hardware == flops


def dense(x, weights):
    return x @ weights


def vit(params, x):
    """Pre-norm vision transformer without its norms, which cost no matrix products: patches, blocks, mean, head."""
    x = dense(x, params["patch"])
    for block in params["blocks"]:
        q, k, v = jnp.split(dense(x, block["qkv"]), 3, axis=-1)
        q, k, v = (jnp.reshape(each, (*each.shape[:2], HEADS, -1)) for each in (q, k, v))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        x = x + dense(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape), block["out"])
        x = x + dense(jax.nn.gelu(dense(x, block["up"])), block["down"])
    return dense(x.mean(1), params["head"])


TOKENS, PATCH, WIDTH, HEADS, DEPTH, CLASSES, BATCH = 9, 48, 12, 3, 4, 5, 2


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def vit_params():
    block = {
        "qkv": (WIDTH, 3 * WIDTH),
        "out": (WIDTH, WIDTH),
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
    }
    blocks = [{name: spec(*shape) for name, shape in block.items()} for _ in range(DEPTH)]
    return {"patch": spec(PATCH, WIDTH), "blocks": blocks, "head": spec(WIDTH, CLASSES)}


# Per image: 12 d^2 per token in the dense layers of a block, and two products of n x n x d in its attention.
VIT_DENSE, VIT_ATTENTION = 2 * TOKENS * 12 * WIDTH**2, 2 * 2 * TOKENS**2 * WIDTH
VIT_PATCH, VIT_HEAD = 2 * TOKENS * PATCH * WIDTH, 2 * WIDTH * CLASSES


@pytest.mark.parametrize("trained", [0, 1, 2, DEPTH, "all"])
def test_vision_transformer_for_each_mask(trained):
    params, images = vit_params(), spec(BATCH, TOKENS, PATCH)
    number = DEPTH if trained == "all" else trained
    frozen = {"patch": params["patch"], "blocks": params["blocks"][: DEPTH - number]}
    train = {"blocks": params["blocks"][DEPTH - number :], "head": params["head"]}
    if trained == "all":
        train["patch"] = frozen.pop("patch")

    def loss(train, frozen, images):
        both = {**frozen, **train, "blocks": [*frozen["blocks"], *train["blocks"]]}
        return vit(both, images).sum()

    counted = count(jax.value_and_grad(loss), train, frozen, images)
    block = VIT_DENSE + VIT_ATTENTION
    forward = VIT_PATCH + DEPTH * block + VIT_HEAD
    backward = VIT_HEAD + (VIT_HEAD if number else 0) + number * 2 * block
    if trained == "all":
        backward += VIT_PATCH  # a weight gradient; none of the patches
    elif number:
        backward -= 2 * TOKENS * 3 * WIDTH**2  # the first trained block passes nothing on through q, k and v
    assert counted.model == counted.hardware == BATCH * (forward + backward)
    assert counted.unknown == ()


UNET = (4, 6, 8)


def unet(params, x):
    """Two levels down and up again: 3x3 convolutions, 2x2 max-pool, transposed 2x2 convolutions, skips joined."""
    step = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    skips = []
    for number, kernel in enumerate(params["down"]):
        if number:
            x = x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).max((2, 4))
        x = jax.nn.relu(step(x, kernel, (1, 1), "SAME"))
        skips.append(x)
    for kernel, up, skip in zip(params["merge"], params["up"], skips[-2::-1], strict=True):
        x = jax.lax.conv_transpose(x, up, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(step(jnp.concatenate([x, skip], -1), kernel, (1, 1), "SAME"))
    return step(x, params["out"], (1, 1), "SAME")


@pytest.mark.parametrize("mask", ["decoder", "all"])
def test_unet_for_each_mask(mask):
    side = 16
    down = [spec(3, 3, a, b) for a, b in itertools.pairwise((3, *UNET))]
    params = {
        "down": down,
        "up": [spec(2, 2, UNET[2], UNET[1]), spec(2, 2, UNET[1], UNET[0])],
        "merge": [spec(3, 3, 2 * UNET[1], UNET[1]), spec(3, 3, 2 * UNET[0], UNET[0])],
        "out": spec(1, 1, UNET[0], 2),
    }
    train = {name: leaf for name, leaf in params.items() if mask == "all" or name != "down"}
    frozen = {name: leaf for name, leaf in params.items() if name not in train}
    counted = count(
        jax.value_and_grad(lambda train, frozen, x: unet({**frozen, **train}, x).sum()),
        train,
        frozen,
        spec(1, side, side, 3),
    )
    encoder = [conv(side // 2**n, 3, 1, a, b) for n, (a, b) in enumerate(itertools.pairwise((3, *UNET)))]
    ups = [2 * (side // 4) ** 2 * 4 * UNET[2] * UNET[1], 2 * (side // 2) ** 2 * 4 * UNET[1] * UNET[0]]
    merges = [conv(side // 2, 3, 1, 2 * UNET[1], UNET[1]), conv(side, 3, 1, 2 * UNET[0], UNET[0])]
    out = 2 * side**2 * UNET[0] * 2
    forward, decoder = sum(encoder) + sum(ups) + sum(merges) + out, sum(ups) + sum(merges) + out
    # The decoder's gradients need none of its first input; joined skips take no gradient apart from the
    # whole.
    expected = forward + 2 * decoder - ups[0] if mask == "decoder" else 3 * forward - encoder[0]
    assert counted.model == counted.hardware == expected


def test_convolutions_without_padding_are_what_xla_counts():
    """Where `cost_analysis` is right: no padding, no loop; elementwise work, which it adds, is none here."""

    def fn(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    args = [spec(2, 9, 9, 4), spec(3, 3, 4, 8)]
    compiled = jax.jit(fn).lower(*args).compile().cost_analysis()
    assert count(fn, *args).model == int(compiled["flops"])


def test_loops_are_where_xla_is_wrong():
    def fn(x):
        return jax.lax.scan(lambda h, _: (h @ x, None), x, None, length=7)[0]

    compiled = jax.jit(fn).lower(spec(16, 16)).compile().cost_analysis()
    assert count(fn, spec(16, 16)).model == 7 * 2 * 16**3
    assert compiled["flops"] < 2 * 2 * 16**3
