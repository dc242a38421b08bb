"""The main job in a few minutes on a laptop: real ImageNet weights, SYNTHETIC blood-smear phantoms.

    python -m dapt_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Nothing is downloaded: the EfficientNet-Lite0 weights come from an installed package, the images from a
generator. The phantoms are there to see every part work; what they say about strategies says nothing about
real cells.
"""

from dapt_jax.settings import default


def get_config():
    config = default()
    config.name = "quickstart"
    config.title = "Quickstart: DAPT on synthetic blood-smear phantoms"
    config.note = (
        "In-domain corpus: crops of phantom smears; target: five leukocyte types; "
        "external: another stain and scanner."
    )
    config.synthetic = True
    config.seeds = (0, 1, 2)
    config.model.image_size = 64
    config.corpus.update({"kind": "phantoms", "name": "corpus", "n": 900})
    config.tasks.leukocytes = {
        "development": {"kind": "phantoms", "name": "development", "n": 300},
        "external": {"kind": "phantoms", "name": "external", "n": 300},
    }
    config.adapt.head_epochs = 10
    config.adapt.epochs = 3
    config.adapt.hybrid_epochs = 2
    config.adapt.partial_groups = 3
    config.adapt.cut_after = "stage5/block3"
    config.adapt.lr = 3e-4
    config.adapt.augment.flip = "dihedral"
    config.transfer.protocols = ("linear", "mlp_small")
    return config
