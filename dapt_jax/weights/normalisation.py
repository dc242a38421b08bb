"""Normalisation that weights expect: by name, as a setting, in words, and as file metadata.

Normalisation belongs to the weights. `config.model.preprocess` is one of `NAMED`, or numbers; if it is empty,
the weights decide (`recognise`).
"""

import json
import math
from collections.abc import Mapping

from dapt_jax.errors import UserError, nearest
from dapt_jax.models.preprocess import HALF, IMAGENET, UNIT, Preprocess

TORCHXRAYVISION = Preprocess((127.5,) * 3, (127.5 / 1024,) * 3)
"""Scaling to -1024..1024."""
KERAS_CAFFE = Preprocess((103.939, 116.779, 123.68), (1.0,) * 3, bgr=True)
"""Channels in BGR order minus the ImageNet mean, as in Keras applications for ResNets of the first
version."""
NAMED = {
    "imagenet": IMAGENET,
    "half": HALF,
    "unit": UNIT,
    "torchxrayvision": TORCHXRAYVISION,
    "keras_caffe": KERAS_CAFFE,
}
KEY = "dapt_jax.preprocess"
"""Metadata key of the normalisation in the safetensors files that we write."""
_MOST_CHANNELS = 64


def parse(text: str, channels: int = 3) -> Preprocess | None:
    """Return the normalisation defined by `config.model.preprocess`.

    Args:
        text: Empty, one of `NAMED`, or `MEAN,STD`: two numbers for all channels, or the means of all channels
            followed by their standard deviations. The numbers refer to pixel values from 0 to 255 or, if none
            exceeds 1, from 0 to 1, as in PyTorch's transforms.
        channels: Number of channels of the images.

    Returns:
        The normalisation for that many channels; None for an empty text.

    Raises:
        UserError: The text has none of these forms.

    Example:
        >>> parse("0.5,0.25", 1)
        Preprocess(mean=(127.5,), std=(63.75,), bgr=False)
    """
    if not text:
        return None
    if text in NAMED:
        return NAMED[text].for_channels(channels)
    if "," not in text:
        raise UserError(f"unknown model.preprocess {text!r}; {nearest(text, NAMED)} (or MEAN,STD)")
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    half = len(numbers) // 2
    if len(numbers) != 2 * half or half not in (1, channels) or not all(map(math.isfinite, numbers)):
        raise UserError(
            f"model.preprocess is {text!r}; expected MEAN,STD: two numbers, or {channels} means and "
            f"{channels} deviations"
        )
    mean, std = numbers[:half], numbers[half:]
    if min(std) <= 0:
        raise UserError(f"model.preprocess is {text!r}; expected standard deviations above 0")
    if set(mean) == {0.0} and set(std) == {1.0}:
        raise UserError(
            f"model.preprocess is {text!r}; expected 'unit' for values from 0 to 1, or 0,255, which is the "
            "same"
        )
    scale = 255.0 if max(map(abs, numbers)) <= 1 else 1.0
    times = channels // half
    return Preprocess(
        tuple(scale * each for each in mean * times), tuple(scale * each for each in std * times)
    )


def describe(preprocess: Preprocess) -> str:
    """Return a normalisation in words: its name, if it has one, and its numbers."""
    names = [name for name, known in NAMED.items() if known.for_channels(preprocess.channels) == preprocess]
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (preprocess.mean, preprocess.std))
    order = ", blue first" if preprocess.bgr else ""
    return f"{names[0] + ' ' if names else ''}(x - [{mean}]) / [{std}], x from 0 to 255{order}"


def to_metadata(preprocess: Preprocess) -> dict[str, str]:
    """Return the metadata that record a normalisation in our files; the inverse of `from_metadata`."""
    return {KEY: json.dumps({"mean": preprocess.mean, "std": preprocess.std, "bgr": preprocess.bgr})}


def from_metadata(metadata: Mapping[str, str], origin: str) -> Preprocess | None:
    """Return the normalisation recorded in a file's metadata, or None if there is none.

    Raises:
        UserError: The recorded value is not a normalisation.
    """
    if KEY not in metadata:
        return None
    try:
        found = json.loads(metadata[KEY])
        mean, std = (tuple(float(each) for each in found[name]) for name in ("mean", "std"))
        is_right = (
            0 < len(mean) == len(std) <= _MOST_CHANNELS
            and all(map(math.isfinite, mean + std))
            and min(std) > 0
        )
        if not is_right or not isinstance(found["bgr"], bool):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        said = str(metadata[KEY])[:80]
        raise UserError(
            f"{origin}: its metadata {KEY} is {said!r}; expected mean, std and bgr of each channel"
        ) from None
    return Preprocess(mean, std, found["bgr"])
