"""Weight files from the network: resumed where they stopped, verified, and kept.

A file that is here is not asked for again. Without a network, the error says which file to put where.
"""

import contextlib
import hashlib
import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dapt_jax import __version__
from dapt_jax.errors import UserError
from dapt_jax.runtime import user_cache

FOLDER = "DAPT_JAX_WEIGHTS"
"""Environment variable that names the folder of downloaded weights; by default one in the user's cache folder."""
_ATTEMPTS = 4
_PIECE = 1 << 20
_TIMEOUT_S = 30


def folder() -> Path:
    """Where downloaded weights are kept."""
    if given := os.environ.get(FOLDER):
        return Path(given).expanduser()
    return user_cache.folder("weights")


def fetch(url: str, *, sha256: str | None = None, name: str = "") -> Path:
    """The local copy of a file, downloaded unless it is here already.

    Args:
        url: `https://...`; `http://` only with a checksum, or from this machine.
        sha256: the file's, or its first 8 or more hexadecimal digits; None when it is not known.
        name: what the file is called here; by default as at its source.

    Returns:
        Its path in `folder()`. A file that was put there by hand is taken as well, if its checksum is right.

    Raises:
        UserError: it cannot be reached, is not there, or is another file; says which file to put where.
    """
    parts = urllib.parse.urlsplit(url)
    is_here = parts.hostname in ("127.0.0.1", "::1", "localhost")
    if parts.scheme != "https" and not (parts.scheme == "http" and (sha256 or is_here)):
        raise UserError(f"{url}: expected https://, or http:// with #sha256=...")
    _check_digits(url, sha256)
    # Two sources may call their files alike; a hash of the address keeps them apart.
    place = folder() / hashlib.sha256(url.encode()).hexdigest()[:8]
    path = place / (name or Path(urllib.parse.unquote(parts.path)).name or "weights")
    if path.is_file():
        if _is(path, sha256):
            return path
        raise UserError(
            f"{path}: its sha256 is {digest(path)}, expected {sha256}: delete it, or put the file of {url} there"
        )
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{place}: cannot be written to ({error.strerror}); set {FOLDER} to a folder that can"
        ) from None
    with _alone(path):
        if not path.is_file():
            _download(url, path, sha256)
    return path


def digest(path: Path) -> str:
    """The sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_digits(url: str, sha256: str | None) -> None:
    if sha256 is not None and (not 8 <= len(sha256) <= 64 or set(sha256) - set("0123456789abcdef")):
        raise UserError(f"{url}: sha256 {sha256!r}; expected 8 to 64 hexadecimal digits")


def _is(path: Path, sha256: str | None) -> bool:
    return sha256 is None or digest(path).startswith(sha256)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits for other processes that download the same file."""
    try:
        import fcntl
    except ImportError:  # not on Windows: there, two processes may download it twice
        yield
        return
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(url: str, path: Path, sha256: str | None) -> None:
    """Downloads in pieces; a connection that breaks, now or in an earlier start, is taken up again where it broke."""
    partial, about = path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.partial.json")
    failure = ""
    for _ in range(_ATTEMPTS):
        try:
            _take_up(url, partial, about, is_verified=sha256 is not None)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 416:  # what is here is longer than the file: begin again
                    partial.unlink(missing_ok=True)
                    continue
                if error.code < 500:
                    raise UserError(_put(f"{url}: HTTP {error.code} {error.reason}", url, path, sha256)) from None
                failure = f"HTTP {error.code} {error.reason}"
                continue
        except urllib.error.URLError as error:  # not even a connection: no network, or no such host
            raise UserError(_put(f"{url}: cannot be reached ({error.reason})", url, path, sha256)) from None
        except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
            failure = str(error)
            continue
        if _is(partial, sha256):
            about.unlink(missing_ok=True)
            partial.replace(path)
            return
        failure = f"sha256 {digest(partial)}, expected {sha256}{'' if len(sha256 or '') == 64 else '...'}"
        partial.unlink()  # a wrong beginning is not mended by resuming
    raise UserError(_put(f"{url}: {failure}", url, path, sha256))


def _put(what: str, url: str, path: Path, sha256: str | None) -> str:
    """The end of an error line: what to do by hand."""
    check = f" with sha256 {sha256}{'' if len(sha256) == 64 else '...'}" if sha256 else ""
    return f"{what}; download it where there is a network and put the file{check} at {path}"


def _take_up(url: str, partial: Path, about: Path, *, is_verified: bool) -> None:
    """Downloads what is missing of a file; all of it, where nothing would tell that its source has changed meanwhile."""
    have = partial.stat().st_size if partial.exists() else 0
    seal = _seal(about) if have else ""
    headers = {"User-Agent": f"dapt_jax/{__version__}", "Accept-Encoding": "identity"}
    if have and (seal or is_verified):
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": seal} if seal else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S) as answer:
        is_rest = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if url.startswith("https:") and not answer.url.startswith("https:"):
            raise UserError(f"{url}: leads to {answer.url}, which is not https; pass the address of the file itself")
        if answer.headers.get_content_type() == "text/html":
            raise UserError(f"{url}: a web page, not a file; download it with a browser and pass the file's path")
        seal = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        about.write_text(json.dumps({"url": url, "seal": "" if seal.startswith("W/") else seal}))
        length = answer.headers.get("Content-Length")
        with partial.open("ab" if is_rest else "wb") as file:
            taken = _copy(answer, file)
    if length is not None and taken != int(length):
        raise ConnectionError(f"the connection ended after {taken:,} of {int(length):,} bytes")


def _seal(about: Path) -> str:
    """What the source called the version of the file that is partly here."""
    try:
        return str(json.loads(about.read_text())["seal"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _copy(answer: Any, file: BinaryIO) -> int:
    taken = 0
    while piece := answer.read(_PIECE):
        file.write(piece)
        taken += len(piece)
    return taken
