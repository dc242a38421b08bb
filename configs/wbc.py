"""DAPT on blood cells, real images: smear crops as in-domain corpus, white-cell types as target, another stain outside.

    python -m dapt_jax.main --config=configs/wbc.py --config.data_dir=../shared/data --workdir=runs/wbc

`data_dir` holds `bccd/` (4,886 crops of 364 smears, labelled RBC, WBC, Platelets) and `wbc/` (300 + 100 white
cells of two laboratories), each with a `manifest.csv`. Five strategies, three seeds; docs/wbc.md has the
table that it printed and how long it took.

What to know of the data: the development set has one basophil, so that class is dropped; the external set was
photographed at another scale, and a centre crop of 180 px brings its cells to the size they have in the
development set. Splits of the corpus are by smear; the target set names no patients, so only look-alike
images are kept together.
"""

from dapt_jax.settings import default

TYPES = ("neutrophil", "lymphocyte", "monocyte", "eosinophil")


def get_config():
    config = default()
    config.name = "wbc"
    config.title = "DAPT on blood-smear crops, transferred to white-cell types"
    config.note = "Corpus: BCCD crops, split by smear. Target: 299 white cells in five folds; external: 97 cells, other stain."
    config.model.image_size = 96
    wbc = {"kind": "manifest", "path": "wbc/manifest.csv", "classes": TYPES, "drop_classes": ("basophil",)}
    config.corpus.update({"kind": "manifest", "path": "bccd/manifest.csv"})
    config.tasks.types = {
        "development": {**wbc, "where": "source=dataset1"},
        "external": {**wbc, "where": "source=dataset2", "crop": 180},
    }
    config.adapt.head_epochs = 10
    config.adapt.epochs = 3
    config.adapt.hybrid_epochs = 2
    config.adapt.partial_groups = 3
    config.adapt.cut_after = "stage3/block2"
    config.adapt.lr = 1e-4
    config.adapt.augment.flip = "dihedral"
    config.transfer.protocols = ("linear", "mlp_small", "mlp_large", "finetune")
    config.transfer.finetune.epochs = 5
    config.transfer.finetune.augment.flip = "dihedral"
    return config
