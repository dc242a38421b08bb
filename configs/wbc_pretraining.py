"""Which pre-training length transfers best, known from a score: a small encoder from scratch, every checkpoint measured.

    python -m dapt_jax.main --config=configs/wbc_pretraining.py --config.data_dir=../shared/data
    --workdir=runs/wbc_pretraining

A ResNet-18 is pre-trained from scratch on 1,200 SYNTHETIC textures (12 classes). After every other epoch,
scores without labels (robustness, alignment, uniformity) and with labels are computed on white blood cells,
and the checkpoint is measured for good on development and external cells: linear heads on frozen features, five
folds, AUC of the types; and a U-Net on the frozen encoder, one fold, Dice of cytoplasm and nucleus. The report has the
curves; the checkpoint that the rule chooses is handed over as `pretraining`. docs/wbc_pretraining.md has what it
printed.
"""

from dapt_jax.settings import default

TYPES = ("neutrophil", "lymphocyte", "monocyte", "eosinophil")
SEGMENTS = ("background", "cytoplasm", "nucleus")


def get_config():
    config = default()
    config.name = "wbc_pretraining"
    config.title = "Pre-training from scratch on textures: which checkpoint transfers best to white cells"
    config.note = (
        "Pre-training on SYNTHETIC textures; target: real white cells, linear heads on frozen features."
    )
    config.model.name = "resnet18"
    config.model.image_size = 32
    config.weights = "random"
    config.strategies = ("pretraining",)
    config.seeds = (0, 1, 2)
    config.corpus.update({"kind": "textures", "name": "all", "n": 1200})
    wbc = {"kind": "manifest", "path": "wbc/manifest.csv", "classes": TYPES, "drop_classes": ("basophil",)}
    for name, images in (("types", wbc), ("masks", {**wbc, "segments": SEGMENTS})):
        config.tasks[name] = {
            "development": {**images, "where": "source=dataset1"},
            "external": {**images, "where": "source=dataset2", "crop": 180},
        }
    config.custom_strategies.pretraining = {
        "phases": (
            {
                "name": "pretraining", "epochs": 16, "trainable": ("*",), "lr": 1e-3, "batch_norm": "train",
                "schedule": "cosine", "warmup": 1.0,
            },
        )
    }  # fmt: skip
    config.adapt.batch_size = 32
    config.adapt.optimizer.name = "adamw"
    config.adapt.optimizer.weight_decay = 0.05
    config.adapt.loss.label_smoothing = 0.1
    config.adapt.augment.flip = "dihedral"
    config.adapt.augment.shift = 0.1
    config.adapt.augment.brightness = 0.2
    config.adapt.augment.contrast = 0.2
    config.checkpoint_scoring.every = 2
    config.checkpoint_scoring.names = (
        "robustness", "alignment", "uniformity", "logme", "h_score", "regularised_h_score", "transrate", "gbc", "sfda",
        "parc", "knn", "linear_probe", "leep", "nce", "nleep",
    )  # fmt: skip
    config.checkpoint_scoring.images = 299
    config.checkpoint_scoring.downstream = True
    config.checkpoint_selection.score = "robustness"
    config.transfer.protocols = ("linear",)
    segmentation = config.transfer.segmentation
    segmentation.update({"protocols": ("frozen",), "decoder_epochs": 2, "epochs": 6, "num_fixed_views": 4})
    segmentation.augment.update(
        {"flip": "dihedral", "rotate": 45.0, "scale": 0.2, "brightness": 0.1, "contrast": 0.1}
    )
    config.runtime.checkpoint_every_s = 120.0
    return config
