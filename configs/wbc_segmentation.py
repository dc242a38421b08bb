"""Nucleus and cytoplasm of white blood cells, real images: ImageNet, DAPT and random weights under a U-Net.

    python -m dapt_jax.main --config=configs/wbc_segmentation.py --config.data_dir=../shared/data
    --workdir=runs/wbc_masks

The images of configs/wbc.py with their masks: dataset1 (299 cells, one fold of five held out, look-alikes on
one side), dataset2 (97 cells of another laboratory, other stain and scale) as external set. U-Net on
EfficientNet-Lite0, the encoder frozen and fine-tuned, three seeds; the baseline tells every pixel by its own
colour. docs/wbc_segmentation.md has the table that it printed and how long it took.
"""

from dapt_jax.settings import default

TYPES = ("neutrophil", "lymphocyte", "monocyte", "eosinophil")
SEGMENTS = ("background", "cytoplasm", "nucleus")


def get_config():
    config = default()
    config.name = "wbc_segmentation"
    config.title = "Nucleus and cytoplasm of white blood cells: ImageNet, DAPT and random weights"
    config.note = (
        "Corpus: BCCD crops. Target: masks of 299 white cells; external: 97 cells, other stain and scale."
    )
    config.strategies = ("none", "full", "scratch")
    config.model.image_size = 96
    wbc = {
        "kind": "manifest", "path": "wbc/manifest.csv", "classes": TYPES, "drop_classes": ("basophil",),
        "segments": SEGMENTS,
    }  # fmt: skip
    config.corpus.update({"kind": "manifest", "path": "bccd/manifest.csv"})
    config.tasks.cells = {
        "development": {**wbc, "where": "source=dataset1"},
        "external": {**wbc, "where": "source=dataset2", "crop": 180},
    }
    config.custom_strategies.scratch = {"weights": "random", "phases": ()}
    config.adapt.head_epochs = 5
    config.adapt.epochs = 2
    config.adapt.augment.flip = "dihedral"
    segmentation = config.transfer.segmentation
    segmentation.decoder_epochs = 2
    segmentation.epochs = 6
    segmentation.num_fixed_views = 4
    segmentation.augment.update(
        {"flip": "dihedral", "rotate": 45.0, "scale": 0.2, "brightness": 0.1, "contrast": 0.1}
    )
    return config
