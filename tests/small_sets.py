"""Small copies of public sets, and what comes of reading them."""

from pathlib import Path

import numpy as np
import pytest

from dapt_jax.data.dataset import Dataset
from dapt_jax.data.sources import load
from dapt_jax.errors import UserError
from tests import medical_files as write

RNG = np.random.default_rng(0)


def read(folder: Path, kind: str, image_size: int = 16, **options) -> Dataset:
    return load({"kind": kind, "path": str(folder), **options}, data_dir=None, image_size=image_size)


def grey(path: Path, side: int = 16, value: int | None = None) -> Path:
    values = RNG.integers(0, 256, (side, side)) if value is None else np.full((side, side), value)
    return write.image(path, values.astype(np.uint8))


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


def refused(folder: Path, kind: str, message: str, **options) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(folder, kind, **options)
    assert "\n" not in str(caught.value)
