"""Tumours in contrast-enhanced T1 slices: ImageNet, DAPT and random weights under a U-Net.

    python -m dapt_jax.main --config=configs/brain_mri_segmentation.py --config.data_dir=../shared/data
    --workdir=runs/masks

The images of configs/brain_mri.py with their masks, by their `split` column: `corpus` for DAPT (its labels,
not its masks), `dev` as the target task (one fold of five held out by runs of neighbouring slices), `test`
segmented besides. The web images have no masks, so there is no external set. U-Net on EfficientNet-Lite0, the
encoder frozen and fine-tuned; the baseline tells every pixel by its own grey value.
docs/brain_mri_segmentation.md has the table that it printed and how long it took.
"""

from dapt_jax.settings import default

TUMOURS = ("glioma", "meningioma", "pituitary")


def get_config():
    config = default()
    config.name = "brain_mri_segmentation"
    config.title = "Brain tumours in CE-MRI slices: ImageNet, DAPT and random weights"
    config.note = (
        "Corpus, development and test: CE-MRI, split by runs of slices; masks drawn from published outlines."
    )
    config.strategies = ("none", "full", "scratch")
    config.model.image_size = 96
    slices = {"kind": "manifest", "path": "brain_mri/manifest.csv", "classes": TUMOURS}
    masks = {**slices, "segments": ("background", "tumour")}
    config.corpus.update({**slices, "where": "split=corpus"})
    config.tasks.tumour = {
        "development": {**masks, "where": "split=dev"},
        "test": {**masks, "where": "split=test"},
    }
    config.custom_strategies.scratch = {"weights": "random", "phases": ()}
    config.adapt.head_epochs = 5
    config.adapt.epochs = 3
    config.adapt.augment.update({"flip": "horizontal", "shift": 0.05})
    segmentation = config.transfer.segmentation
    segmentation.decoder_epochs = 2
    segmentation.epochs = 4
    segmentation.num_fixed_views = 3
    segmentation.augment.update(
        {"flip": "horizontal", "rotate": 20.0, "scale": 0.2, "elastic": 0.02, "brightness": 0.1}
    )
    return config
