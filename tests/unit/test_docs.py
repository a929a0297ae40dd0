"""The pages name what there is."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = (
    *("protos", "mesh", "gateway", "expert_worker", "placement", "cli", "expert_mesh"),
    *("benchmarks", "compose", "tools"),
)
KINDS = {".py", ".c", ".h", ".proto", ".yml"}


def test_the_architecture_page_names_every_source_file() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    page = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    named = {
        Path(word).name
        for code in re.findall(r"`([^`]+)`", page)
        for word in re.findall(r"[\w./-]+", code)
    }
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
    sources = [
        path
        for path in files
        if path.suffix in KINDS and path.name != "__init__.py" and "_pb2" not in path.name
    ]
    assert len(sources) > 100
    assert [
        str(path.relative_to(ROOT)) for path in sources if not {path.name, path.stem} & named
    ] == []
