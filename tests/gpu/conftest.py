"""Tests that need a GPU say so where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.device import INTERPRETED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available() and not (
                INTERPRETED and item.path.name == "test_kernels.py"
            ):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
