"""The layout of the package: imports run one way, the root is small, reports need no JAX."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dapt_jax"
ORDER = (
    "main", "api", "aot", "export", "study", "inference", "settings", "training", "losses", "objectives", "monitoring",
    "report", "records",
    "statistics", "transferability", "weights", "models", "data", "metrics", "cost", "runtime", "ops", "formatting",
    "parameters", "fields", "errors",
)  # fmt: skip
"""Rooms from top to bottom: a module imports from its own room and from rooms below it."""
ROOT_MODULES = 8


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports():
    """Every import of one module of the package by another, as (importer, imported)."""
    paths = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    for name, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dapt_jax"):
                for alias in node.names:
                    if alias.name == "__version__":
                        continue
                    full = f"{node.module}.{alias.name}"
                    yield name, full if full in paths else node.module
            elif isinstance(node, ast.Import):
                yield from ((name, alias.name) for alias in node.names if alias.name in paths)


def room(module):
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_its_place_in_the_order():
    rooms = {room(module_name(path)) for path in PACKAGE.rglob("*.py")} - {""}
    assert rooms == set(ORDER)


def test_imports_run_from_top_to_bottom():
    place = {name: number for number, name in enumerate(ORDER)}
    upward = [(a, b) for a, b in imports() if room(a) and room(b) and place[room(a)] > place[room(b)]]
    assert not upward
    assert not [(a, b) for a, b in imports() if room(b) == "" and room(a) != "main"], (
        "nobody imports the front door"
    )


def test_no_import_circle():
    below = defaultdict(set)
    for a, b in imports():
        if a != b and not a.startswith(b + "."):
            below[a].add(b)
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for other in sorted(below[module]):
            visit(other)
        path.pop()
        done.add(module)

    for module in list(below):
        visit(module)


def test_a_module_that_one_room_alone_imports_lives_in_that_room():
    users = defaultdict(set)
    for a, b in imports():
        users[b].add(room(a))
    loose = [path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "main", "api")]
    assert not [name for name in loose if len(users[f"dapt_jax.{name}"]) < 2]


def test_the_root_is_small_and_every_folder_says_what_it_offers():
    assert len(list(PACKAGE.glob("*.py"))) <= ROOT_MODULES
    for init in PACKAGE.rglob("__init__.py"):
        tree = ast.parse(init.read_text())
        assert ast.get_docstring(tree), f"{init} has no docstring"


@pytest.mark.parametrize("argument", ["--help", "--config.mode=models"])
def test_help_and_the_table_of_models_start_without_jax(argument):
    code = (
        "import sys; sys.modules['jax'] = sys.modules['flax'] = sys.modules['sklearn'] = None; "
        f"from dapt_jax import main; sys.exit(main.main(['dapt_jax', {argument!r}]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("module", "late"),
    [
        ("settings.flags", ("sklearn", "grain", "orbax", "matplotlib", "pandas")),
        ("study.plan_tables", ("sklearn", "scipy.stats")),
    ],
)
def test_settings_and_plans_import_no_library_that_only_training_or_a_report_needs(module, late):
    code = (
        f"import sys, dapt_jax.{module}; "
        f"sys.exit(str([name for name in {late} if name in sys.modules] or ''))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stderr.strip() == ""


@pytest.mark.parametrize(
    "module", ["dapt_jax.report", "dapt_jax.records.ledger", "dapt_jax.monitoring.status"]
)
def test_reports_and_records_need_no_jax(module):
    code = f"import sys; sys.modules['jax'] = sys.modules['flax'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
