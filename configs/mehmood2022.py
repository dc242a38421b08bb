"""The seven arms of "Resource-efficient domain adaptive pre-training for medical images" (arXiv 2204.13280).

    python -m dapt_jax.main --config=configs/mehmood2022.py:full --config.data_dir=DATA
    --workdir=runs/mehmood2022/full \
        --config.weights=resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5

All seven in one study, with seeds: --config.strategies=full,l1sb,l2sb,l1sb_pft,l2sb_pft,f1b,f2b
--config.seeds=0,1,2

`full`, `l1sb`, `l2sb` (all but batch norm; the last identity block of conv5; the last two), `l1sb_pft`,
`l2sb_pft` (those for 100 epochs, then full for 50), `f1b`, `f2b` (the network cut after conv2_x, after
conv3_x). `--config.mode=plan` prices an arm before it runs. Keras ResNet-50 (v1), Adam, batch 16, every batch
norm frozen, no augmentation; the head alone for 1,000 epochs at 1e-4, then 150 epochs at 1e-5. Here the
head's 1,000 epochs run on features computed once.

DATA holds what the paper used, as manifests you prepare:

- `brats/manifest.csv` (image,label,patient): BraTS 2020 T1 slices whose mask is not empty, one 8- or 16-bit
  PNG a slice (240 x 240, volume divided by its range), label HGG or LGG, patient the case: 24,422 slices. The
  paper kept no validation split.
- `ce_mri/manifest.csv` (image,label,patient): figshare 1512427 as PNG, label meningioma, glioma or pituitary;
  patient is the `PID` field of the .mat files.
- `external/manifest.csv` (image,label): images with the same three labels. The paper's own external set
  (Kaggle BTTC) is not external: by image content about 85% of what it scored are slices of CE-MRI; take them
  out first.

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

Where this differs on purpose: the released code squashed the logit twice (a sigmoid output into a loss that
expects logits), scored on slices of patients it had trained on, and reported the mean AUC over the epochs of
head training. Here the loss is right, splits are by patient, and scores are of the trained head. Frozen batch
norm gets the preprocessing that the weights were made with.
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
}


def get_config(arm="full"):
    if arm not in ARMS:
        raise UserError(f"configs/mehmood2022.py: unknown arm {arm!r}; {nearest(arm, ARMS)}")
    config = default()
    config.name = f"mehmood2022_{arm}"
    config.title = f"arXiv 2204.13280, arm {arm}"
    config.seeds = (0,)
    config.model.name = "resnet50_keras"
    config.model.image_size = 240
    three = {"kind": "manifest", "classes": ("meningioma", "glioma", "pituitary")}
    config.custom_strategies.update(ARMS)
    config.corpus.update({"kind": "manifest", "path": "brats/manifest.csv", "classes": ("LGG", "HGG")})
    config.tasks.tumour = {
        "development": {**three, "path": "ce_mri/manifest.csv"},
        "external": {**three, "path": "external/manifest.csv"},
    }
    config.strategies = (arm,)
    config.corpus.val_fraction = 0.0
    config.adapt.batch_size = 16
    config.adapt.single_logit = True
    config.adapt.balance_classes = False
    config.transfer.protocols = ("mlp_small", "mlp_large")
    config.transfer.head.epochs = 500
    config.transfer.head.lr = 5e-5
    config.transfer.head.weight_decay = 0.0
    config.transfer.head.standardise = False
    return config
