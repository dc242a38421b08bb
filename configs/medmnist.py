"""MedMNIST v2 (Yang et al., Scientific Data 2023) and MedMNIST+, all two-dimensional sets, from scratch.

    python -m dapt_jax.main --config=configs/medmnist.py:pneumoniamnist,28 --config.data_dir=DATA
    --workdir=runs/pneumonia28

`SET,SIZE`: a set of `SETS` and the side of its files, 28, 64, 128 or 224. DATA holds the `.npz` files as
published (docs/data_sets.md). ResNet-18 from random weights; Adam at 1e-3, a tenth of it from half of the 100
epochs on and a hundredth from three quarters, batch 128, no augmentation, the epoch with the best validation
loss; three seeds. Files of 28 px are enlarged to 224 px, the paper's setting `(224)`; larger ones are seen as
they are. With pretrained weights, or another network: `--config.model.name=resnet50
--config.weights=torchvision:resnet50.v1`.

Expected on the official test part (paper, table 3; AUC / accuracy of one label per image):

    set, 28 px enlarged   ResNet-18 (224)   ResNet-50 (224)
    pneumoniamnist        .956 / .864       .962 / .884
    chestmnist            .773              .773

and of networks that saw 28 px, which this recipe does not have (their first layers are others): pathmnist
.983 / .907, breastmnist .901 / .863. The other sets and sizes have numbers in the papers that were not at
hand.

Time, an ESTIMATE from the counted FLOPs (9.8 GFLOP an image of 224 px in training) on a device that reaches
40 TFLOP/s: a run of pneumoniamnist (3,813 images train) takes 1.6 minutes, of pathmnist (72,897) 30 minutes;
two CPU cores at 50 GFLOP/s take 800 times as long: there `--config.model.image_size=64` (a fifteenth of the
FLOPs) and a few epochs.

The official training part trains, the epoch is chosen on the official validation part, and the test part is
scored. Where the recipe differs: the epoch is chosen by the validation loss and not by its AUC.
"""

from dapt_jax.errors import UserError, nearest
from dapt_jax.settings import default

SETS = tuple(
    f"{name}mnist"
    for name in (
        "path", "chest", "derma", "oct", "pneumonia", "retina", "breast", "blood", "tissue", "organa", "organc", "organs",
    )
)  # fmt: skip
SIZES = ("28", "64", "128", "224")


def get_config(arm="pneumoniamnist,28"):
    name, _, size = (part.strip() for part in arm.partition(","))
    for what, known in ((name, SETS), (size, SIZES)):
        if what not in known:
            raise UserError(f"configs/medmnist.py: unknown {what!r} in {arm!r}; {nearest(what, known)}")
    config = default()
    config.name = f"medmnist_{name}_{size}"
    config.title = f"MedMNIST: {name}, files of {size} px, from scratch"
    config.strategies = ("none",)
    config.model.name = "resnet18"
    config.model.image_size = 224 if size == "28" else int(size)
    config.weights = "random"
    config.tasks[name] = {"kind": name, "path": ".", "pixels": int(size)}
    config.transfer.protocols = ("finetune",)
    finetune = config.transfer.finetune
    finetune.update({
        "head_epochs": 0, "epochs": 100, "lr": 1e-3, "schedule": "step", "batch_norm": "train",
        "batch_size": 128, "early_stopping_patience": 100,
    })  # fmt: skip
    finetune.optimizer.update({"name": "adam", "eps": 1e-8})
    return config
