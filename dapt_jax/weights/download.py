"""Download of weight files: resumed, verified and cached.

A cached file is not requested again. Without a network, the error says which file to put where. Servers are
not trusted: a download is limited by the length that the server announces, by the free disk space, and by a
time.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dapt_jax.errors import UserError, redact
from dapt_jax.runtime import home, safe_paths, user_cache
from dapt_jax.weights import transport, unreadable
from dapt_jax.weights.identity import digest

FOLDER = "DAPT_JAX_WEIGHTS"
"""Environment variable for the folder of downloaded weights; by default it is in the user's cache folder."""
_ATTEMPTS = 4


class _Source(NamedTuple):
    """Source of a file, for requests and for messages.

    Attributes:
        url: URL without user name and password.
        headers: Request headers, including credentials.
        shown: URL for messages, without any secret.
    """

    url: str
    headers: dict[str, str]
    shown: str


def folder() -> Path:
    """Return the folder of downloaded weights."""
    if given := os.environ.get(FOLDER):
        return home.expanded(given)
    return user_cache.folder("weights")


def fetch(url: str, *, sha256: str | None = None, name: str = "") -> Path:
    """Return the local copy of a file, which is downloaded unless it is cached.

    Args:
        url: `https://...`; `http://` only with a checksum, or from this machine.
        sha256: Checksum of the file, or its first 8 or more hexadecimal digits; None if unknown.
        name: Local name of the file; by default the name at its source.

    Returns:
        Its path in `folder()`. A file that was put there manually is accepted if its checksum is correct.

    Raises:
        UserError: The file cannot be reached, does not exist, or is a different file; says which file to put
            where.
    """
    source, parts = _source(url)
    is_here = parts.hostname in ("127.0.0.1", "::1", "localhost")
    if parts.scheme != "https" and not (parts.scheme == "http" and (sha256 or is_here)):
        raise UserError(f"{source.shown}: expected https://, or http:// with #sha256=...")
    check_digits(source.shown, sha256)
    # Two sources may use the same file name; a hash of the URL distinguishes them.
    place = folder() / hashlib.sha256(source.url.encode()).hexdigest()[:8]
    path = safe_paths.below(place, name or file_name(parts.path), source.shown)
    if path.is_file():
        if _is(path, sha256):
            return path
        raise UserError(
            f"{path}: its sha256 is {digest(path)}, expected {sha256}: delete it, or put the file of "
            f"{source.shown} there"
        )
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{place}: cannot be written to ({error.strerror}); set {FOLDER} to a folder that can"
        ) from None
    with _alone(path):
        if not path.is_file():
            _download(source, path, sha256)
    return path


def cached(url: str) -> Path | None:
    """Return the local copy of a file; None where it was not downloaded yet."""
    source, parts = _source(url)
    path = folder() / hashlib.sha256(source.url.encode()).hexdigest()[:8] / file_name(parts.path)
    return path if path.is_file() else None


def file_name(path: str) -> str:
    """Return the local name for the path of a URL: letters, digits and `._+-` of its last part.

    Example:
        >>> file_name("/a/b%2F..%2Fresnet 50.pth"), file_name("/a/..")
        ('resnet_50.pth', 'weights')
    """
    return safe_paths.clean(re.split(r"[/\\]", urllib.parse.unquote(path))[-1], "weights")


def check_digits(url: str, sha256: str | None) -> None:
    """Refuse an invalid checksum."""
    if sha256 is not None and (not 8 <= len(sha256) <= 64 or set(sha256) - set("0123456789abcdef")):
        raise UserError(f"{url}: sha256 {sha256!r}; expected 8 to 64 hexadecimal digits")


