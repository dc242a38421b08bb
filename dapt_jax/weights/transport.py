"""One answer of a web server, read within bounds: of length, of the room on the disk, of time and of rate."""

import contextlib
import email.message
import http.client
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import IO, Any, BinaryIO

from dapt_jax import __version__
from dapt_jax.errors import UserError, one_line, redact

TIMEOUT_S = 30.0
"""For which a server may say nothing."""
ANSWER_S = 120.0
"""Within which a server has to begin with the file itself: names, connections, redirections and headers."""
LONGEST_S = 12 * 3600.0
"""For which one connection may last."""
WINDOW_S = 60.0
LEAST_RATE = 4096
"""Bytes per second over each `WINDOW_S`; a connection that is slower is given up, and taken up again where
that can be."""
LARGEST = 64 << 30
"""Bytes of a file whose length the server does not say."""
_PIECE = 1 << 20


class Broken(Exception):
    """A download that ended before the file did.

    Attributes:
        is_final: Whether it is of no use to try again.
        is_too_long: Whether more is here than the file has.
    """

    def __init__(self, why: str, *, is_final: bool = False, is_too_long: bool = False):
        super().__init__(one_line(redact(why))[:300])
        self.is_final, self.is_too_long = is_final, is_too_long


class NotWritten(Exception):
    """A file that could not be written; its cause is the error of the operating system."""


class Answer:
    """An answer whose headers are read and checked.

    Attributes:
        length: Bytes that it announces; None where it does not.
        is_rest: Whether they are the rest of a file, as asked, or all of it.
        seal: What the server calls this version of the file; empty if nothing that can be relied on.
    """

    def __init__(self, response: http.client.HTTPResponse, shown: str, have: int, seal: str):
        """Check the headers of an answer.

        Args:
            response: Response of `urllib.request`.
            shown: The address for error lines.
            have: Bytes that are here already.
            seal: Entity tag or date of the version that these bytes are of.

        Raises:
            UserError: It is a web page or something else that is no file.
            Broken: The headers make no sense.
        """
        headers = response.headers
        if headers.get_content_type() == "text/html":
            raise UserError(
                f"{shown}: a web page, not a file; download it with a browser and pass the file's path"
            )
        if (coding := (headers.get("Content-Encoding") or "identity").strip().lower()) != "identity":
            raise Broken(
                f"the file comes packed ({coding[:40]}), though that was not asked for", is_final=True
            )
        self._response = response
        self.length = _length(headers)
        found = headers.get("ETag") or headers.get("Last-Modified") or ""
        self.seal = "" if found.startswith("W/") or len(found) > 300 else found
        self.is_rest = False
        if response.status == 206:
            self._check_range(headers.get("Content-Range") or "", have)
            if seal and self.seal and seal != self.seal:
                raise Broken("the file has changed at its source", is_too_long=True)
            self.is_rest = True
        elif response.status != 200:
            raise Broken(f"HTTP {response.status}", is_final=True)

    def _check_range(self, said: str, have: int) -> None:
        found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", said.strip())
        if not found or int(found[1]) != have or (found[3] != "*" and int(found[2]) + 1 != int(found[3])):
            raise Broken(
                f"a part of the file that was not asked for (Content-Range {said[:80]!r})", is_too_long=True
            )
        if self.length is None:
            self.length = int(found[2]) + 1 - have

    def copy(self, file: BinaryIO, room: int) -> None:
        """Write the body to a file.

        Args:
            file: Where to.
            room: Bytes that are free there.

        Raises:
            Broken: It ends early, comes too slowly, for too long, or is longer than announced or than there
                is room.
            NotWritten: The disk is full.
        """
        most = min(LARGEST if self.length is None else self.length, room)
        begun = window = time.monotonic()
        taken = before = 0
        while piece := self._response.read1(_PIECE):
            taken += len(piece)
            if taken > most:
                raise Broken(
                    f"more than the {most:,} bytes that were announced or fit",
                    is_final=True,
                    is_too_long=True,
                )
            try:
                file.write(piece)
            except OSError as error:
                raise NotWritten(error.strerror or str(error)) from error
            now = time.monotonic()
            if now - begun > LONGEST_S:
                raise Broken(f"{taken:,} bytes after {LONGEST_S:,.0f} s: too slow", is_final=True)
            if now - window > WINDOW_S:
                if taken - before < LEAST_RATE * (now - window):
                    rate = (taken - before) / (now - window)
                    raise Broken(
                        f"{rate:,.0f} bytes per second; expected {LEAST_RATE:,} or more", is_final=True
                    )
                window, before = now, taken
        if self.length is None and not taken:
            raise Broken("the connection ended before the file began")
        if self.length is not None and taken != self.length:
            raise Broken(f"the connection ended after {taken:,} of {self.length:,} bytes")


