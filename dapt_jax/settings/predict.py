"""Settings of `mode=predict`: target models on new images."""

import dataclasses

from dapt_jax.fields import check_fields, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictSettings:
    """What is predicted, with which models: the section `predict`."""

    model: tuple[str, ...] = setting(
        (), doc="Target models: files, a folder of them, or a study's workdir; empty: those of --workdir."
    )
    images: str = setting(
        "",
        doc="Images: a folder of image, DICOM and NIfTI files, one such file, or a CSV with a column image.",
    )
    calibrate: bool = setting(
        False, doc="Calibrate probabilities by the temperatures that were fitted to development images."
    )
    unlike: str = setting(
        "flag",
        choices=("flag", "error"),
        doc="What an image unlike the training images in format or features does: a column says so, or stop.",
    )
    batch_size: int = setting(0, at_least=0, doc="Images at a time; 0: 64, or 8 for masks.")
    overlays: int = setting(16, at_least=0, doc="Images of which pictures with predicted masks are written.")

    def __post_init__(self) -> None:
        check_fields(self)
