"""What is compiled ahead of time: a model by its name, at 64 pixels, a batch of 64, phantoms for images."""

from dapt_jax.settings import default


def get_config(model="resnet50"):
    config = default()
    config.name = "aot"
    config.synthetic = True
    config.strategies = ("full", "partial", "hybrid")
    config.seeds = (0,)
    config.weights = "random"
    config.model.name = model
    config.model.image_size = 64
    config.adapt.head_epochs = 0
    config.adapt.batch_size = 64
    config.corpus.update({"kind": "phantoms", "name": "corpus", "n": 96})
    config.tasks.cells = {"development": {"kind": "phantoms", "name": "development", "n": 48}}
    config.aot.compilations = 0
    return config
