"""The best adaptation for at most half of full DAPT's compute: strategies compete by a score, and the loser stops early.

    python -m dapt_jax.main --config=configs/wbc_budget.py --config.data_dir=../shared/data
    --workdir=runs/wbc_budget

The study of configs/wbc.py, with a budget: full, partial, hybrid and simplified DAPT share 50% of what full
DAPT takes alone. Two rounds of successive halving by the robustness score, computed on 256 target images
without their labels after each epoch; the winner gets what is left, and it alone goes to the target task.
`none` runs beside them for comparison. An eighth of the budget has to bring an arm to its first score, so the
phases are longer than those of configs/wbc.py.
"""

from dapt_jax.settings import default

TYPES = ("neutrophil", "lymphocyte", "monocyte", "eosinophil")


def get_config():
    config = default()
    config.name = "wbc_budget"
    config.title = "The best adaptation to blood cells for half of full DAPT's compute"
    config.note = "Corpus: BCCD crops. Target: white cells. Strategies compete by the robustness score on unlabelled cells."
    config.model.image_size = 96
    wbc = {"kind": "manifest", "path": "wbc/manifest.csv", "classes": TYPES, "drop_classes": ("basophil",)}
    config.corpus.update({"kind": "manifest", "path": "bccd/manifest.csv"})
    config.tasks.types = {
        "development": {**wbc, "where": "source=dataset1"},
        "external": {**wbc, "where": "source=dataset2", "crop": 180},
    }
    config.adapt.head_epochs = 10
    config.adapt.epochs = 24
    config.adapt.hybrid_epochs = 12
    config.adapt.partial_groups = 3
    config.adapt.cut_after = "stage3/block2"
    config.adapt.lr = 1e-4
    config.adapt.augment.flip = "dihedral"
    config.checkpoint_selection.score = "robustness"
    config.checkpoint_scoring.every = 1
    config.checkpoint_scoring.level = 1  # partial trains nothing at the deepest skip or below
    config.checkpoint_selection.rule = "best"
    config.compute_budget = 0.5
    return config