def _source(url: str) -> tuple[_Source, urllib.parse.SplitResult]:
    """Remove the user name and password from a URL; they are only sent to its host."""
    shown = redact(url)
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port, url.encode("ascii")
        if re.search(r"[\s\x00-\x1f\x7f]", url) or not parts.hostname:
            raise ValueError
    except ValueError:
        hint = "" if "@" not in url else " (in a password, / is %2F, @ is %40, # is %23)"
        shown = shown if not re.search(r"\s", url) else shown.partition("://")[0] + "://***"
        raise UserError(
            f"{shown}: not an address of a file; expected https://HOST/FILE, odd characters as %XX{hint}"
        ) from None
    headers = {}
    if parts.username is not None:
        user, password = (urllib.parse.unquote(each or "") for each in (parts.username, parts.password))
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {token}"
        parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    parts = parts._replace(fragment="")
    return _Source(parts.geturl(), headers, shown), parts


def _is(path: Path, sha256: str | None) -> bool:
    return sha256 is None or digest(path).startswith(sha256)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait for other processes that download the same file."""
    try:
        import fcntl
    except ImportError:  # not available on Windows, where two processes may download the file twice
        yield
        return
    try:
        lock = path.with_name(f".{path.name}.lock").open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot be written to ({error.strerror}); set {FOLDER} to a folder that can"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(source: _Source, path: Path, sha256: str | None) -> None:
    """Download in pieces; an interrupted download, also of an earlier process, is resumed."""
    partial, about = path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.partial.json")
    failure = ""
    try:
        for _ in range(_ATTEMPTS):
            try:
                _take_up(source, partial, about, is_verified=sha256 is not None)
            except transport.Broken as error:
                failure = str(error)
                if error.is_too_long:  # the local part is longer than the file: start again
                    partial.unlink(missing_ok=True)
                if error.is_final:
                    break
                continue
            if _is(partial, sha256):
                _refuse_others(source, partial, sha256)
                about.unlink(missing_ok=True)
                partial.replace(path)
                return
            failure = f"sha256 {digest(partial)}, expected {sha256}{'' if len(sha256 or '') == 64 else '...'}"
            partial.unlink()  # resuming cannot correct a wrong beginning
        raise UserError(_put(f"{source.shown}: {failure}", path, sha256))
    except (transport.NotWritten, OSError) as error:
        partial.unlink(missing_ok=True)  # this may free the space that is missing
        told = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path.parent}: cannot be written to ({told}); make room, or set {FOLDER} to a folder that can"
        ) from None
    finally:
        if not partial.exists() or not (sha256 or _seal(about)):  # it cannot be resumed
            partial.unlink(missing_ok=True)
            about.unlink(missing_ok=True)


def _refuse_others(source: _Source, partial: Path, sha256: str | None) -> None:
    """Refuse a web page or a pointer file sent instead of the file, which would otherwise be cached."""
    with partial.open("rb") as file:
        head = file.read(1024)
    if sha256 is None and (what := unreadable.identify(partial, head)):
        partial.unlink()
        raise UserError(f"{source.shown}: {what}")


def _put(what: str, path: Path, sha256: str | None) -> str:
    """Return the end of an error message: what to do manually."""
    check = f" with sha256 {sha256}{'' if len(sha256) == 64 else '...'}" if sha256 else ""
    return f"{what}; download it where there is a network and put the file{check} at {path}"


def _take_up(source: _Source, partial: Path, about: Path, *, is_verified: bool) -> None:
    """Download the missing part of a file.

    The whole file is downloaded if a change of its source could not be detected.
    """
    have = partial.stat().st_size if partial.exists() else 0
    seal = _seal(about) if have else ""
    if not (seal or is_verified):
        have = 0
    with transport.opened(source.url, source.headers, source.shown, have, seal) as answer:
        room = shutil.disk_usage(partial.parent).free
        if answer.length is not None and answer.length > room:
            raise UserError(
                f"{source.shown}: {answer.length:,} bytes, and {room:,} are free in {partial.parent}; make "
                f"room, or set {FOLDER} to a folder on another disk"
            )
        about.write_text(json.dumps({"seal": answer.seal}), encoding="utf-8")
        with partial.open("ab" if answer.is_rest else "wb") as file:
            answer.copy(file, room)


def _seal(about: Path) -> str:
    """Return the version identifier that the source gave to the partly downloaded file."""
    try:
        return str(json.loads(about.read_text(encoding="utf-8"))["seal"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
