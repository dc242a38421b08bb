"""Registry of encoders by name; each registers itself beside its definition: see `register_model`."""

import dataclasses
import functools

from dapt_jax.errors import UserError, nearest
from dapt_jax.models import encoders as _families  # noqa: F401  (importing them registers them)
from dapt_jax.models.encoder import DEFAULT, Encoder, Options
from dapt_jax.models.entry import MODELS, ModelEntry, register_model

__all__ = ["ModelEntry", "build", "configured", "entry", "names", "register_model"]


def names() -> tuple[str, ...]:
    """Return the names of all architectures."""
    return tuple(MODELS)


def entry(name: str) -> ModelEntry:
    """Return the entry of an architecture.

    Raises:
        UserError: There is no architecture of that name; names the nearest.
    """
    if name not in MODELS:
        raise UserError(f"no model {name!r}; {nearest(name, MODELS)}")
    return MODELS[name]


def build(name: str, options: Options = DEFAULT) -> Encoder:
    """Return the encoder of that name; the same object for equal options.

    >>> build("resnet18").groups[:3]
    ('stem', 'stage1/block1', 'stage1/block2')

    Raises:
        UserError: There is no architecture of that name (names the nearest), or an option is out of range.
    """
    return _build(entry(name), options)


@functools.cache
def _build(entry: ModelEntry, options: Options) -> Encoder:
    encoder = entry.build(options).with_options(options)
    if options.patch_dropout and not encoder.token_patch:
        raise UserError(
            f"model.patch_dropout is {options.patch_dropout:g}, but model {encoder.name!r} needs all patches: "
            "expected 0, or a vision transformer with learnt positions, such as model.name='vit_small'"
        )
    return encoder


@functools.cache
def for_masks(encoder: Encoder, drop_path: float = -1.0) -> Encoder:
    """Return an encoder, truncated or not, for a decoder, which needs all patches; arrays are the same.

    Its stochastic depth computes every branch for every image.

    Args:
        encoder: An encoder of the registry.
        drop_path: Stochastic-depth rate of the last residual branch; negative for the encoder's own.
    """
    rate = encoder.options.drop_path if drop_path < 0 else drop_path
    options = dataclasses.replace(encoder.options, drop_path=rate, patch_dropout=0.0, drop_path_subset=False)
    return encoder if options == encoder.options else encoder.with_groups(build(encoder.name, options))


@functools.cache
def configured(
    name: str,
    drop_path: float,
    dropout: float,
    remat: tuple[str, ...],
    patch_dropout: float = 0.0,
    drop_path_subset: bool = False,
) -> Encoder:
    """Return an encoder with its options; the same object for equal arguments.

    Args:
        name: Name of the architecture.
        drop_path: Stochastic-depth rate of the last residual branch.
        dropout: Dropout rate of transformers.
        remat: Layer groups whose activations are recomputed instead of stored; "*" for all.
        patch_dropout: Share of the patch tokens that a training step leaves out.
        drop_path_subset: Whether stochastic depth computes a branch only for the images that do not skip it.

    Raises:
        UserError: See `build`; an option has no effect on the architecture; or `remat` names a layer group that
            does not exist.
    """
    options = Options(
        drop_path=drop_path, dropout=dropout, patch_dropout=patch_dropout, drop_path_subset=drop_path_subset
    )
    _check_use(name, options)
    encoder = build(name, options)
    groups = () if "*" in remat else remat
    return encoder.rematerialised(*groups) if remat else encoder


def _check_use(name: str, options: Options) -> None:
    """Refuse an option that the architecture has no use for."""
    for option, needed, such_as in (
        ("drop_path", "residual branches (a decoder's are transfer.segmentation.drop_path)", "resnet50"),
        ("dropout", "layers with dropout", "vit_small"),
    ):
        if not (rate := getattr(options, option)):
            continue
        alone = entry(name).build(Options(**{option: rate}))
        if not any(spec.is_stochastic for spec in alone.specs):
            raise UserError(
                f"model.{option} is {rate:g}, but model {name!r} has no {needed}: expected 0, or a model with "
                f"them, such as model.name={such_as!r}"
            )
    if options.drop_path_subset and not options.drop_path:
        raise UserError(
            "model.drop_path_subset is true, but model.drop_path is 0, so that no branch is skipped: expected a rate "
            "such as model.drop_path=0.1, or model.drop_path_subset=false"
        )
