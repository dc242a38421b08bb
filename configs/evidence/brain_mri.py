"""Evidence, brain MRI classification: how much of full DAPT does a tenth of its compute buy?

    python -m dapt_jax.main --config=configs/evidence/brain_mri.py --config.data_dir=../shared/data
    --workdir=runs/evidence/brain_mri

Corpus, development and test: contrast-enhanced T1 slices by runs of slices; external: distinct images from the web with
a subtype of tumour (configs/brain_mri.py has the traps). arms.py has the arms and the argument; docs/evidence.md says
what was predicted, the stopping rule, and what came.
"""

import importlib.util
from pathlib import Path

_path = Path(__file__).with_name("arms.py")
_spec = importlib.util.spec_from_file_location("evidence_arms", _path)
arms = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(arms)

TUMOURS = ("glioma", "meningioma", "pituitary")
SLICES = {"kind": "manifest", "path": "brain_mri/manifest.csv", "classes": TUMOURS}


def get_config(argument=""):
    config = arms.study(
        "brain_mri",
        "Evidence: tumour types in CE-MRI slices, and in web images",
        argument,
        epochs=20,
        elsewhere={"kind": "manifest", "path": "bccd/manifest.csv"},
    )
    config.corpus.update({**SLICES, "where": "split=corpus"})
    config.tasks.tumour = {
        "development": {**SLICES, "where": "split=dev"},
        "test": {**SLICES, "where": "split=test"},
        "external": {**SLICES, "where": "split=external", "drop_classes": ("no_tumor", "tumor")},
    }
    config.adapt.augment.update({"flip": "horizontal", "shift": 0.05})
    return config
