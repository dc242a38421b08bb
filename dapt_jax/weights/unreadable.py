"""Identification of files that are not read as weights, with an error that says what to do."""

import re
from pathlib import Path

from dapt_jax.errors import UserError

_LFS = b"version https://git-lfs.github.com/spec/"
_TABLE_END = bytes.fromhex("57fb808b247547db")
"""The last bytes of a table of TensorFlow and LevelDB."""
_WAYS = {
    "tensorflow": "convert it with its authors' tools, or save its variables with numpy.savez, and pass the "
    ".pth or .npz",
}
_STARTS = (
    (b"\x1f\x8b", "a file packed by gzip: unpack it first"),
    (b"\xfd7zXZ\x00", "a file packed by xz: unpack it first"),
    (b"BZh", "a file packed by bzip2: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a file packed by zstd: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"Rar!", "a rar archive: unpack it first"),
    (b"GGUF", "a GGUF file of a language model"),
    (b"\x93NUMPY", "a single NumPy array (.npy); expected an .npz of arrays by name"),
    (b"MATLAB 5.0", "a MATLAB file"),
    (b"%PDF", "a PDF"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
)


def refuse(path: Path, head: bytes) -> None:
    """Refuse a file that is known not to be readable as weights.

    Args:
        path: The file.
        head: Its first bytes, at least 600 if the file has so many.

    Raises:
        UserError: The file is such a file; the line says what it is, and what to do.
    """
    if what := identify(path, head):
        raise UserError(f"{path}: {what}")


def identify(path: Path, head: bytes) -> str:
    """Return what a file is, with advice in words; empty for one that may contain weights."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(_LFS):
        size = re.search(rb"^size (\d{1,15})$", head, re.MULTILINE)
        told = f", which has {int(size[1]):,} bytes" if size else ""
        return f"a pointer of Git LFS, not the file itself{told}: run git lfs pull, or download the file"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return (
            "a web page, not a file: log in or accept its terms with a browser, download the file, and "
            "pass its path"
        )
    if text.startswith((b"<?xml", b"<error")):
        return (
            "an XML text, such as a storage server's refusal, not a file of weights: download the file anew"
        )
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first (what torch.save wrote before 2017 is one too: save it anew)"
    for start, what in _STARTS:
        if head.startswith(start):
            return what
    return _tensorflow(path) or _by_suffix(path, head)


def _tensorflow(path: Path) -> str:
    is_part = re.search(r"\.data-\d{5}-of-\d{5}$", path.name)
    is_graph = path.suffix == ".meta" or path.name == "saved_model.pb"
    if is_part or is_graph or (path.suffix == ".index" and _last(path, 8) == _TABLE_END):
        name = re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", path.name)
        return f"a part of the TensorFlow checkpoint {name!r}, as SimCLR has them: {_WAYS['tensorflow']}"
    return ""


def folder(path: Path) -> str:
    """Return what a folder without readable weights is; empty if unknown."""
    names = {child.name for child in path.iterdir()}
    if "saved_model.pb" in names or "saved_model.pbtxt" in names:
        return f"a SavedModel of TensorFlow, as its hub has them: {_WAYS['tensorflow']}"
    if any(name.endswith(".index") and f"{name.removesuffix('.index')}.meta" in names for name in names) or (
        any(re.search(r"\.data-\d{5}-of-\d{5}$", name) for name in names)
    ):
        return f"a folder of a TensorFlow checkpoint, as SimCLR has them: {_WAYS['tensorflow']}"
    return ""


def is_tensorflow_prefix(path: Path) -> bool:
    """Return whether a missing path is the prefix of a TensorFlow checkpoint.

    This is the name before `.index` and `.data-...`.
    """
    return path.with_name(f"{path.name}.index").is_file()


def tensorflow_prefix(path: Path) -> str:
    """Return the error message for such a path."""
    return f"{path}: a TensorFlow checkpoint, as SimCLR has them: {_WAYS['tensorflow']}"


def _by_suffix(path: Path, head: bytes) -> str:
    if path.suffix == ".msgpack":
        return "parameters of Flax, packed by msgpack: save them as safetensors"
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model: pass the checkpoint that it was made from"
    if path.suffix in (".json", ".yaml", ".yml", ".txt", ".md", ".csv"):
        return f"a text ({path.suffix}), not a file of weights"
    return ""


def _last(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - count))
        return file.read(count)
