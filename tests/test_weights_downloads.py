"""Downloads are bounded by what a server announces, by the disk and by time; no secret of an address is written anywhere."""

import base64
import contextlib
import functools
import http.server
import json
import shutil
import string
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_jax.errors import UserError, one_line, redact
from dapt_jax.weights import download, locate, transport

BODY = bytes(range(256)) * 400


class Source(http.server.BaseHTTPRequestHandler):
    """A server with a fault for each path."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        parts = urllib.parse.urlsplit(self.path)
        self.server.asked.append((self.path, dict(self.headers)))
        name = parts.path.rpartition("/")[2]
        self.close_connection = True
        headers: list[tuple[str, str]] = []
        body, length = BODY, str(len(BODY))
        status = 200
        if name == "drip_headers.pth":
            with contextlib.suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                for _ in range(200):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            return None
        if name == "drip.pth":
            self._start(200, [("Content-Length", str(1 << 30))])
            with contextlib.suppress(OSError):
                for _ in range(400):
                    self.wfile.write(b"x")
                    time.sleep(0.02)
            return None
        if name == "trailers.pth":
            self._start(200, [("Transfer-Encoding", "chunked")])
            with contextlib.suppress(OSError):
                self.wfile.write(b"3\r\nabc\r\n0\r\n")
                while True:
                    self.wfile.write(b"X: y\r\n" * 100)
                    time.sleep(0.01)
            return None
        if name == "moved.pth":
            where = urllib.parse.parse_qs(parts.query)["to"][0]
            return self._start(302, [("Location", where), ("Content-Length", "0")])
        match name:
            case "huge.pth":
                length = str(1 << 59)
            case "negative.pth":
                length = "-5"
            case "words.pth":
                length = "many"
            case "two.pth":
                headers = [("Content-Length", "7")]
            case "more.pth":
                length = ""
                body = BODY * 50
            case "packed.pth":
                headers = [("Content-Encoding", "gzip")]
            case "lfs.pth":
                body = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 7\n"
                length = str(len(body))
            case "page_as_file.pth":
                body = b"<!doctype html><html>Please log in</html>"
                length = str(len(body))
            case "reason.pth":
                return self.send_error(403, "no \x1b[31mtoken=abc\x1b[0m")
            case "part.pth":
                status, headers = 206, [("Content-Range", f"bytes 10-{len(BODY) + 9}/{len(BODY) + 10}")]
            case "no_headers.pth":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nServer: x")
                return None
            case "short.pth":
                body = BODY[:1000]
            case "other_part.pth" if "Range" in self.headers:
                status, headers = 206, [("Content-Range", "bytes 3-5/6"), ("Content-Length", "3")]
                body, length = b"abc", ""
        self._start(status, [*headers, *([("Content-Length", length)] if length else [])])
        with contextlib.suppress(OSError):
            self.wfile.write(body)
        return None

    def _start(self, status, headers):
        self.send_response(status)
        for key, value in headers:
            self.send_header(key, value)
        self.end_headers()


@pytest.fixture
def source(tmp_path: Path, monkeypatch):
    monkeypatch.setenv(download.FOLDER, str(tmp_path / "kept"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Source)
    server.daemon_threads, server.block_on_close = True, False
    server.asked = []
    server.handle_error = lambda *_: None
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def refused(url: str, **more) -> str:
    with pytest.raises(UserError) as caught:
        download.fetch(url, **more)
    line = str(caught.value)
    assert line.isprintable()
    return line


def left() -> list[str]:
    """Names of the files that a download has left, its lock aside."""
    found = download.folder().rglob("*") if download.folder().exists() else []
    return sorted(each.name for each in found if each.is_file() and not each.name.endswith(".lock"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "huge.pth",
            "576,460,752,303,423,488 bytes, and .* are free in .*; make room, or set DAPT_JAX_WEIGHTS",
        ),
        ("negative.pth", "a length of '-5'; expected a number of bytes"),
        ("words.pth", "a length of 'many'"),
        ("two.pth", "a length of '7, 102400'"),
        ("packed.pth", r"the file comes packed \(gzip\)"),
        ("part.pth", "a part of the file that was not asked for"),
        ("short.pth", "the connection ended after 1,000 of 102,400 bytes"),
        ("no_headers.pth", "the connection ended before the file began"),
        ("reason.pth", r"HTTP 403 no \\x1b\[31m"),
        ("lfs.pth", "a pointer of Git LFS"),
        ("page_as_file.pth", "a web page, not a file"),
    ],
)
def test_odd_answers_are_one_line_and_leave_nothing(source, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        download.fetch(f"{source.address}/{name}")
    assert left() == []


def test_a_file_whose_length_nobody_says_ends_where_the_room_does(source, monkeypatch) -> None:
    room = shutil.disk_usage(".")._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    assert "more than the 10,000 bytes that were announced or fit" in refused(f"{source.address}/more.pth")
    assert left() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room._replace(free=1 << 40))
    monkeypatch.setattr(transport, "LARGEST", 20_000)
    assert "more than the 20,000 bytes" in refused(f"{source.address}/more.pth")


def test_a_full_disk_is_one_line_and_gives_its_room_back(source, monkeypatch) -> None:
    def full(self, file, room):
        file.write(b"some")
        raise transport.NotWritten("No space left on device")

    monkeypatch.setattr(transport.Answer, "copy", full)
    assert "cannot be written to (No space left on device); make room" in refused(
        f"{source.address}/a.pth", sha256="0" * 8
    )
    assert left() == []


def test_a_server_that_drips_is_given_up(source, monkeypatch) -> None:
    monkeypatch.setattr(transport, "WINDOW_S", 0.3)
    start = time.monotonic()
    assert "bytes per second; expected 4,096 or more" in refused(f"{source.address}/drip.pth")
    assert time.monotonic() - start < 5
    monkeypatch.setattr(transport, "WINDOW_S", 60.0)
    monkeypatch.setattr(transport, "LONGEST_S", 0.3)
    assert "too slow" in refused(f"{source.address}/drip.pth")
    assert left() == []


def test_lines_after_the_file_without_end_are_given_up(source, monkeypatch) -> None:
    monkeypatch.setattr(transport, "WINDOW_S", 0.2)
    assert "no bytes of the file for 0 s" in refused(f"{source.address}/trailers.pth")
    assert left() == []


def test_a_server_that_never_comes_to_the_file_is_given_up(source, monkeypatch) -> None:
    monkeypatch.setattr(transport, "ANSWER_S", 0.5)
    start = time.monotonic()
    assert "no file after" in refused(f"{source.address}/drip_headers.pth")
    assert time.monotonic() - start < 5


def test_a_part_that_does_not_follow_is_dropped(source) -> None:
    url = f"{source.address}/other_part.pth"
    path = download.fetch(url)
    path.with_name("other_part.pth.partial").write_bytes(BODY[:100])
    path.with_name("other_part.pth.partial.json").write_text(json.dumps({"seal": '"v1"'}))
    path.unlink()
    assert download.fetch(url).read_bytes() == BODY
    assert left() == ["other_part.pth"]


@pytest.mark.parametrize("to", ["ftp://127.0.0.1/w.pth", "file:///etc/passwd", "gopher://x/"])
def test_no_redirection_leads_out_of_the_web(source, to: str) -> None:
    line = refused(f"{source.address}/moved.pth?to={urllib.parse.quote(to)}")
    assert "leads to" in line or "HTTP 302" in line
    assert left() == []


def test_a_redirection_from_https_to_http_is_refused_before_it_is_followed() -> None:
    with pytest.raises(UserError, match=r"leads to http://h/w\?\*\*\*, which is not https"):
        transport.check_redirect("https://h/w", "https://h/w", "http://h/w?sig=1")
    transport.check_redirect("https://h/w", "https://h/w", "https://other/w")


# ---- names ------------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(path=st.text(max_size=300) | st.text("./\\%2eEfF \0\n:~", max_size=30))
def test_no_address_names_a_file_outside_its_folder(path: str) -> None:
    name = download.file_name(path)
    assert name not in ("", ".", "..")
    assert Path("/place", name).parent == Path("/place")
    assert not name.startswith(".")
    assert len(name.encode()) <= 120
    assert not set(name) & set("/\\\0:\n ")


@pytest.mark.parametrize(
    "url", ["https://h/a b", "https://h/\n", "https://h:x/a", "https:///a", "https://[::1/a", "https://h/ü"]
)
def test_an_address_that_is_none_is_one_line(url: str) -> None:
    assert "not an address of a file; expected https://HOST/FILE" in refused(url)


# ---- secrets
# ----------------------------------------------------------------------------------------------------------

SECRET = st.text(string.ascii_letters + string.digits + "/?#@:%+=&!~", min_size=4, max_size=30).map(
    lambda text: f"S3{text}cr3t"
)
PLAIN = st.text(string.ascii_letters + string.digits, min_size=4, max_size=30).map(
    lambda text: f"S3{text}cr3t"
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    secret=SECRET,
    scheme=st.sampled_from(["https", "http", "s3", "gs", "hf"]),
    after=st.sampled_from(["", ": HTTP 403", " cannot be had", "'", ")"]),
)
def test_no_password_stays_in_a_line(secret: str, scheme: str, after: str) -> None:
    line = redact(f"weights {scheme}://user:{secret}@host.org/folder/w.pth{after}")
    assert "S3" not in line
    assert "cr3t" not in line
    assert "host.org/folder/w.pth" in line
    assert line.endswith(after)
    assert redact(line) == line


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    secret=PLAIN,
    name=st.sampled_from(["sig", "X-Amz-Signature", "token", "dl", "access_token", ""]),
    more=st.sampled_from(["", "&dl=1", "#part"]),
)
def test_no_signed_query_and_no_fragment_stays_in_a_line(secret: str, name: str, more: str) -> None:
    for line in (
        f"https://host/w.pth?{name}={secret}{more}: gone",
        f"https://host/w.pth?a=1&{secret}",
        f"hf://o/r/f#{secret}",
    ):
        found = redact(line)
        assert secret not in found
        assert "w.pth?***" in found or "f#***" in found
        assert redact(found) == found


@settings(max_examples=200, deadline=None, derandomize=True)
@given(token=PLAIN)
def test_no_token_stays_in_a_line(token: str) -> None:
    for line in (f"Authorization: Bearer {token}", f"hf_{token} is not valid", f"ghp_{token}"):
        assert token not in redact(line)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(max_size=80))
def test_what_is_no_address_stays_and_a_line_is_a_line(text: str) -> None:
    line = str(UserError(text))
    assert line.isprintable() or line == ""
    if "://" not in text and "_" not in text and " " not in text:
        assert line == one_line(text)
    assert str(UserError(line)) == line


def test_a_password_is_sent_to_its_host_and_written_nowhere(source, capfd) -> None:
    host = source.address.removeprefix("http://")
    path = download.fetch(f"http://me:pass%2Fword@{host}/a.pth?sig=S3cr3t")
    assert path.read_bytes() == BODY
    asked, headers = source.asked[-1]
    assert asked == "/a.pth?sig=S3cr3t"
    assert headers["Authorization"] == "Basic " + base64.b64encode(b"me:pass/word").decode()
    line = refused(f"http://me:pa55word@{host}/reason.pth?sig=S3cr3t")
    written = "".join(each.read_text(errors="replace") for each in download.folder().rglob("*.json"))
    names = "".join(str(each) for each in download.folder().rglob("*"))
    for text in (line, written, names, *capfd.readouterr()):
        assert "S3cr3t" not in text
        assert "pa55word" not in text
    assert f"http://***@{host}/reason.pth?***: HTTP 403" in line


def test_a_password_does_not_follow_a_redirection(source) -> None:
    host = source.address.removeprefix("http://")
    to = urllib.parse.quote(f"http://localhost:{source.server_port}/a.pth")
    download.fetch(f"http://me:pa55word@{host}/moved.pth?to={to}")
    assert "Authorization" in source.asked[-2][1]
    assert "Authorization" not in source.asked[-1][1]


def test_no_error_of_an_address_tells_its_secrets() -> None:
    for spec in (
        "ftp://me:pa55word@host/w.pth",
        "https://me:pa55word@host/w.pth#layer=pa55word",
        "http://me:pa55word@example.org/w.pth",
        "hf://me:pa55word@only/two",
        "https://me:pass#word@host/w.pth#sha256=zz",
    ):
        with pytest.raises(UserError) as caught:
            locate.find(spec)
        assert "pa55word" not in str(caught.value)
        assert "word@" not in str(caught.value)
