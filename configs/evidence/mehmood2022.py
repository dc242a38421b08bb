"""Evidence: the seven arms of arXiv 2204.13280 at a twenty-fifth of their length, on brain MRI, with five seeds.

    python -m dapt_jax.main --config=configs/evidence/mehmood2022.py --config.data_dir=../shared/data
    --workdir=runs/evidence/mehmood2022

The images and tasks of brain_mri.py, and EfficientNet-Lite0 for ResNet-50: the last block (`l1sb`) is stage7 with the final
1x1 convolution, the last two (`l2sb`) have the last block of stage6 too, and the network is cut where maps have a quarter
(`f1b`) or an eighth (`f2b`) of the image's side, as after conv2_x and conv3_x. The head alone has 40 epochs for the
paper's 1,000, then 6 for 150, or 4 and 2 for 100 and 50, each phase with a new optimizer, without augmentation. Learning
rates are ten times the paper's, for a fraction of its steps. The arms at the paper's own size: configs/mehmood2022.py.
"""

import importlib.util
from pathlib import Path

_path = Path(__file__).with_name("brain_mri.py")
_spec = importlib.util.spec_from_file_location("evidence_brain_mri", _path)
brain_mri = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(brain_mri)

LAST = ("stage7/block1", "top", "head")
LAST_TWO = ("stage6/block4", *LAST)
CUTS = {"f1b": "stage2/block2", "f2b": "stage3/block2"}
HEAD = {"name": "head", "epochs": 40, "trainable": ("head",), "lr": 1e-3, "augment": False}


def _then(name, epochs, *trainable):
    return {"name": name, "epochs": epochs, "trainable": trainable, "lr": 1e-4, "augment": False}


ARMS = {
    "full": {"phases": (HEAD, _then("full", 6, "*"))},
    "l1sb": {"phases": (HEAD, _then("partial", 6, *LAST))},
    "l2sb": {"phases": (HEAD, _then("partial", 6, *LAST_TWO))},
    "l1sb_pft": {"phases": (HEAD, _then("partial", 4, *LAST), _then("full", 2, "*"))},
    "l2sb_pft": {"phases": (HEAD, _then("partial", 4, *LAST_TWO), _then("full", 2, "*"))},
    **{name: {"cut_after": cut, "phases": (HEAD, _then("full", 6, "*"))} for name, cut in CUTS.items()},
    **{f"imagenet_{name}": {"cut_after": cut} for name, cut in CUTS.items()},
}


def get_config():
    config = brain_mri.get_config()
    config.name = "evidence_mehmood2022"
    config.title = "Evidence: the seven arms of arXiv 2204.13280, scaled, on brain MRI"
    config.strategies = ("none", *ARMS)
    config.custom_strategies = ARMS
    del config.corpora.elsewhere
    config.adapt.optimizer.carry_state = False
    return config
