"""Bounded reading of one response of a web server: limits of length, disk space, time and rate."""

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
"""Maximum time without any data from the server."""
ANSWER_S = 120.0
"""Maximum time before the file itself starts: name resolution, connections, redirects and headers."""
LONGEST_S = 12 * 3600.0
"""Maximum duration of one connection."""
WINDOW_S = 60.0
LEAST_RATE = 4096
"""Minimum bytes per second over each `WINDOW_S`; a slower connection is closed and, if possible, resumed."""
LARGEST = 64 << 30
"""Maximum bytes of a file whose length the server does not state."""
_PIECE = 1 << 20


class Broken(Exception):
    """A download that ended before the file did.

    Attributes:
        is_final: Whether another attempt is useless.
        is_too_long: Whether the local part is longer than the file.
    """

    def __init__(self, why: str, *, is_final: bool = False, is_too_long: bool = False):
        super().__init__(one_line(redact(why))[:300])
        self.is_final, self.is_too_long = is_final, is_too_long


class NotWritten(Exception):
    """A file that could not be written; its cause is the error of the operating system."""


class Answer:
    """A response whose headers have been read and checked.

    Attributes:
        length: Announced number of bytes; None if there is none.
        is_rest: Whether the body is the requested rest of a file, or the whole file.
        seal: Identifier of this version on the server; empty if there is no reliable one.
    """

    def __init__(self, response: http.client.HTTPResponse, shown: str, have: int, seal: str, watch: "_Watch"):
        """Check the headers of a response.

        Args:
            response: Response of `urllib.request`.
            shown: The URL for errors.
            have: Number of bytes that already exist locally.
            seal: Entity tag or date of the version of these bytes.
            watch: Timer of the connection.

        Raises:
            UserError: The response is a web page or something else that is not a file.
            Broken: The headers are inconsistent.
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
        self._response, self._watch = response, watch
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
            file: Output file.
            room: Number of free bytes on its disk.

        Raises:
            Broken: The body ends early, is too slow, takes too long, or is longer than announced or than the
                free space.
            NotWritten: The disk is full.
        """
        most = min(LARGEST if self.length is None else self.length, room)
        begun = window = time.monotonic()
        taken = before = 0
        self._watch.allow(2 * WINDOW_S)
        while piece := self._piece():
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
                self._watch.allow(2 * WINDOW_S)
        if self.length is None and not taken:
            raise Broken("the connection ended before the file began")
        if self.length is not None and taken != self.length:
            raise Broken(f"the connection ended after {taken:,} of {self.length:,} bytes")

    def _piece(self) -> bytes:
        try:
            piece = self._response.read1(_PIECE)
        except (OSError, http.client.HTTPException):
            if not self._watch.is_over:
                raise
        if self._watch.is_over:
            raise Broken(f"no bytes of the file for {2 * WINDOW_S:,.0f} s", is_final=True)
        return piece


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
    """Redirect handler that never leaves https."""

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
        """Return the redirected request."""
        try:
            check_redirect(self._shown, req.full_url, newurl)
        except UserError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def check_redirect(shown: str, before: str, after: str) -> None:
    """Refuse a redirect that leaves https.

    Raises:
        UserError: The redirect leaves https.
    """
    allowed = ("https:",) if before.startswith("https:") else ("https:", "http:")
    if not after.startswith(allowed):
        raise UserError(
            f"{shown}: leads to {redact(after)}, which is not https; pass the address of the file itself"
        )


class _Watch:
    """Timer that closes the connections of a request.

    A server may send a header, or lines after the file, without end.
    """

    def __init__(self, seconds: float):
        self._sockets: list[socket.socket] = []
        self.is_over = False
        self._start(seconds)

    def _start(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._close)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> "_Watch":
        return self

    def __exit__(self, *_: Any) -> None:
        self._timer.cancel()

    def allow(self, seconds: float) -> None:
        """Close the connections after this many seconds from now instead."""
        self._timer.cancel()
        self._start(seconds)

    def _close(self) -> None:
        self.is_over = True
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def handlers(self) -> list[urllib.request.BaseHandler]:
        """Return handlers whose connections are closed by the timer."""
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
    """Request a file, or the rest of one.

    Args:
        url: URL of the file.
        headers: Request headers for its host only, not for hosts that it redirects to.
        shown: The URL for errors.
        have: Number of bytes that already exist locally.
        seal: Entity tag or date of the version of these bytes; empty if unknown.

    Raises:
        UserError: The file does not exist or cannot be obtained.
        Broken: The connection broke, or the server is busy: another attempt may succeed.
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
            if watch.is_over:  # headers look complete where their connection ends
                response.close()
                raise _late()
            with response:
                check_redirect(shown, url, response.url)
                yield Answer(response, shown, have, seal, watch)
    except urllib.error.HTTPError as error:
        with error:
            raise Broken(
                f"HTTP {error.code} {error.reason}",
                is_final=error.code < 500 and error.code != 416,
                is_too_long=error.code == 416,
            ) from None
    except urllib.error.URLError as error:  # no connection: no network, or an unknown host
        raise Broken(f"cannot be reached ({error.reason})", is_final=True) from None
    except (http.client.HTTPException, OSError) as error:  # timeouts, resets, damaged encryption
        raise Broken(str(error) or type(error).__name__) from None
    except ValueError as error:  # a redirect to an invalid URL
        raise Broken(f"leads nowhere ({error})", is_final=True) from None
