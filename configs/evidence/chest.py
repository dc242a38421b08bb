"""Evidence, chest radiographs: how much of full DAPT does a tenth of its compute buy?

    python -m dapt_jax.main --config=configs/evidence/chest.py --config.data_dir=../shared/data
    --workdir=runs/evidence/chest

Corpus and development: the NIH's, pneumonia or no finding, text-mined labels. External: `actualmed` alone (26 and 18
images), since in the other sources the source is nearly the label; it is tiny, and its interval says so. arms.py has the
arms and the argument; docs/evidence.md says what was predicted, the stopping rule, and what came.
"""

import importlib.util
from pathlib import Path

_path = Path(__file__).with_name("arms.py")
_spec = importlib.util.spec_from_file_location("evidence_arms", _path)
arms = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(arms)

RADIOGRAPHS = {"kind": "manifest", "path": "cxr/manifest.csv"}


def get_config(argument=""):
    config = arms.study(
        "chest",
        "Evidence: pneumonia in chest radiographs, and of another source",
        argument,
        epochs=40,
        elsewhere={
            "kind": "manifest",
            "path": "brain_mri/manifest.csv",
            "classes": ("glioma", "meningioma", "pituitary"),
            "where": "split=corpus",
        },
    )
    config.corpus.update({**RADIOGRAPHS, "where": "split=corpus"})
    config.tasks.pneumonia = {
        "development": {**RADIOGRAPHS, "where": "split=dev"},
        "external": {**RADIOGRAPHS, "where": "source=actualmed"},
    }
    config.adapt.augment.update({"flip": "horizontal", "brightness": 0.2, "contrast": 0.2})
    return config
