"""Reading of weights in several files with an index, as for large models on the Hugging Face hub.

`weight_map` in `model.safetensors.index.json` and `pytorch_model.bin.index.json` gives the file of each
array.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dapt_jax.errors import UserError, nearest
from dapt_jax.runtime import safe_paths
from dapt_jax.weights.source import Stored, Weights

SUFFIX = ".index.json"
_WHOLE = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")
_LARGEST_INDEX = 16 << 20
_MOST_SHARDS = 1000


def in_folder(path: Path) -> Path | None:
    """Return the index or the only weight file in a folder with the hub's layout; None if there is none.

    Raises:
        UserError: There are several weight files.
    """
    names = sorted(child.name for child in path.iterdir())
    whole = [name for name in _WHOLE if name in names]
    found = whole or [name for name in names if name.endswith(SUFFIX)]
    # The same weights often exist in both formats.
    safe = [name for name in found if "safetensors" in name]
    found = safe if len(found) > 1 and len(safe) == 1 else found
    if len(found) > 1:
        raise UserError(
            f"{path}: a folder with several weight files, {', '.join(found[:4])}; expected the path of one"
        )
    return path / found[0] if found else None


def shards(path: Path) -> dict[str, str]:
    """Return the file of every array in an index.

    Raises:
        UserError: The index is damaged, or names a file that is not beside it.
    """
    size = path.stat().st_size
    if size > _LARGEST_INDEX:
        raise UserError(f"{path}: an index of {size:,} bytes; expected at most {_LARGEST_INDEX:,}")
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=_once)
        found = index["weight_map"]
        if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
            raise ValueError("its weight_map is no table of names")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        told = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path}: not an index of weights ({type(error).__name__}: {told}); expected weight_map"
        ) from None
    files = set(found.values())
    for file in sorted(files):
        if len(safe_paths.check(file, path)) > 1:
            raise UserError(f"{path}: names {file[:80]!r}; expected plain names of files in its own folder")
    if not found or len(files) > _MOST_SHARDS:
        raise UserError(f"{path}: an index of {len(files):,} files; expected 1 to {_MOST_SHARDS:,}")
    return found


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        raise ValueError("a name is there twice")
    return found


def read(path: Path, reader: Callable[[Path], Weights]) -> Weights:
    """Read all files of an index as one.

    Args:
        path: The index.
        reader: Function that reads one file.

    Raises:
        UserError: A file or an array is missing, or a file is damaged.
    """
    where = shards(path)
    files = sorted(set(where.values()))
    for file in files:
        if not (path.parent / file).is_file():
            others = [child.name for child in path.parent.iterdir()]
            raise UserError(f"{path}: {file!r}, which it names, is not beside it; {nearest(file, others)}")
    parts = {file: reader(path.parent / file) for file in files}
    arrays: dict[str, Stored] = {}
    for key, file in where.items():
        if key not in parts[file]:
            raise UserError(
                f"{path}: {key[:80]!r} is not in {file!r}, where the index has it; "
                f"{nearest(key, parts[file])}"
            )
        arrays[key] = parts[file].stored(key)
    return Weights(arrays, str(path), path=path, files=[path.parent / file for file in files])


def refuse_alone(path: Path) -> None:
    """Refuse a single shard of several.

    Raises:
        UserError: The file is a shard; the line names the index.
    """
    if (found := _SHARD.fullmatch(path.name)) and int(found[3]) > 1:
        index = f"{found[1]}{found[4]}{SUFFIX}"
        raise UserError(
            f"{path}: one of {int(found[3])} parts; expected the path of {index}, or of the folder"
        )
