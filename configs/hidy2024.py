"""Pre-training of "Enhancing pretraining efficiency for medical image segmentation via transferability
metrics" (arXiv 2410.18677), scored along the way, and its segmentation targets.

    python -m dapt_jax.main --config=configs/hidy2024.py:acdc,resnet50,simple --config.data_dir=DATA
    --workdir=runs/acdc

`DATASET,MODEL[,SCHEME[,RUN]]`: a target of `DATASETS` (`acdc`, `covid_qu`, `idrid`, or `own`), or several that
share one pre-training (`acdc+idrid`), a model of `MODELS` (`unet`, `resnet50`, `swin`) and a scheme
(`simple`, `advanced`). DATA holds `generic/`, a folder per class (the paper: ImageNet-1k), and the target set
as docs/data_sets.md says, or `target/manifest.csv` with masks of 0 and 1 for `own`.

One command pre-trains once, with seed 0, for all five seeds of the target. To pre-train once for all targets:

    ...:pretraining,resnet50,simple --workdir=runs/pre         six of them: no target, the paper's nine epochs kept
    ...:acdc,resnet50,simple,runs/pre --workdir=runs/acdc      eighteen: from scratch and from each kept epoch
    ...:grid --workdir=runs/hidy2024                           all of them

What the grid costs, without data (published numbers of images and slices; all tiles, dark ones too):

    ...:grid --config.mode=plan --config.plan.images=corpus=1281167/1000,acdc.train=1902,acdc.test=1076, \
        covid_qu.train=2330,covid_qu.test=583,idrid.train=6426,idrid.test=270

Six pre-trainings of 96.7 EFLOP serve eighteen targets with five seeds each, 194 EFLOP in all.

300 epochs from scratch at 224 px: AdamW (.9, .999) with decay .05, label smoothing .1, 20 epochs of warm-up,
then cosine; batch 4,096 at 4e-3 (Swin advanced: 1,024 at 1e-3; U-Net simple: 5 epochs of warm-up).
`--config.adapt.batch_size=256 --config.custom_strategies...` where that does not fit; `--config.mode=plan`
says what it takes.
The robustness score (cosine, margin .5, pooled, deepest skip: the paper's defaults) is computed on 256 target
images every 5 epochs; the checkpoint is chosen by it with a bonus for length, as docs/checkpoint_selection.md
found best.

Downstream: U-Net decoder, attention U-Net or Swin U-Net; 150 epochs, batch 24, SGD at .05 with momentum .9
and decay 1e-4, the rate falling as (1 - t)^.9, Dice over the batch with a smoothing of 1e-5; encoder frozen
and fine-tuned; from the chosen checkpoint and from scratch, with RUN from each kept epoch, five seeds. IDRiD
(microaneurysms) trains on random crops of 224 px of its tiles, which are scored through windows. Expected of the
paper's released scores: from scratch 2.75 points of Dice below 300 epochs where fine-tuned, 6.59 where
frozen.

As in the paper ACDC and IDRiD train on all official training images and COVID-QU on all COVID-19 images of
train and val, and the official test images are scored (of its arrays, which have no val, with
`--config.tasks.covid_qu.train.where=split=train`); only `own` is divided into five folds, of which one is
run. The last epoch is scored: the public code also keeps the best one, but by Dice of the test images.
Scores are the public code's, pooled over the pixels of all test images (`*_pooled`), the modified Hausdorff
distance (`hd95_joint`), and Dice and IoU per image; it adds 1 to both sides of a Dice index and averages the
areas under curves over batches.

IDRiD is cut as in the public code: 96 px off the left and the right, then 1120 x 2240, then tiles of 448 px:
119 of a photograph at a stride of 112 for training, 10 beside each other for the test (which leave out the last
224 rows), in both without those of a mean below .01. No photograph is in two splits.

As in the paper's public code, and tested against it: the three encoders and decoders, with its numbers of
parameters; the Dice loss, which averages background and foreground and squares the prediction. Also as there:
input divided by 255; mixup with a uniform share for 80% of the images of its half, drawn per image;
RandAugment of two operations of magnitude 9, and zeros beyond the border and in erased rectangles; weight
decay of all parameters; stochastic depth .1 of ResNet-50 and .2 of Swin downstream, whatever pre-training
had; a frozen encoder whose batch norm runs on the statistics of each batch. Its released encoders (Zenodo
record 13971513) load with `--config.weights=FILE --config.strategies=none` (docs/weights.md).

Where the recipe differs:
- Random crops are cut from the files, with a short side of up to 512 px; larger ones are shrunk first.
- Patches of IDRiD's tiles reach 64 px beyond them, mirrored as windows are (docs/data_sets.md); there they
  end at the border.
- The rate falls to 0, not to 1e-6, and warms up from its first step's share, not from 1e-6 of it.
- Initial values are those of the library (normal, by fan-out), where the paper takes He et al. by fan-in, and
  for Swin a truncated normal of .02; images are erased before they are mixed, there after.
- ACDC: intensities are scaled to 0 to 1; the public code takes them as the file has them.
- IDRiD: masks are resized to the nearest pixel, where the public code marks every pixel that a lesion touches;
  it takes crops of 224 px that lie inside the tile at any angle, where a turned tile is mirrored beyond its
  border here; photographs without a file of microaneurysms are left out there and are empty masks here.
"""

