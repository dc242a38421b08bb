"""The benchmark "A Systematic Benchmarking Analysis of Transfer Learning for Medical Image Analysis" (arXiv 2108.05930).

    python -m dapt_jax.main --config=configs/taher2021.py:shenzhen,imagenet --config.data_dir=DATA \
        --workdir=runs/taher2021/shenzhen-imagenet

`TASK,INIT[,RUN]`, ten runs. TASK, of `TASKS`: chestxray14, chexpert, shenzhen, rsna_pe (classes), drive, siim_acr,
montgomery (masks). INIT, in quotes where it holds a `>`:

- `random`; `imagenet`, the supervised ImageNet ResNet-50;
- any other of the benchmark's checkpoints, by its name in the zoo: moco-v2, swav, inat2021, ...;
  `chestxray14` and `chexpert` (in-domain only), `imagenet-chestxray14` and `imagenet-chexpert`
  (domain-adapted), as released;
- `random->chestxray14`, `imagenet->chexpert` and so on: those last four made here, from the labels of the
  in-domain set, once, with seed 0, for the ten runs; with RUN, the workdir of `pretraining,imagenet->chexpert`
  (no target), once for all tasks;
- `table`: random, imagenet and the four released ones as arms of one study, but for those made from the
  task's own set.

`--config=configs/taher2021.py:grid` plans or runs all of them, `--shard=1/4` one of four parts (a pre-training
and what takes its weights stay together, so that parts differ), with one report. Its four pre-trainings come
first, and serve the tasks. What it costs, without data (published numbers of images;
rsna_pe's are those of the challenge's training set):

    ...:grid --config.mode=plan --config.plan.images=chestxray14.train=75312,chestxray14.val=11212, \
        chestxray14.test=25596,chexpert.train=223414,chexpert.test=234,shenzhen.train=463,shenzhen.val=65, \
        shenzhen.test=134,rsna_pe.development=1790594,drive.train=20,drive.test=20, \
        siim_acr.development=12047,montgomery.development=138, \
        corpus.chestxray14=86524,corpus.chexpert=223414

DATA holds ChestX-ray14/, CheXpert-v1.0-small/, Shenzhen/, RSNA-PE/, DRIVE/, SIIM-ACR/, Montgomery/ as
docs/data_sets.md says, each with the benchmark's lists where it has any.

Classification: Adam at 2e-4, halved after 5 epochs without a better validation loss; ended after 10 and back
to the best; batch 32, all layers, batch norm trained; random resized crop of 224 from the file, mirrored,
turned by up to 7 degrees with black corners; ten crops of 224 at test time from images of 256. Binary
cross-entropy; uncertain labels of CheXpert are drawn between .55 and .85.
Segmentation: U-Net, Adam at 1e-3, cosine over 200 epochs, ended after 20 without a better validation loss;
Dice over the batch at 224 px, batch 32; DRIVE cross-entropy at 512 px, batch 16, no augmentation.

Expected (mean AUC or Dice of ten runs, as printed; rsna_pe, drive read off figures):

    init                  chestxray14   chexpert      shenzhen      siim_acr      montgomery    drive   rsna_pe
    random                80.31+-.10    86.60+-.17    89.03+-1.82   67.54+-.60    97.55+-.36    78.26   90.4
    imagenet              81.70+-.15    87.10+-.36    95.62+-.63    67.93+-1.45   98.19+-.13    79.20   94.73
    chestxray14           -             87.40+-.26    96.32+-.65    68.92+-.98    98.18+-.06
    chexpert              81.99+-.08    -             97.07+-.95    69.30+-.50    98.25+-.04
    imagenet-chestxray14  -             87.09+-.44    98.47+-.26    69.52+-.38    98.27+-.03
    imagenet-chexpert     82.25+-.18    -             97.33+-.26    69.36+-.49    98.31+-.05
    swav                  81.93         87.06         95.72         70.45         98.28         79.65   95.62
    moco-v2               80.45         86.94         95.57         67.01         97.79         79.23   89.2

These were not reproduced here: none of the sets may be handed on. Of CheXpert the paper reports the mean over
Atelectasis, Cardiomegaly, Consolidation, Edema and Pleural Effusion: `auc_subset`; `auc` is over all classes
that have both.

Time, an ESTIMATE from the counted FLOPs (23.4 GFLOP an image of 224 px in training, 46.5 through the U-Net,
249 at 512 px) on a device that reaches 40 TFLOP/s and is never kept waiting for images: an epoch of
chestxray14 takes 40 s, of chexpert 1.7 minutes, of rsna_pe 12 minutes, of siim_acr 10 s, of the other three
below a second; a run of chestxray14 that ends after 30 epochs 20 minutes, ten of them 3.3 hours. Two CPU
cores reach about 50 GFLOP/s, 800 times less. `--config.mode=plan` counts all epochs, as if no run ended
early.

Splits: chestxray14 and shenzhen train on all of the official training list, watch the loss on the validation
list and are scored on the test list (75,312 / 11,212 / 25,596 and 463 / 65 / 134 images). chexpert and drive
train on the official training part and are scored on the other one; an eighth of the training patients is
watched, since neither has a validation list of its own (the benchmark watched CheXpert's test images; DRIVE
with a folder `validate` takes `--config.tasks.drive.val...`). rsna_pe, siim_acr and montgomery have no
official lists: a fifth of the patients is held out and scored as `development`, an eighth of the rest is
watched. The ten runs are ten seeds of ONE split (`transfer.split_seed`).

Where the recipe differs: 200 epochs of classification at most, not 1,000, which no run reaches; the head
starts at 0, not at N(0, .01); random crops are cut from files with a short side of up to 1,024 px, to which
larger ones (Shenzhen's, of about 3,000) are shrunk first (`transfer.finetune.augment.crop_from`); masks are
augmented on every image and milder, not on 30% of them, without contrast and optical distortion, the watched
images not at all, where the benchmark's code augments those too, and images are resized bilinearly, not to
the nearest pixel. Images are normalised as each encoder was trained: by ImageNet's means, for the two SimCLR
checkpoints to 0 to 1. The benchmark takes ImageNet's means for all in classification, and divides by 255 on
siim_acr and montgomery. In-domain training here is 20 epochs with a falling rate, since the benchmark does not tell its own.
"""

