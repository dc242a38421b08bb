"""The ten rows of "Resource-efficient domain adaptive pre-training for medical images" (arXiv 2204.13280).

    python -m dapt_jax.main --config=configs/mehmood2022.py:full --config.data_dir=DATA \
        --workdir=runs/mehmood2022/full

`ARM[,SOURCE[,TARGETS]]`. All ten rows of its table in one study, with seeds:
--config.strategies=full,l1sb,l2sb, l1sb_pft,l2sb_pft,f1b,f2b,imagenet,imagenet_f1b,imagenet_f2b
--config.seeds=0,1,2

`full`, `l1sb`, `l2sb` (all but batch norm; the last identity block of conv5; the last two), `l1sb_pft`,
`l2sb_pft` (those for 100 epochs, then full for 50), `f1b`, `f2b` (the network cut after conv2_x, after
conv3_x), and the controls that are not adapted: `imagenet`, `imagenet_f1b`, `imagenet_f2b`. Keras ResNet-50
(v1), Adam, batch 16, every batch norm frozen, no augmentation; the head alone for 1,000 epochs at 1e-4, then
150 epochs at 1e-5, each phase with a new optimizer, as in the released code
(`adapt.optimizer.carry_state=true` lets moments go on). Here the head's 1,000 epochs run on features computed
once. `--config.phases_scale=0.02` makes a trial of 20 and 3 epochs.

What it costs, without data and weights (of the real size; 23,536,641 parameters and 53,120 moving statistics
are the 23,589,761 that Keras counts):

    python -m dapt_jax.main --config=configs/mehmood2022.py:l1sb --config.mode=plan \
        --config.plan.images=corpus=24422,tumour.development=3064,tumour.external=2764

Weights: `keras:resnet50` is downloaded; without a network `--config.weights=PATH`, Keras's
resnet50_weights_tf_dim_ordering_tf_kernels.h5 or its notop file.

DATA, with SOURCE `native` (the default), holds what people download (docs/data_sets.md):

- `BraTS/`: BraTS 2020's training data; T1 slices whose mask is not empty, 240 px, label HGG or LGG: 24,422;
- `CE-MRI/`: the .mat files of figshare 1512427 and cvind.mat, 256 px as in the paper; patients are their PID;
- `BTTC/`: Kaggle's Training/ and Testing/, without "no tumour": the paper's external set. By image content
  about 85% of it are slices of CE-MRI: `data.leaks=drop_eval` takes out of it what is in the development set.

With SOURCE `manifest`: `brats/manifest.csv`, `ce_mri/manifest.csv` (image,label,patient) and
`external/manifest.csv` (image,label) beside the images. TARGETS: `tumour` (the default), `disease`, or
`tumour+disease`. `disease` is the paper's other target, five classes of the Harvard Whole Brain Atlas (2,704
slices), for which there is no reader: `hms/manifest.csv` (image,label,patient).

Reported, one run each (authors' repository, appendix B); hours on their machine, kWh by the Green Algorithms
formula:

    arm       trained parameters   hours   kWh     mean AUC CE-MRI M1/M2   external M1/M2 (read off a figure)
    full      23,483,521           215.9   94.86   .974 / .947             .699 / .684
    l1sb       4,461,569           154.6   67.93   .905 / .959             .580 / .589
    l2sb       8,921,089           159.7   70.12   .930 / .983             .634 / .593
    l1sb_pft   4.46 M then 23.48 M 175.1   76.90   .954 / .937             .692 / .649
    l2sb_pft   8.92 M then 23.48 M 179.0   78.64   .966 / .995             .705 / .685
    f1b          224,129            69.2   30.41   .872 / .926             .812 / .796
    f2b        1,440,385           128.1   56.28   .915 / .960             .758 / .764

To charge energy as they did: --config.energy.watts=250 --config.energy.memory_gb=35 --config.energy.region=us

Where this differs on purpose: the released code squashed the logit twice (a sigmoid output into a loss that
expects logits), scored on slices of patients it had trained on in one 80:20 split, and reported the mean AUC
over the epochs of head training. Here the loss is right, five folds are by patient and the same for all
seeds, and scores are of the trained head; `--config.transfer.head.score_every_epoch=true` adds what the paper
prints, `auc_epochs` and its deviation, and the curves. Frozen batch norm gets the preprocessing that the
weights were made with, of slices windowed to the 1st to 99th percentile of their volume, where the released
code gave it the volume divided by its range.
"""

