"""Pre-training of "Enhancing pretraining efficiency for medical image segmentation via transferability metrics" (arXiv
2410.18677), on images of your own, scored along the way.

    python -m dapt_jax.main --config=configs/hidy2024.py:resnet50_simple --config.data_dir=DATA --workdir=runs/hidy2024/resnet50

`MODEL_SCHEME`: a model of `MODELS` (`unet`, `resnet50`, `swin`) and a scheme (`simple`, `advanced`). DATA holds `generic/`,
a folder per class (the paper: ImageNet-1k), and `target/manifest.csv` (image,label,patient). 300 epochs from scratch at 224
px: AdamW (.9, .999) with decay .05, label smoothing .1, 20 epochs of warm-up, then cosine; batch 4,096 at 4e-3 (Swin advanced:
1,024 at 1e-3; U-Net simple: 5 epochs of warm-up). `--config.adapt.batch_size=256 --config.phases...` where that does not fit;
`--config.mode=plan` says what it takes. The robustness score (cosine, margin .5, pooled, deepest skip: the paper's defaults)
is computed on 256 target images every 5 epochs; the checkpoint is chosen by it with a bonus for length, as
docs/checkpoint_selection.md found best.

Downstream the paper trains a U-Net with each encoder: `MODELS` names the decoders that this package has for them
(`models/segmenter.py`). 150 epochs, batch 24, SGD at .05 with momentum .9 and decay 1e-4, the rate falling as (1 - t)^.9, a
Dice loss over the batch. `FINETUNE` has these settings, here for classification: target tasks are classification tasks, so
the Dice loss and the scores of masks are not part of this study.

Where the recipe differs: of the simple scheme's augmentation the crop is a shift; of the advanced scheme RandAugment, Mixup,
CutMix, random erasing and stochastic depth are not there, and `advanced` has the shifts, brightness and contrast that there
are. The rate falls to 0, not to 1e-6.
"""

from dapt_jax.config import default
from dapt_jax.errors import UserError, nearest

MODELS = {"unet": ("unet", "unet"), "resnet50": ("resnet50", "attention_unet"), "swin": ("swin_tiny", "swin_unet")}
SCHEMES = ("simple", "advanced")
FINETUNE = {"epochs": 150, "lr": 0.05, "schedule": "poly", "norm": "train", "batch_size": 24, "head_epochs": 0}


def get_config(arm="resnet50_simple"):
    arms = [f"{model}_{scheme}" for model in MODELS for scheme in SCHEMES]
    if arm not in arms:
        raise UserError(f"configs/hidy2024.py: unknown arm {arm!r}; {nearest(arm, arms)}")
    model, _, scheme = arm.partition("_")
    small = arm == "swin_advanced"
    config = default()
    config.name = f"hidy2024_{arm}"
    config.title = f"arXiv 2410.18677, {arm}: pre-training scored along the way"
    config.seeds = (0,)
    config.model.name = MODELS[model][0]
    config.model.image_size = 224
    config.weights = "random"
    config.strategies = ("pretraining",)
    phase = {
        "name": "pretraining", "epochs": 300, "trainable": ("*",), "lr": 1e-3 if small else 4e-3, "norm": "train",
        "schedule": "cosine", "warmup": 5.0 if arm == "unet_simple" else 20.0,
    }  # fmt: skip
    with config.unlocked():
        config.corpus.update({"kind": "folder", "path": "generic"})
        config.tasks.target = {"development": {"kind": "manifest", "path": "target/manifest.csv"}}
        config.phases.pretraining = {"phases": (phase,)}
    config.adapt.batch_size = 1024 if small else 4096
    config.adapt.label_smoothing = 0.1
    config.adapt.balance_classes = False
    config.adapt.optimizer.update({"name": "adamw", "weight_decay": 0.05, "eps": 1e-8})
    config.adapt.augment.update({"flip": "horizontal", "shift": 0.1})
    if scheme == "advanced":
        config.adapt.augment.update({"brightness": 0.4, "contrast": 0.4})
    config.transfer.protocols = ("linear", "finetune")
    config.transfer.finetune.update(FINETUNE)
    config.transfer.finetune.augment.flip = "dihedral"
    config.transfer.finetune.optimizer.update({"name": "sgd", "b1": 0.9, "weight_decay": 1e-4})
    config.score.every = 5
    config.score.rule = "length_prior"
    config.select = "robustness"
    return config
