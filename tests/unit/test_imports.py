"""Imports run one way: protos <- mesh <- services <- cli."""

from __future__ import annotations

import ast
import re
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


# Who may know UCX, and why.
KNOW_UCX = {
    "mesh/transport/ucx.py": "the transport: the only file that imports UCXX",
    "mesh/native/__init__.py": "loads the library that the compiled half of the transport needs",
    "cli/up.py": "has the fork server import UCXX before it forks; names it and calls nothing",
    "mesh/native/native.h": "declares the three below to each other and to ctypes",
    "mesh/native/postbox.c": "the transport's compiled half: posts, polls, sleeps, cancels",
    "mesh/native/answering.c": "turns UCX while a worker's experts compute",
    "mesh/native/asking.c": "turns UCX while a gateway's graph runs",
}


def names_ucx(source: Path) -> bool:
    """Whether a file uses UCX or UCXX: calls it, includes or imports it, or names its module."""
    text = source.read_text()
    if source.suffix != ".py":
        return re.search(r"\buc[pstm]_\w+|#\s*include\s*[<\"]uc[pstm]/", text) is not None
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.append(node.value)
    return any(re.fullmatch(r"(ucxx|ucp|libucx)(\.[\w.]+)?|libuc[pst]\.so.*", n) for n in names)


def test_those_alone_know_ucx_who_have_a_reason() -> None:
    sources = [
        source
        for package in MAY_IMPORT
        for source in (ROOT / package).rglob("*")
        if source.suffix in (".py", ".c", ".h")
    ]
    knowing = {str(s.relative_to(ROOT)) for s in sources if names_ucx(s)}
    assert knowing == KNOW_UCX.keys()


def test_one_file_alone_imports_ucxx() -> None:
    sources = [s for package in MAY_IMPORT for s in (ROOT / package).rglob("*.py")]
    knowing = {s for s in sources if "import ucxx" in s.read_text() or "from ucxx" in s.read_text()}
    assert knowing == {ROOT / "mesh/transport/ucx.py"}