from dapt_jax.errors import UserError, nearest
from dapt_jax.settings import default

MODELS = {
    "unet": ("unet_hidy2024", "unet_hidy2024"),
    "resnet50": ("resnet50_hidy2024", "attention_unet_hidy2024"),
    "swin": ("swin_hidy2024", "swin_unet_hidy2024"),
}
METRICS = (
    "dice", "iou", "dice_pooled", "iou_pooled", "mcc_pooled", "auc_pooled", "ap_pooled",
    "balanced_accuracy_pooled", "sensitivity_pooled", "specificity_pooled", "precision_pooled", "hd95_joint",
)  # fmt: skip
DROP_PATH = {"unet": 0.0, "resnet50": 0.1, "swin": 0.2}
SCHEMES = ("simple", "advanced")
_COVID_QU = {"kind": "covid_qu", "path": "COVID-QU", "region": "infection"}
_OWN = {"kind": "manifest", "path": "target/manifest.csv", "segments": ("background", "target")}
_IDRID = {
    "kind": "idrid", "path": "IDRiD", "lesions": ("microaneurysm",), "image_size": 448,
    "tile_size": 448, "tile_picture": "1120x2240", "tile_margin": "0x96", "tile_min_brightness": 0.01,
}  # fmt: skip
_CROPS = {
    "patch": 224,
    "border": "mirror",
    "brightness": 0.1,
    "contrast": 0.05,
    "saturation": 0.1,
    "hue": 0.05,
}
PRETRAINING = "pretraining"
KEPT = (1, 5, 20, 50, 100, 150, 200, 250, 300)
DATASETS = {
    "acdc": {"kind": "acdc", "path": "ACDC"},
    "covid_qu": {
        "train": {**_COVID_QU, "where": "split=train|val,label=COVID-19"},
        "test": {**_COVID_QU, "where": "split=test,label=COVID-19"},
    },
    "idrid": {
        "train": {**_IDRID, "tile_stride": 112, "where": "split=train"},
        "test": {**_IDRID, "tile_stride": 448, "where": "split=test"},
        "transfer": {"segmentation": {"augment": _CROPS}},
    },
    "own": {"development": _OWN},
}  # fmt: skip