from dapt_jax.errors import UserError, nearest
from dapt_jax.settings import default
from dapt_jax.weights import zoo

_XRAY14 = {"kind": "chestxray14", "path": "ChestX-ray14"}
_CHEXPERT = {"kind": "chexpert", "path": "CheXpert-v1.0-small"}
_SHENZHEN = {"kind": "shenzhen", "path": "Shenzhen"}
_DRIVE = {"kind": "drive", "path": "DRIVE"}
REPORTED = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
IN_DOMAIN = {
    "chestxray14": {**_XRAY14, "where": "split=train|val"},
    "chexpert": {**_CHEXPERT, "where": "split=train", "uncertain": "lsr_ones"},
}
CLASSES = {
    "chestxray14": _XRAY14,
    "chexpert": {**_CHEXPERT, "uncertain": "lsr_ones", "auc_classes": REPORTED},
    "shenzhen": _SHENZHEN,
    "rsna_pe": {"development": {"kind": "rsna_pe", "path": "RSNA-PE"}},
}  # fmt: skip
MASKS = {
    "drive": _DRIVE,
    "siim_acr": {"development": {"kind": "siim_acr", "path": "SIIM-ACR"}},
    "montgomery": {"development": {"kind": "montgomery", "path": "Montgomery"}},
}
TASKS = {**CLASSES, **MASKS}
PRETRAINING = "pretraining"
SOURCES = {"random": "random", "imagenet": "taher2021:supervised"}
TABLE = ("random", "imagenet", "chestxray14", "chexpert", "imagenet-chestxray14", "imagenet-chexpert")
SEEN = {
    "flip": "horizontal", "rotate": 7.0, "crop": 0.08, "patch": 224, "crop_from": 1024, "border": "zero",
}  # fmt: skip
ADAM = {"name": "adam", "eps": 1e-8}


def released():
    """Inits that are files of the zoo."""
    names = [
        name.removeprefix("taher2021:") for name in zoo.names("resnet50") if name.startswith("taher2021:")
    ]
    return [name for name in names if name != "supervised"]


def inits():
    """All that INIT may be."""
    chained = [f"{source}->{corpus}" for source in SOURCES for corpus in IN_DOMAIN]
    return [*SOURCES, *released(), *chained, "table"]


