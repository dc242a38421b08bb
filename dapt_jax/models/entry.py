"""Declaration of an architecture, beside its definition; `dapt_jax.models.registry` looks it up by name."""

import dataclasses
from collections.abc import Callable, Mapping

from dapt_jax.models.encoder import Encoder, Options

Builder = Callable[[Options], Encoder]


@dataclasses.dataclass(frozen=True, eq=False)
class ModelEntry:
    """One architecture.

    Attributes:
        build: Function that returns the encoder.
        libraries: Names of the same architecture in PyTorch libraries (`timm`, `torchvision`), by library;
            empty where none builds it with arrays of the same shapes.
        package: Installed Python package that contains ImageNet weights; None where the user has to name a
            file.
        file: Path of these weights inside that package.
    """

    build: Builder
    libraries: Mapping[str, str] = dataclasses.field(default_factory=dict)
    package: str | None = None
    file: str = ""


MODELS: dict[str, ModelEntry] = {}


def register_model(
    name: str, *, timm: str = "", torchvision: str = "", package: str | None = None, file: str = ""
) -> Callable[[Builder], Builder]:
    """Register the decorated function as the builder of an architecture.

    Every module of `dapt_jax.models.encoders` is imported automatically, so that a family is one new file:

        @register_model("tiny")
        def tiny(options: Options) -> Encoder:
            return Encoder("tiny", [LayerGroup("stem", ...), ...],
            preprocess=IMAGENET.for_channels(options.channels))

    Args:
        name: Name of the architecture, as `config.model.name` takes it; the encoder's name is the same.
        timm: Name of the architecture in timm; empty where timm does not build it.
        torchvision: Name of the architecture in torchvision, likewise.
        package: Installed Python package that contains ImageNet weights.
        file: Path of these weights inside that package.

    Raises:
        ValueError: The name is taken.
    """

    def register(build: Builder) -> Builder:
        if name in MODELS:
            raise ValueError(f"a model {name!r} is registered already")
        named = {"timm": timm, "torchvision": torchvision}
        libraries = {library: model for library, model in named.items() if model}
        MODELS[name] = ModelEntry(build, libraries, package, file)
        return build

    return register
