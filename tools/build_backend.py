"""setuptools, and a C compiler from the package index for machines that have none."""

from __future__ import annotations

import shutil
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

_COMPILER = [] if any(map(shutil.which, ("cc", "gcc", "clang"))) else ["ziglang>=0.13"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """See PEP 517."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _COMPILER


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """See PEP 660."""
    return build_meta.get_requires_for_build_editable(config_settings) + _COMPILER