from dapt_jax.errors import UserError, nearest
from dapt_jax.settings import default

HEAD = {"name": "head", "epochs": 1000, "trainable": ("head",), "lr": 1e-4, "augment": False}


def _then(name, epochs, *trainable):
    return {"name": name, "epochs": epochs, "trainable": trainable, "lr": 1e-5}


ARMS = {
    "full": {"phases": (HEAD, _then("full", 150, "*"))},
    "l1sb": {"phases": (HEAD, _then("partial", 150, "stage4/block3", "head"))},
    "l2sb": {"phases": (HEAD, _then("partial", 150, "stage4/block2", "stage4/block3", "head"))},
    "l1sb_pft": {"phases": (HEAD, _then("partial", 100, "stage4/block3", "head"), _then("full", 50, "*"))},
    "l2sb_pft": {
        "phases": (
            HEAD,
            _then("partial", 100, "stage4/block2", "stage4/block3", "head"),
            _then("full", 50, "*"),
        )
    },
    "f1b": {"cut_after": "stage1/block3", "phases": (HEAD, _then("full", 150, "*"))},
    "f2b": {"cut_after": "stage2/block4", "phases": (HEAD, _then("full", 150, "*"))},
    "imagenet": {"like": "none"},
    "imagenet_f1b": {"cut_after": "stage1/block3"},
    "imagenet_f2b": {"cut_after": "stage2/block4"},
}
TUMOURS = ("meningioma", "glioma", "pituitary")
DISEASES = ("cerebrovascular", "degenerative", "inflammatory", "neoplastic", "normal")
_MANIFEST = {"kind": "manifest", "classes": TUMOURS}
CORPORA = {
    "native": {"kind": "brats", "path": "BraTS"},
    "manifest": {"kind": "manifest", "path": "brats/manifest.csv", "classes": ("LGG", "HGG")},
}
EXTERNAL = {
    "native": {"kind": "kaggle_bttc", "path": "BTTC", "classes": TUMOURS, "drop_classes": ("no tumour",)},
    "manifest": {**_MANIFEST, "path": "external/manifest.csv"},
}
DEVELOPMENT = {
    "native": {"kind": "ce_mri", "path": "CE-MRI", "classes": TUMOURS, "image_size": 256},
    "manifest": {**_MANIFEST, "path": "ce_mri/manifest.csv", "image_size": 256},
}
HMS = {"kind": "manifest", "path": "hms/manifest.csv", "classes": DISEASES, "image_size": 256}
TARGETS = ("tumour", "disease", "tumour+disease")


def _read(choice):
    parts = [part.strip() for part in choice.split(",")]
    if len(parts) > 3:
        raise UserError(f"configs/mehmood2022.py: {choice!r}; expected ARM, ARM,SOURCE or ARM,SOURCE,TARGETS")
    arm, source, targets = (*parts, *("full", "native", "tumour")[len(parts) :])
    for what, part, known in (("arm", arm, ARMS), ("source", source, CORPORA), ("targets", targets, TARGETS)):
        if part not in known:
            raise UserError(f"configs/mehmood2022.py: unknown {what} {part!r}; {nearest(part, known)}")
    return arm, source, targets.split("+")


def get_config(choice="full"):
    arm, source, targets = _read(choice)
    config = default()
    config.name = f"mehmood2022_{arm}"
    config.title = f"arXiv 2204.13280, arm {arm}"
    config.seeds = (0,)
    config.model.name = "resnet50_keras"
    config.model.image_size = 240
    config.weights = "keras:resnet50"
    config.custom_strategies.update(ARMS)
    config.corpus.update(CORPORA[source])
    if "tumour" in targets:
        config.tasks.tumour = {"development": DEVELOPMENT[source], "external": EXTERNAL[source]}
    if "disease" in targets:
        config.tasks.disease = {"development": HMS}
    config.data.leaks = "drop_eval"
    config.strategies = (arm,)
    config.corpus.val_fraction = 0.0
    config.adapt.batch_size = 16
    config.adapt.single_logit = True
    config.adapt.balance_classes = False
    config.adapt.optimizer.carry_state = False
    config.transfer.split_seed = 0
    config.transfer.protocols = ("mlp_small", "mlp_large")
    config.transfer.head.epochs = 500
    config.transfer.head.lr = 5e-5
    config.transfer.head.weight_decay = 0.0
    config.transfer.head.standardise = False
    return config
