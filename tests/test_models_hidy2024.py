"""The networks of arXiv 2410.18677: logits and sizes are those of its public code, and its files load."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import Options
from dapt_jax.models.encoders import hidy2024
from dapt_jax.models.preprocess import UNIT
from dapt_jax.models.segmenter import Segmenter
from dapt_jax.weights import recognise, tables
from dapt_jax.weights.merge import merge
from dapt_jax.weights.paths import flatten, unflatten
from tests.fixtures import parity
from tests.fixtures.make_hidy2024 import RESNET, SIDES, WIDTHS

# Network -> our encoder, its parameters, and those of the network with one output, as the public code counts them.
SIZES = {
    "unet": ("unet_hidy2024", 18_888_064, 31_080_449),
    "attention_unet": ("resnet50_hidy2024", 20_731_456, 55_668_321),
    "swin_unet": ("swin_hidy2024", 20_411_850, 27_166_596),
}
ENDINGS = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(tree).values())


@pytest.mark.parametrize("network", SIZES)
def test_networks_have_as_many_parameters_as_the_paper_s(network: str) -> None:
    name, of_encoder, of_network = SIZES[network]
    encoder = registry.build(name)
    assert count(encoder.abstract()[0]) == of_encoder
    assert count(Segmenter(encoder, 1, f"{network}_hidy2024").abstract()[0]) == of_network


def narrow(network: str):
    """The encoder of a fixture."""
    name = SIZES[network][0]
    if network == "unet":
        return hidy2024.contracting_path(name, WIDTHS, Options())
    if network == "swin_unet":
        return hidy2024.windowed_network(name, 32, (1, 2, 4), Options())
    return hidy2024.residual_network(name, RESNET["channel_sizes"], RESNET["widths"], Options())


def scaled_branches(params) -> None:
    """Multiply the last norm of every block by 1 - its rate, which the public code does at test time."""
    blocks = [
        block for stage in sorted(params) if stage.startswith("stage") for block in params[stage].values()
    ]
    for rate, block in zip(np.linspace(0, RESNET["stochastic_depth_rate"], len(blocks)), blocks, strict=True):
        block["norm3"] = {name: array * np.float32(1 - rate) for name, array in block["norm3"].items()}


def in_the_decoder(network: str, module: str) -> str:
    """The public code's name of a module of ours."""
    if module == "head/conv":
        return "decoder.final_block.output" if network == "swin_unet" else "decoder.final_block"
    _, step, *parts = module.split("/")
    part = "/".join(parts)
    if step == "expand":
        return f"decoder.final_block.{'init_norm' if part == 'norm' else part.removeprefix('expand/')}"
    level = f"decoder.up_layers.{int(step[-1]) - 1}"
    if part.startswith("blocks/"):
        _, number, *rest = parts
        within = {"attention/qkv": "attn.qkv", "attention/project": "attn.proj", "": "attn"}
        within |= {"mlp/expand": "mlp.fc1", "mlp/project": "mlp.fc2"}
        return f"{level}.conv{number}.{within.get('/'.join(rest), '/'.join(rest))}"
    places = {
        "up": "upsampl.convup.1",
        "join": "mixing.linear_layer",
        "gate/gating": "mixing.gs_block.block.0",
    }
    places |= {"gate/norm_gating": "mixing.gs_block.block.1"}
    for ours, theirs in (("signal", "W_g"), ("map", "W_s"), ("weight", "psi")):
        places |= {f"gate/{ours}": f"mixing.{theirs}.0", f"gate/norm_{ours}": f"mixing.{theirs}.1"}
    for ours, place in (("conv1", 0), ("norm1", 1), ("conv2", 3), ("norm2", 4)):
        places[f"convs/{ours}"] = f"conv0.block.{place}"
    places |= {"expand/expand": "upsampl.expand", "expand/norm": "upsampl.norm"}
    return f"{level}.{places[part]}"