def get_grid(workdir):
    """The six pre-trainings, then the eighteen targets that take their kept epochs."""
    schemes = [(model, scheme) for model in MODELS for scheme in SCHEMES]
    alone = {f"pre-{model}-{scheme}": f"{PRETRAINING},{model},{scheme}" for model, scheme in schemes}
    targets = {
        f"{dataset}-{model}-{scheme}": f"{dataset},{model},{scheme},{workdir / f'pre-{model}-{scheme}'}"
        for model, scheme in schemes
        for dataset in DATASETS
        if dataset != "own"
    }
    return {**alone, **targets}


def get_config(arm="own,resnet50,simple"):
    dataset, model, scheme, run = _read(arm)
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
    if dataset != PRETRAINING:
        config.tasks.update({name: DATASETS[name] for name in dataset.split("+")})
    config.custom_strategies.pretraining = (
        {"weights": f"run:{run}@epoch=all"} if run else {"phases": (phase,)}
    )
    config.adapt.seed = 0
    config.adapt.batch_size = 1024 if small else 4096
    config.adapt.loss.label_smoothing = 0.1
    config.adapt.balance_classes = False
    config.adapt.optimizer.update({"name": "adamw", "weight_decay": 0.05, "eps": 1e-8, "decay_all": True})
    config.adapt.augment.update({"flip": "horizontal", "crop": 0.8, "crop_from": 512, "border": "zero"})
    if scheme == "advanced":
        config.adapt.augment.update({"randaugment": 2, "magnitude": 9.0, "erase": 0.25, "erase_with": "zero"})
        config.adapt.mix.update({"mixup": 1.0, "mixup_probability": 0.8, "cutmix": 1.0, "per_image": True})
    if scheme == "advanced" or model == "swin":
        config.model.drop_path = 0.1 if model != "unet" else 0.0
    segmentation = config.transfer.segmentation
    segmentation.update({
        "protocols": ("finetune", "frozen"), "decoder": MODELS[model][1],
        "loss": {"name": "dice_squared", "batchwise": True, "smoothing_constant": 1e-5},
        "frozen_batch_norm": "stats", "drop_path": DROP_PATH[model], "metrics": METRICS,
        "decoder_epochs": 0, "epochs": 150, "lr": 0.05, "decoder_lr": 0.05, "schedule": "poly",
        "batch_norm": "train", "batch_size": 24,
    })  # fmt: skip
    segmentation.optimizer.update({"name": "sgd", "b1": 0.9, "weight_decay": 1e-4, "decay_all": True})
    segmentation.augment.update({"flip": "dihedral", "rotate": 180.0, "border": "zero"})
    if dataset == PRETRAINING:
        config.strategies = ("pretraining",)
        config.adapt.checkpoints = KEPT
    if run or dataset == PRETRAINING:
        return config
    config.checkpoint_scoring.every = 5
    config.checkpoint_selection.rule = "length_prior"
    config.checkpoint_selection.score = "robustness"
    return config


def _read(arm: str) -> tuple[str, str, str, str]:
    """The four parts of the argument; the scheme and the run may be left out."""
    parts = [part.strip() for part in arm.split(",", 3)]
    if len(parts) == 2:
        parts.append(SCHEMES[0])
    if len(parts) < 3:
        raise UserError(
            f"configs/hidy2024.py: {arm!r}; expected DATASET,MODEL[,SCHEME[,RUN]], such as acdc,resnet50,simple"
        )
    targets = parts[0].split("+")
    named = [(name, DATASETS if len(targets) > 1 else (*DATASETS, PRETRAINING)) for name in targets]
    for part, known in (*named, (parts[1], MODELS), (parts[2], SCHEMES)):
        if part not in known:
            raise UserError(f"configs/hidy2024.py: unknown {part!r} in {arm!r}; {nearest(part, known)}")
    if len(parts) == 4 and parts[0] == PRETRAINING:
        raise UserError(f"configs/hidy2024.py: {arm!r}; expected a target dataset before RUN")
    return parts[0], parts[1], parts[2], parts[3] if len(parts) == 4 else ""
