"""Evidence, brain MRI segmentation: how much of full DAPT does a tenth of its compute buy?

    python -m dapt_jax.main --config=configs/evidence/brain_mri_segmentation.py --config.data_dir=../shared/data
    --workdir=runs/evidence/brain_mri_segmentation

Tumour masks under a U-Net on the frozen encoder, other patients as `test`; there are no masks of the web images. Fewer
arms than in classification, since each is a decoder's training. arms.py has the arms and the argument; docs/evidence.md
says what was predicted, the stopping rule, and what came.
"""

import importlib.util
from pathlib import Path

_path = Path(__file__).with_name("arms.py")
_spec = importlib.util.spec_from_file_location("evidence_arms", _path)
arms = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(arms)

TUMOURS = ("glioma", "meningioma", "pituitary")
SLICES = {"kind": "manifest", "path": "brain_mri/manifest.csv", "classes": TUMOURS}
MASKS = {**SLICES, "segments": ("background", "tumour")}


def get_config(argument=""):
    config = arms.study(
        "brain_mri_segmentation",
        "Evidence: tumour masks in CE-MRI slices of other patients",
        argument or "efficientnet_lite0,3,10,30",
        epochs=20,
        strategies=("partial", "hybrid_late", "lora", "reconstruct"),
        masks=True,
    )
    config.seeds = (0, 1, 2)
    config.corpus.update({**SLICES, "where": "split=corpus"})
    config.tasks.masks = {
        "development": {**MASKS, "where": "split=dev"},
        "test": {**MASKS, "where": "split=test"},
    }
    config.adapt.augment.update({"flip": "horizontal", "shift": 0.05})
    config.report.metric = "dice"
    segmentation = config.transfer.segmentation
    segmentation.update({"protocols": ("frozen",), "decoder_epochs": 2, "epochs": 4, "num_fixed_views": 3})
    segmentation.augment.update(
        {"flip": "horizontal", "rotate": 20.0, "scale": 0.2, "elastic": 0.02, "brightness": 0.1}
    )
    return config
