"""The report in a real browser: nothing overflows at a phone's width or a desk's, and nothing is fetched."""

import json
import re
import shutil
import subprocess

import pytest

from dapt_jax.report import build
from tests import test_report_example as report_example
from tests.test_report_prediction_figures import keep

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PROBE = """<script>addEventListener("load", () => {
  const all = (what) => [...document.querySelectorAll(what)];
  const clips = (node) => node && (node.matches(".scroll") || clips(node.parentElement));
  parent.postMessage(JSON.stringify({
    width: innerWidth,
    content: document.documentElement.scrollWidth,
    outside: all("body *").filter((each) => !clips(each) && each.getBoundingClientRect().right > innerWidth + 1)
      .map((each) => each.outerHTML.slice(0, 80)),
    headings: all("h1, h2, h3").map((each) => Number(each.tagName[1])),
    unnamed: all("img:not([alt]), img[alt=''], th:not([scope]), .scroll:not([tabindex])").length,
    broken: all("img").filter((each) => !each.naturalWidth).length,
    fetched: performance.getEntriesByType("resource").map((each) => each.name),
  }), "*");
});</script>"""
FRAME = """<body><pre id="found"></pre><script>
addEventListener("message", (event) => { document.getElementById("found").textContent = event.data; });
</script><iframe src="probed.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the path")
    workdir = report_example.write(
        tmp_path_factory.mktemp("study"), seeds=(0, 1), strategies=("none", "full")
    )
    keep(workdir)
    build(workdir)
    html = (workdir / "report.html").read_text()
    assert len(html.encode()) < 5_000_000
    html = re.sub(r"<meta http-equiv=.Content-Security-Policy[^>]*>", "", html)  # it forbids the probe too
    (workdir / "probed.html").write_text(html.replace("</body>", PROBE + "</body>"))
    return workdir


@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_fits_and_is_complete_without_a_request(page, tmp_path, width):
    frame = page / f"frame{width}.html"
    frame.write_text(
        FRAME.replace("WIDTH", str(width))
    )  # a window of a browser cannot be as narrow as a phone
    command = [
        BROWSER,
        *FLAGS,
        f"--user-data-dir={tmp_path}",
        "--window-size=1500,1000",
        "--virtual-time-budget=5000",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(
        re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1]
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&")
    )
    assert found["width"] == width
    assert found["content"] <= width
    assert found["outside"] == []
    assert found["headings"][0] == 1
    assert found["headings"].count(1) == 1
    assert all(
        after <= before + 1 for before, after in zip(found["headings"], found["headings"][1:], strict=False)
    )
    assert (found["unnamed"], found["broken"], found["fetched"]) == (0, 0, [])