def loaded(network: str, segmenter: Segmenter, source: dict[str, np.ndarray]):
    """Parameters and statistics of a network from the public code's state dict; every array is used."""
    body = {key: array for key, array in source.items() if key.startswith("encoder.")}
    if network == "swin_unet":  # the paper's has one stage more
        body = {key.replace("bottom_block", "down_layers.2"): array for key, array in body.items()}
    *trees, report = merge(Classifier(segmenter.encoder, 1), body, seed=0)
    assert not report.left_over
    rest = {key: array for key, array in source.items() if key.startswith("decoder.")}
    found = []
    for encoder, shapes in zip(trees, segmenter.abstract(), strict=True):
        arrays = {}
        for path, leaf in flatten(shapes).items():
            if not path.startswith(("decoder/", "head/")):
                continue
            module, _, ending = path.rpartition("/")
            if ending == "relative_bias":
                array = rest.pop(f"{in_the_decoder(network, module)}.relative_position_bias_table")
            else:
                array = rest.pop(f"{in_the_decoder(network, module)}.{ENDINGS.get(ending, ending)}")
                array = {4: lambda a: a.transpose(2, 3, 1, 0), 2: np.transpose}.get(array.ndim, lambda a: a)(
                    array
                )
            assert array.shape == leaf.shape, path
            arrays[path] = array
        found.append(segmenter.adopt(unflatten(arrays), encoder))
    assert not rest
    return found


@pytest.mark.long
@pytest.mark.parametrize("network", SIZES)
def test_logits_are_those_of_the_public_code(network: str) -> None:
    stored = parity.load(f"hidy2024_{network}")
    segmenter = Segmenter(narrow(network), 2, f"{network}_hidy2024")
    source = {name: parity.values(name, shape) for name, shape in stored.shapes.items()}
    params, batch_stats = loaded(network, segmenter, source)
    if network == "attention_unet":
        scaled_branches(params)
    logits = np.asarray(jax.jit(segmenter)(params, batch_stats, parity.images(SIDES[network])))
    assert logits.shape == (1, SIDES[network], SIDES[network], 2)
    np.testing.assert_allclose(
        parity.sampled(logits), stored.logits, rtol=1e-4, atol=1e-5 * np.abs(stored.logits).max()
    )


@pytest.mark.parametrize("name", [name for name, *_ in SIZES.values()])
def test_released_encoders_load_under_the_names_of_the_pretrained_classifiers(name: str) -> None:
    """The state dict of a whole classifier: `layers.0` is the encoder, `layers.3` the ImageNet head."""
    classifier = Classifier(registry.build(name), 1000)
    (scheme,) = tables.SCHEMES[name]
    params, batch_stats = classifier.abstract()
    shapes = {path: leaf.shape for path, leaf in (flatten(params) | flatten(batch_stats)).items()}
    source = {}
    for path, entry in tables.table(scheme, classifier).items():
        like = np.broadcast_to(np.float32(0.5), shapes[path])
        prefix = "" if path.startswith("head/") else "layers.0."
        source[prefix + entry.key] = entry.restore(like)
    source["layers.0.down_layers.0.conv1.attn_mask"] = np.zeros((64, 49, 49), np.float32)
    merged, _, report = merge(Classifier(registry.build(name), 3), source, seed=0)
    assert report.prefix == "layers.0."
    assert set(flatten(merged)) == set(flatten(params))
    assert all(
        (array == 0.5).all() for path, array in flatten(merged).items() if not path.startswith("head/")
    )


def test_released_files_say_by_their_names_that_images_are_divided_by_255() -> None:
    for encoder in ("resnet50", "swin_transformer", "unet_encoder"):
        known = recognise.expected(f"{encoder}_advanced_pretraining_checkpoint_epoch_300.pt")
        assert known.preprocess == UNIT


def test_the_swin_decoder_drops_branches_as_the_encoder_s_stage_of_its_resolution() -> None:
    encoder = hidy2024.windowed_network("swin_hidy2024", 32, (1, 2, 4), Options(drop_path=0.5))
    segmenter = Segmenter(encoder.with_options(Options(drop_path=0.5)), 1, "swin_unet_hidy2024")
    first, second = (segmenter._parts[f"decoder/level{number}"].step.build() for number in (1, 2))
    np.testing.assert_allclose([block.stochastic_depth.rate for block in first.blocks], [0.2, 0.3])
    np.testing.assert_allclose([block.stochastic_depth.rate for block in second.blocks], [0.0, 0.1])
    params, batch_stats = jax.tree.map(jnp.asarray, segmenter.init(0))
    x = segmenter.prefix(params, batch_stats, jnp.asarray(parity.images(48)), len(encoder.groups))
    draws = [
        segmenter.suffix(params, batch_stats, x, len(encoder.groups), rng=key)[0]
        for key in (None, jax.random.key(0), jax.random.key(1))
    ]
    assert not np.allclose(draws[0], draws[1])
    assert not np.allclose(draws[1], draws[2])
