"""Pre-training of "Enhancing pretraining efficiency for medical image segmentation via transferability metrics" (arXiv
2410.18677), scored along the way, and its segmentation targets.

    python -m dapt_jax.main --config=configs/hidy2024.py:acdc,resnet50,simple --config.data_dir=DATA
    --workdir=runs/acdc

`DATASET,MODEL[,SCHEME]`: a target of `DATASETS` (`acdc`, `covid_qu`, `idrid`, or `own`), or several that
share one pre-training (`acdc+idrid`), a model of `MODELS` (`unet`, `resnet50`, `swin`) and a scheme
(`simple`, `advanced`). DATA holds `generic/`, a folder per class (the paper: ImageNet-1k), and the target set
as docs/data_sets.md says, or `target/manifest.csv` with masks of 0 and 1 for `own`.

300 epochs from scratch at 224 px: AdamW (.9, .999) with decay .05, label smoothing .1, 20 epochs of warm-up,
then cosine; batch 4,096 at 4e-3 (Swin advanced: 1,024 at 1e-3; U-Net simple: 5 epochs of warm-up).
`--config.adapt.batch_size=256 --config.custom_strategies...` where that does not fit; `--config.mode=plan`
says what it takes.
The robustness score (cosine, margin .5, pooled, deepest skip: the paper's defaults) is computed on 256 target
images every 5 epochs; the checkpoint is chosen by it with a bonus for length, as docs/checkpoint_selection.md
found best.

Downstream: U-Net decoder, attention U-Net or Swin U-Net; 150 epochs, batch 24, SGD at .05 with momentum .9
and decay 1e-4, the rate falling as (1 - t)^.9, Dice over the batch with a smoothing of 1e-5; encoder frozen
and fine-tuned; from the chosen checkpoint, from the last one and from scratch, five seeds. IDRiD
(microaneurysms) trains on random crops of 224 px and is segmented through windows. Expected of the
paper's released scores: from scratch 2.75 points of Dice below 300 epochs where fine-tuned, 6.59 where
frozen.

As in the paper ACDC and IDRiD train on all official training images and COVID-QU on all COVID-19 images of
train and val, and the official test images are scored (of its arrays, which have no val, with
`--config.tasks.covid_qu.train.where=split=train`); only `own` is divided into five folds, of which one is
run. The last epoch is scored: there is no validation part to choose one by.

Where the recipe differs, because the library has one way of doing it:
- RandAugment is two operations of magnitude 9, torchvision's defaults, and mirrors what comes in from beyond
  the border, as rotation does (the paper: 0); erasing fills with noise (0); the rate falls to 0, not to 1e-6.
- Mixup draws from Beta(.8, .8) for every batch of its half; the paper draws uniformly, for 80% of the images.
- Weight decay leaves out biases and norms; input is normalised as the weights say, not divided by 255.
- Stochastic depth is the same before and after; the paper fine-tunes Swin at .2.
- Networks: torchvision's ResNet-50 and Swin-T with smp-like decoders, where the paper's ResNet has no
  projections, its Swin a width of two blocks in each stage, its U-Net a decoder of 512 to 64.
- Dice loss: foreground alone, sums in the denominator; the paper averages background and foreground and
  squares the prediction. A frozen encoder uses its own statistics of batch norm; the paper's moves.
- IDRiD: a random crop per image and epoch, zoomed by 1/2 to 2, of images of 1120 x 1120; the paper cuts 119
  crops of 448 px of images of 1120 x 2240 and trains on all that are not dark. Whole images are scored here,
  crops there.
"""

from dapt_jax.errors import UserError, nearest
from dapt_jax.settings import default

