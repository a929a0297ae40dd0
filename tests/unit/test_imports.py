"""Imports run one way: protos <- mesh <- services <- cli."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "protos": set(),
    "mesh": {"protos"},
    "expert_mesh": {"protos", "mesh"},
    "placement": {"protos", "mesh"},
    "expert_worker": {"protos", "mesh"},
    "gateway": {"protos", "mesh"},
    "cli": {"protos", "mesh", "expert_mesh", "placement", "expert_worker", "gateway"},
}


def imported_packages(source: Path) -> set[str]:
    """Our top-level packages that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.split(".")[0] for name in names} & MAY_IMPORT.keys()


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_is_below_it(package: str) -> None:
    sources = list((ROOT / package).rglob("*.py"))
    assert sources
    allowed = MAY_IMPORT[package] | {package}
    wrong = {str(s.relative_to(ROOT)): imported_packages(s) - allowed for s in sources}
    assert {source: packages for source, packages in wrong.items() if packages} == {}


def test_one_file_alone_knows_ucx() -> None:
    sources = [s for package in MAY_IMPORT for s in (ROOT / package).rglob("*.py")]
    knowing = {s for s in sources if "import ucxx" in s.read_text() or "from ucxx" in s.read_text()}
    assert knowing == {ROOT / "mesh/transport/ucx.py"}