def get_grid(workdir):
    """The four pre-trainings, then every task with every init that has not learnt from it: figures 1 and 2."""
    alone = {f"pre-{_word(init)}": f"{PRETRAINING},{init}" for init in inits() if "->" in init}
    targets = {
        f"{task}-{_word(init)}": f"{task},{init}"
        + (f",{workdir / f'pre-{_word(init)}'}" if "->" in init else "")
        for task in TASKS
        for init in inits()
        if init != "table" and not (task in IN_DOMAIN and init.replace("->", "-").split("-")[-1] == task)
    }
    return {**alone, **targets}


def get_config(arm="shenzhen,imagenet"):
    task, init, run = _read(arm)
    config = default()
    config.name = f"taher2021_{task}_{_word(init)}"
    config.title = f"arXiv 2108.05930, {task}, {init}"
    config.seeds = tuple(range(10))
    config.model.name = "resnet50"
    if task != PRETRAINING:
        config.tasks[task] = TASKS[task]
    config.transfer.baseline = ""
    config.transfer.folds = 5
    config.transfer.split_seed = 0
    config.report.protocol = "finetune"
    _initialise(config, init, task, run)
    (_masks if task in MASKS else _classes)(config, task)
    return config


def _word(init):
    return init.replace("->", "-to-")


def _read(arm):
    task, init, run = (part.strip() for part in (*arm.split(",", 2), "", "")[:3])
    for what, known in ((task, (*TASKS, PRETRAINING)), (init, inits())):
        if what not in known:
            raise UserError(f"configs/taher2021.py: unknown {what!r} in {arm!r}; {nearest(what, known)}")
    if task in IN_DOMAIN and init.replace("->", "-").split("-")[-1] == task:
        raise UserError(
            f"configs/taher2021.py: {init!r} has learnt from {task} itself; expected another init for that task"
        )
    if ((run or task == PRETRAINING) and "->" not in init) or (run and task == PRETRAINING):
        raise UserError(
            f"configs/taher2021.py: {arm!r}; expected {PRETRAINING},SOURCE->CORPUS or TASK,SOURCE->CORPUS,RUN"
        )
    return task, init, run


def _weights(init):
    return SOURCES.get(init, f"taher2021:{init}")


def _initialise(config, init, task, run):
    source, _, corpus = init.partition("->")
    config.weights = _weights(source) if init != "table" else "random"
    config.strategies = ("none",)
    if init == "table":
        config.strategies = tuple(name for name in TABLE if not (task in IN_DOMAIN and name.endswith(task)))
        config.custom_strategies.update(
            {name: {"weights": _weights(name), "phases": ()} for name in config.strategies}
        )
    if run:
        config.weights = f"run:{run}"
    elif corpus:
        config.adapt.seed = 0
        config.strategies = ("full",)
        config.corpus.update({**IN_DOMAIN[corpus], "image_size": 256})
        config.adapt.update({
            "head_epochs": 0, "epochs": 20, "lr": 2e-4, "schedule": "plateau", "batch_norm": "train",
            "balance_classes": False,
        })  # fmt: skip
        config.adapt.optimizer.update(ADAM)
        config.adapt.augment.update(SEEN)


def _classes(config, task):
    config.model.image_size = 256
    config.report.metric = "auc_subset" if task == "chexpert" else "auc"
    config.transfer.protocols = ("finetune",)
    finetune = config.transfer.finetune
    finetune.update({
        "head_epochs": 0, "epochs": 200, "lr": 2e-4, "schedule": "plateau", "batch_norm": "train",
        "batch_size": 32, "val_fraction": 0.125, "early_stopping_patience": 10, "test_crops": 10, "loss": {"name": "bce"},
    })  # fmt: skip
    finetune.optimizer.update(ADAM)
    finetune.augment.update(SEEN)


def _masks(config, task):
    is_drive = task == "drive"
    config.model.image_size = 512 if is_drive else 224
    config.report.metric = "dice"
    segmentation = config.transfer.segmentation
    segmentation.update({
        "protocols": ("finetune",), "decoder": "unet", "decoder_epochs": 0, "epochs": 200, "lr": 1e-3, "schedule": "cosine",
        "batch_norm": "train", "batch_size": 16 if is_drive else 32, "val_fraction": 0.125, "early_stopping_patience": 20,
        "loss": {"name": "ce"} if is_drive else {"name": "dice", "batchwise": True},
    })  # fmt: skip
    segmentation.optimizer.update(ADAM)
    if not is_drive:
        segmentation.augment.update(
            {"brightness": 0.1, "gamma": 0.1, "elastic": 0.01, "grid": 0.1, "scale": 0.2}
        )