MODELS = {
    "unet": ("unet", "unet"),
    "resnet50": ("resnet50", "attention_unet"),
    "swin": ("swin_tiny", "swin_unet"),
}
SCHEMES = ("simple", "advanced")
_COVID_QU = {"kind": "covid_qu", "path": "COVID-QU", "region": "infection"}
_OWN = {"kind": "manifest", "path": "target/manifest.csv", "segments": ("background", "target")}
_CROPS = {"patch": 224, "scale": 1.0, "brightness": 0.1, "contrast": 0.05, "saturation": 0.1, "hue": 0.05}
DATASETS = {
    "acdc": {"kind": "acdc", "path": "ACDC"},
    "covid_qu": {
        "train": {**_COVID_QU, "where": "split=train|val,label=COVID-19"},
        "test": {**_COVID_QU, "where": "split=test,label=COVID-19"},
    },
    "idrid": {
        "kind": "idrid", "path": "IDRiD", "lesions": ("microaneurysm",), "image_size": 1120,
        "transfer": {"segmentation": {"augment": _CROPS}},
    },
    "own": {"development": _OWN},
}  # fmt: skip


def get_config(arm="own,resnet50,simple"):
    dataset, model, scheme = _read(arm)
    small = (model, scheme) == ("swin", "advanced")
    config = default()
    config.name = f"hidy2024_{dataset}_{model}_{scheme}"
    config.title = f"arXiv 2410.18677, {dataset}, {model}, {scheme}: pre-training scored along the way"
    config.seeds = (0, 1, 2, 3, 4)
    config.model.name = MODELS[model][0]
    config.model.image_size = 224
    config.weights = "random"
    config.strategies = ("none", "pretraining")
    phase = {
        "name": "pretraining", "epochs": 300, "trainable": ("*",), "lr": 1e-3 if small else 4e-3, "batch_norm": "train",
        "schedule": "cosine", "warmup": 5.0 if (model, scheme) == ("unet", "simple") else 20.0,
    }  # fmt: skip
    config.corpus.update({"kind": "folder", "path": "generic", "val_fraction": 0.0})
    config.tasks.update({name: DATASETS[name] for name in dataset.split("+")})
    config.custom_strategies.pretraining = {"phases": (phase,)}
    config.adapt.batch_size = 1024 if small else 4096
    config.adapt.loss.label_smoothing = 0.1
    config.adapt.balance_classes = False
    config.adapt.optimizer.update({"name": "adamw", "weight_decay": 0.05, "eps": 1e-8})
    config.adapt.augment.update({"flip": "horizontal", "crop": 0.8})
    if scheme == "advanced":
        config.adapt.augment.update({"randaugment": 2, "magnitude": 9.0, "erase": 0.25})
        config.adapt.mix.update({"mixup": 0.8, "cutmix": 1.0, "switch": 0.5})
    if scheme == "advanced" or model == "swin":
        config.model.drop_path = 0.1 if model != "unet" else 0.0
    segmentation = config.transfer.segmentation
    segmentation.update({
        "protocols": ("finetune", "frozen"), "decoder": MODELS[model][1],
        "loss": {"name": "dice", "batchwise": True, "smoothing_constant": 1e-5},
        "decoder_epochs": 0, "epochs": 150, "lr": 0.05, "decoder_lr": 0.05, "schedule": "poly",
        "batch_norm": "train", "batch_size": 24,
    })  # fmt: skip
    segmentation.optimizer.update({"name": "sgd", "b1": 0.9, "weight_decay": 1e-4})
    segmentation.augment.update({"flip": "dihedral", "rotate": 180.0})
    config.checkpoint_scoring.every = 5
    config.checkpoint_selection.rule = "length_prior"
    config.checkpoint_selection.score = "robustness"
    return config


def _read(arm: str) -> tuple[str, str, str]:
    """The three parts of the argument; the scheme may be left out."""
    parts = [part.strip() for part in arm.split(",")]
    if len(parts) == 2:
        parts.append(SCHEMES[0])
    if len(parts) != 3:
        raise UserError(
            f"configs/hidy2024.py: {arm!r}; expected DATASET,MODEL[,SCHEME], such as acdc,resnet50,simple"
        )
    named = [(name, DATASETS) for name in parts[0].split("+")]
    for part, known in (*named, (parts[1], MODELS), (parts[2], SCHEMES)):
        if part not in known:
            raise UserError(f"configs/hidy2024.py: unknown {part!r} in {arm!r}; {nearest(part, known)}")
    return parts[0], parts[1], parts[2]
