"""Evidence, blood cells, types and masks: how much of full DAPT does a tenth of its compute buy?

    python -m dapt_jax.main --config=configs/evidence/blood.py --config.data_dir=../shared/data
    --workdir=runs/evidence/blood

Corpus: crops of smears; targets: types of white cells, and their nucleus and cytoplasm under a U-Net on the frozen
encoder; external: another laboratory (configs/wbc.py has the traps). arms.py has the arms and the argument;
docs/evidence.md says what was predicted, the stopping rule, and what came.
"""

import importlib.util
from pathlib import Path

_path = Path(__file__).with_name("arms.py")
_spec = importlib.util.spec_from_file_location("evidence_arms", _path)
arms = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(arms)

TYPES = ("neutrophil", "lymphocyte", "monocyte", "eosinophil")
CELLS = {"kind": "manifest", "path": "wbc/manifest.csv", "classes": TYPES, "drop_classes": ("basophil",)}
MASKS = {**CELLS, "segments": ("background", "cytoplasm", "nucleus")}


def get_config(argument=""):
    config = arms.study(
        "blood",
        "Evidence: types and masks of white blood cells, and of another laboratory's",
        argument or "efficientnet_lite0,3,10,30",
        epochs=8,
        strategies=("partial", "hybrid_late", "lora", "reconstruct"),
        masks=True,
        elsewhere={
            "kind": "manifest",
            "path": "brain_mri/manifest.csv",
            "classes": ("glioma", "meningioma", "pituitary"),
            "where": "split=corpus",
        },
    )
    config.corpus.update({"kind": "manifest", "path": "bccd/manifest.csv"})
    for name, images in (("types", CELLS), ("masks", MASKS)):
        config.tasks[name] = {
            "development": {**images, "where": "source=dataset1"},
            "external": {**images, "where": "source=dataset2", "crop": 180},
        }
    config.adapt.augment.flip = "dihedral"
    segmentation = config.transfer.segmentation
    segmentation.update({"protocols": ("frozen",), "decoder_epochs": 2, "epochs": 4, "num_fixed_views": 4})
    segmentation.augment.update(
        {"flip": "dihedral", "rotate": 45.0, "scale": 0.2, "brightness": 0.1, "contrast": 0.1}
    )
    return config
