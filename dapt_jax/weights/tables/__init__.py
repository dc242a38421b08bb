"""What the models' parameters are called elsewhere: one file per family, over the shared code of `scheme`.

A *scheme* names the parameters of one family of files. It maps a module of ours (`stage1/block1/conv1`) to the name of
its counterpart; the endings (`kernel` to `weight`) and layouts follow from the framework. Tables are therefore computed
from an encoder's own parameter paths and cannot miss one.
"""

from dapt_jax.weights.tables import convnext, densenet, efficientnet, resnet, resnet_elsewhere, swin, unet, vit
from dapt_jax.weights.tables.prefixes import LAYOUTS, prefix
from dapt_jax.weights.tables.scheme import OWN, Entry, Scheme, table

__all__ = ["LAYOUTS", "OWN", "Entry", "Scheme", "prefix", "schemes", "table"]

_FAMILIES = (convnext, densenet, efficientnet, resnet, resnet_elsewhere, swin, unet, vit)


def schemes(model: str) -> tuple[Scheme, ...]:
    """The schemes whose files fit a model of the registry; our own comes first."""
    return (OWN, *(scheme for family in _FAMILIES for scheme in family.SCHEMES.get(model, ())))
