"""What Markdown files name exists: paths, links, settings, modules, modes and extras."""

import re
import tomllib
from pathlib import Path

import pytest

from dapt_jax.settings import MODES, default, flat
from dapt_jax.settings.defaults import OPEN

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/**/*.md"), *ROOT.glob("benchmarks/*.md")]
)
OF_THE_USER = ("configs/mine.py",)
"""Paths that stand for a file of the reader's own."""
FOLDERS = ("dapt_jax", "configs", "launch", "tests", "benchmarks", "docs", ".ci")


def known_settings():
    names = set(flat(default()))
    return names | {
        ".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 1)
    }


@pytest.fixture(scope="module", params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request):
    return request.param, request.param.read_text()


def test_every_path_and_link_exists(page):
    path, text = page
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"\w+://|mailto:", target):
            assert (path.parent / target).exists(), f"link to {target}"
    for named in re.findall(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./*-]*[\w*/])", text):
        if named not in OF_THE_USER:
            assert list(ROOT.glob(named.rstrip("/"))), f"path {named}"


def test_every_setting_exists(page):
    settings = known_settings()
    for name, value in re.findall(
        r"(?:--config\.|\bconfig\.)([a-z_0-9]+(?:\.[a-z_0-9]+)*)(?:=([\w/|,]*))?", page[1]
    ):
        if name.split(".")[0] in (*OPEN, "py", "json", "unlocked", "update"):
            continue
        assert name in settings, f"setting {name}"
        if name == "mode":
            assert set(value.split("|")) <= {*MODES, ""}, f"mode {value}"


def test_every_module_that_is_run_exists(page):
    for module in re.findall(
        r"python3? -m ((?:dapt_jax|benchmarks|tests)[a-z_.0-9]*[a-z0-9])(?![A-Za-z.]*[A-Z])", page[1]
    ):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"module {module}"


def test_every_test_file_and_marker_exists(page):
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    for command in re.findall(r"pytest ([^`\n]*)", page[1]):
        for name in re.findall(r"tests/test_\w+\.py", command):
            assert (ROOT / name).exists(), name
        for marker in re.findall(r"-m ['\"]?(?:not )?(\w+)", command):
            assert any(each.startswith(f"{marker}:") for each in markers), f"marker {marker}"


def test_every_extra_exists(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for group in re.findall(r"(?:-e '?\"?\.|dapt_jax)\[([\w, -]+)\]", page[1]):
        for name in group.split(","):
            assert name.strip() in extras, f"extra {name}"
