"""Errors that a user can correct: one clear line, exit code 2."""

import difflib
import errno
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

EXIT_CODE = 2
_URL = re.compile(r"(?<![\w+.-])([A-Za-z][\w+.-]*)://([^\s\"'`<>]+)")
_TOKEN = re.compile(
    r"(?i)\b(bearer|basic)\s+(?!\*)[\w+/=.~-]{8,}"
    r"|\b(hf_|gh[pousr]_|github_pat_|glpat-|sk-)[\w-]{8,}"
)
_HARMLESS = re.compile(r"(?:dl|raw|download)=(?:0|1|true|false)")
_PUBLIC = re.compile(r"(?:sha256=[0-9A-Fa-f]*|prefix=[\w./~:-]*)")
_HIDDEN = "***"
_CHAINED = ("zip", "tar", "libarchive", "simplecache", "filecache", "blockcache")
"""Schemes of fsspec that lead to another place, `zip://FOLDER::PLACE`, and have no user name of their own."""


class UserError(ValueError):
    """Invalid user input; a `ValueError`, so that library users catch it as usual.

    >>> try:
    ...     raise UserError("scan.png: no such file; expected a path below /data")
    ... except ValueError as error:
    ...     print(error)
    scan.png: no such file; expected a path below /data

    The message is one line that names the file, row or path, what was expected, and the nearest valid choice.
    `dapt_jax.main` prints it without a traceback and exits with code 2. Whatever the source of the text
    (names inside files, a server's answer), the line holds no secret of a URL (`redact`) and no control
    characters.
    """

    def __init__(self, message: object = "", *more: object):
        """Create the error.

        Args:
            message: Text of the line.
            more: Further arguments, passed on unchanged.
        """
        super().__init__(one_line(redact(str(message))), *more)


class MissingLabelsError(UserError):
    """Data have no labels where some are needed; objectives that need none may still be able to use them."""


def redact(text: str) -> str:
    """Return a text without the secrets of the URLs in it.

    User names and passwords, query strings (signatures, tokens) and fragments become `***`; the scheme, the
    host and the path stay, so that a reader knows which address is meant. Harmless queries such as
    `dl=1` stay, and so do the fragments `sha256=` and `prefix=`. Tokens that stand alone (`Bearer ...`,
    `hf_...`) also become `***`.

    Args:
        text: Any text: a URL, or a line that mentions some.

    Returns:
        The text; `redact(redact(text)) == redact(text)`.

    Example:
        >>> redact("https://me:pw@host/w.pth?sig=5f: HTTP 403")
        'https://***@host/w.pth?***: HTTP 403'
    """
    shown = _URL.sub(_redact_url, text)
    return _TOKEN.sub(lambda found: f"{found[1]} {_HIDDEN}" if found[1] else f"{found[2]}{_HIDDEN}", shown)


def _redact_url(found: re.Match[str]) -> str:
    scheme, rest = found[1], found[2]
    folder, chain, place = rest.partition("::")
    if chain and scheme in _CHAINED and not re.search("[@:]", folder):
        return f"{scheme}://{folder}::{redact(place)}"
    end = re.search(r"[:;,.!?)\]}]*$", rest)
    assert end is not None
    rest, tail = rest[: end.start()], rest[end.start() :]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    _, _, port = authority.rpartition("]")[2].partition(":")
    # A password may hold any of / ? # @, unescaped: then the host follows the last @.
    if "@" in rest and ("@" in authority or (port and not port.isdigit())):
        rest = f"{_HIDDEN}@{rest.rpartition('@')[2]}"
    elif port and not port.isdigit():  # a password, in a truncated address
        rest = _HIDDEN
    address, sharp, fragment = rest.partition("#")
    address, mark, query = address.partition("?")
    if mark and not all(_HARMLESS.fullmatch(each) for each in query.split("&")):
        query = _HIDDEN
    if sharp and not all(_PUBLIC.fullmatch(each) for each in fragment.split("&")):
        fragment = _HIDDEN
    return f"{scheme}://{address}{mark}{query}{sharp}{fragment}{tail}"


