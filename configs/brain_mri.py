"""DAPT on brain tumours in contrast-enhanced T1 slices, the first paper's own kind of data (arXiv 2204.13280).

    python -m dapt_jax.main --config=configs/brain_mri.py --config.data_dir=../shared/data
    --workdir=runs/brain_mri

`data_dir` holds `brain_mri/manifest.csv`: CE-MRI (Cheng 2017) in three parts by runs of neighbouring slices,
`corpus` for DAPT, `dev` as the target task, `test` scored besides; and `web`, distinct images from the web
collections, as external set. All three tumour types everywhere; web images without a subtype are dropped.
docs/brain_mri.md has the table that it printed and how long it took.

What to know of the data: a random split leaks (37% of the slices have a look-alike on the other side), so
every split is by run of slices; one scalar, the mean horizontal gradient, already tells pituitary from
glioma, so its score stands beside every other; 32 external pituitary images are few. ResNet-50 as the paper
had it, with a checkpoint of your own:

    ... --config.model.name=resnet50_keras --config.weights=resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5 \
        --config.adapt.partial_groups=1 --config.adapt.cut_after=stage2/block4
"""

from dapt_jax.settings import default

TUMOURS = ("glioma", "meningioma", "pituitary")


def get_config():
    config = default()
    config.name = "brain_mri"
    config.title = "DAPT on CE-MRI slices, transferred to brain-tumour types"
    config.note = (
        "Corpus, development and test: CE-MRI, split by runs of slices. External: web images with a subtype."
    )
    config.model.image_size = 112
    slices = {"kind": "manifest", "path": "brain_mri/manifest.csv", "classes": TUMOURS}
    config.corpus.update({**slices, "where": "split=corpus"})
    config.tasks.tumour = {
        "development": {**slices, "where": "split=dev"},
        "test": {**slices, "where": "split=test"},
        "external": {**slices, "where": "split=external", "drop_classes": ("no_tumor", "tumor")},
    }
    config.adapt.head_epochs = 20
    config.adapt.epochs = 4
    config.adapt.hybrid_epochs = 2
    config.adapt.partial_groups = 3
    config.adapt.cut_after = "stage3/block2"
    config.adapt.lr = 1e-4
    config.adapt.augment.flip = "horizontal"
    config.adapt.augment.shift = 0.05
    config.transfer.protocols = ("linear", "mlp_small", "mlp_large")
    return config
