"""The command of a Python process that runs a module of ours."""

from __future__ import annotations

import json
import sys

# ``python -m`` would look into the current directory first, and run a ``mesh.py`` that lies there.
_RUN = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def command_of(module: str, *arguments: str) -> list[str]:
    """``python -m module arguments``, but for where it finds modules: where this process does."""
    return [sys.executable, "-P", "-c", _RUN, json.dumps(sys.path), module, *arguments]