def of_machine(error: BaseException) -> str:
    """Return an error of the machine as one line: a full or read-only disk, a limit, no memory.

    Libraries pass such errors on as their own: safetensors and tensorstore in words, JAX by a code.

    Args:
        error: Any error.

    Returns:
        The line; empty for an error that is not of the machine.

    Example:
        >>> of_machine(OSError(errno.ENOSPC, "No space left on device"))
        'No space left on device: make room; the same command goes on from the last checkpoint'
        >>> of_machine(KeyError("x"))
        ''
    """
    below: BaseException | None = error
    while below is not None:
        said = str(below)
        for number, what in _LIMITS.items():
            if (isinstance(below, OSError) and below.errno == number) or os.strerror(number) in said:
                named = f"{below.filename}: " if isinstance(below, OSError) and below.filename else ""
                return f"{named}{os.strerror(number)}: {what}; {_GO_ON}"
        if (
            isinstance(below, MemoryError)
            or os.strerror(errno.ENOMEM) in said
            or "RESOURCE_EXHAUSTED" in said
            or "start new thread" in said
        ):
            told = f" ({said[:160]})" if said else ""
            return (
                f"not enough memory{told}: free some, raise the limit (ulimit -v), or use a smaller batch_size "
                f"or data.cache_mb; {_GO_ON}"
            )
        is_own = below is error or below is error.__cause__
        if is_own and isinstance(below, OSError) and below.errno is not None and below.filename is not None:
            hint = _HINTS.get(below.errno, _GO_ON)
            return f"{one_line(str(below.filename))}: {below.strerror}; {hint}"
        below = below.__cause__ or below.__context__
    return ""


_GO_ON = "the same command goes on from the last checkpoint"
_LIMITS = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "make the disk writable",
    errno.EIO: "its disk or storage fails",
    errno.ESTALE: "its network storage has changed",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}
_HINTS = {
    errno.EACCES: "expected a file or folder that this user may use",
    errno.EPERM: "expected a file or folder that this user may use",
    errno.ENAMETOOLONG: "expected a shorter name",
    errno.ENOTDIR: "expected a folder",
    errno.EISDIR: "expected a file",
    errno.EEXIST: "expected a folder",
    errno.ELOOP: "expected a file or folder, not a link that leads to itself",
}


def is_full(error: BaseException) -> bool:
    """Return whether an error, or what caused it, is a full disk, a quota or a largest file size."""
    return any(
        of_machine(error).endswith(f"{os.strerror(each)}: {_LIMITS[each]}; {_GO_ON}")
        for each in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    )


def one_line(text: str) -> str:
    r"""Return a text with every non-printable character escaped.

    These include line ends, escapes, and undecodable bytes of file names.

    Example:
        >>> one_line("a\nb")
        'a\\nb'
    """
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text
    )


def nearest(name: str, choices: Iterable[str], most: int = 3, folder: Path | None = None) -> str:
    """Return the valid choices closest to `name`, as the end of an error line.

    Args:
        name: Invalid value that the user wrote.
        choices: Valid choices.
        most: Largest number of near matches to name.
        folder: Folder that is written before each choice; it does not count for what is close.

    Returns:
        `"did you mean 'full'?"` when something is close, else `"valid: 'none', 'full', ..."`; without choices,
        that there are none.

    Example:
        >>> nearest("ful", ["none", "full"]), nearest("ful", [])
        ("did you mean 'full'?", 'there are none to choose from')
    """
    valid = [str(choice) for choice in choices]
    if not valid:
        return "there are none to choose from"

    def written(choice: str) -> str:
        return repr(choice if folder is None else str(folder / choice))

    close = difflib.get_close_matches(name, valid, n=most, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(map(written, close)) + "?"
    shown = ", ".join(map(written, valid[:12]))
    return f"valid: {shown}" + (f", ... ({len(valid)} in all)" if len(valid) > 12 else "")


def nearest_beside(path: Path, fits: Callable[[Path], bool], also: Iterable[str] = ()) -> str:
    """Return what a missing path may have meant, as the end of an error line.

    Args:
        path: The path, which does not exist.
        fits: Whether an entry of its folder is of the kind that was expected; others are not listed.
        also: Valid values that are no paths; named only where one is close.

    Returns:
        Near names as by `nearest`, else the fitting entries, else that the folder or such an entry is missing.
    """
    folder = path.parent
    fitting = sorted(entry.name for entry in folder.iterdir() if fits(entry)) if folder.is_dir() else []
    near = nearest(path.name, [*also, *fitting])
    if fitting or near.startswith("did"):
        return near if near.startswith("did") else nearest(path.name, fitting)
    return f"{folder} holds none" if folder.is_dir() else f"there is no folder {folder}"