def _length(headers: email.message.Message) -> int | None:
    said = headers.get_all("Content-Length") or []
    if not said or headers.get("Transfer-Encoding"):
        return None
    if len(set(said)) > 1 or not re.fullmatch(r"\d{1,18}", said[0].strip()):
        raise Broken(f"a length of {', '.join(said)[:60]!r}; expected a number of bytes", is_final=True)
    return int(said[0])


def _late() -> Broken:
    return Broken(f"no file after {ANSWER_S:,.0f} s", is_final=True)


class _Https(urllib.request.HTTPRedirectHandler):
    """Follows no redirection from https to anything else."""

    def __init__(self, shown: str):
        self._shown = shown

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Return the request to go on with."""
        try:
            check_redirect(self._shown, req.full_url, newurl)
        except UserError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def check_redirect(shown: str, before: str, after: str) -> None:
    """Refuse a redirection that leaves https.

    Raises:
        UserError: It does.
    """
    allowed = ("https:",) if before.startswith("https:") else ("https:", "http:")
    if not after.startswith(allowed):
        raise UserError(
            f"{shown}: leads to {redact(after)}, which is not https; pass the address of the file itself"
        )


class _Watch:
    """Closes the connections of a request when its time is over: a server may send a header byte by byte for ever."""

    def __init__(self, seconds: float):
        self._sockets: list[socket.socket] = []
        self.is_over = False
        self._timer = threading.Timer(seconds, self._close)
        self._timer.daemon = True

    def __enter__(self) -> "_Watch":
        self._timer.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._timer.cancel()

    def _close(self) -> None:
        self.is_over = True
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def handlers(self) -> list[urllib.request.BaseHandler]:
        """Return handlers whose connections are watched."""
        sockets = self._sockets

        class Plain(http.client.HTTPConnection):
            def connect(self) -> None:
                super().connect()
                sockets.append(self.sock)

        class Secure(http.client.HTTPSConnection):
            def connect(self) -> None:
                super().connect()
                sockets.append(self.sock)

        class PlainHandler(urllib.request.HTTPHandler):
            def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
                return self.do_open(Plain, req)

        class SecureHandler(urllib.request.HTTPSHandler):
            def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
                return self.do_open(Secure, req, context=self._context)  # type: ignore[attr-defined]

        return [PlainHandler(), SecureHandler()]


@contextlib.contextmanager
def opened(url: str, headers: dict[str, str], shown: str, have: int, seal: str) -> Iterator[Answer]:
    """Ask for a file, or for the rest of one.

    Args:
        url: Address of the file.
        headers: Headers to send to its host, and to no other that it leads to.
        shown: The address for error lines.
        have: Bytes that are here already.
        seal: Entity tag or date of the version that these bytes are of; empty if that is not known.

    Raises:
        UserError: The file is not there, or cannot be had.
        Broken: The connection broke, or the server is busy: it may be tried again.
    """
    request = urllib.request.Request(
        url, headers={"User-Agent": f"dapt_jax/{__version__}", "Accept-Encoding": "identity"}
    )
    for name, value in headers.items():
        request.add_unredirected_header(name, value)
    if have:
        request.add_header("Range", f"bytes={have}-")
        if seal:
            request.add_header("If-Range", seal)
    try:
        with _Watch(ANSWER_S) as watch:
            opener = urllib.request.build_opener(_Https(shown), *watch.handlers())
            try:
                response = opener.open(request, timeout=TIMEOUT_S)
            except (OSError, http.client.HTTPException):
                if watch.is_over:
                    raise _late() from None
                raise
            if watch.is_over:  # the headers look complete where their connection ends
                response.close()
                raise _late()
        with response:
            check_redirect(shown, url, response.url)
            yield Answer(response, shown, have, seal)
    except urllib.error.HTTPError as error:
        with error:
            raise Broken(
                f"HTTP {error.code} {error.reason}",
                is_final=error.code < 500 and error.code != 416,
                is_too_long=error.code == 416,
            ) from None
    except urllib.error.URLError as error:  # not even a connection: no network, or no such host
        raise Broken(f"cannot be reached ({error.reason})", is_final=True) from None
    except (http.client.HTTPException, OSError) as error:  # timeouts, resets, damage to what is encrypted
        raise Broken(str(error) or type(error).__name__) from None
    except ValueError as error:  # a redirection to what is no address
        raise Broken(f"leads nowhere ({error})", is_final=True) from None
