"""Which variant of a kernel is launched, on a stand-in for Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mesh.launch import Launcher


class Variant:
    packed_metadata = "metadata"

    def __init__(self, launched: list[Any], name: str) -> None:
        self._launched = launched
        self.function = name

    def run(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        metadata, launch_metadata, enter_hook, exit_hook, *arguments = rest
        assert (metadata, launch_metadata, enter_hook, exit_hook) == ("metadata", None, None, None)
        self._launched.append((function, (x, y, z), tuple(arguments)))


class Kernel:
    """Compiles, as Triton does at a launch, and says which variant that was."""

    def __init__(self) -> None:
        self.launched: list[Any] = []
        self.compiled: list[Any] = []

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., Variant]:
        def launch(*arguments: Any) -> Variant:
            self.compiled.append((grid, arguments))
            return Variant(self.launched, f"variant {len(self.compiled)}")

        return launch


@pytest.fixture(autouse=True)
def one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.launch._stream_of", lambda device: 0)


def test_a_variant_is_compiled_once_and_launched_by_addresses() -> None:
    kernel = Kernel()
    launch = Launcher(kernel)
    x, y = torch.zeros(8), torch.zeros(4, dtype=torch.int32)
    launch((3, 1), (x, y), varying=(7,), fixed=(64,), constants=(128, True))
    launch((5, 2), (y.float(), y), varying=(9,), fixed=(64,), constants=(128, True))
    launch((6, 1), (x, y), varying=(8,), fixed=(64,), constants=(128, True))
    assert kernel.compiled[0] == ((3, 1), (x, y, 7, 64, 128, True))
    assert kernel.launched[-1] == (
        "variant 1",
        (6, 1, 1),
        (x.data_ptr(), y.data_ptr(), 8, 64, 128, True),
    )


def test_what_tells_variants_apart() -> None:
    kernel = Kernel()
    launch = Launcher(kernel)
    x = torch.zeros(16)
    for tensor, fixed, constant in (
        (x, 64, 1),
        (x.double(), 64, 1),
        (x[1:], 64, 1),
        (x, 65, 1),
        (x, 64, 2),
    ):
        launch((1, 1), (tensor,), fixed=(fixed,), constants=(constant,))
    assert len(kernel.compiled) == 5
    launch((1, 1), (x[4:],), fixed=(64,), constants=(1,))
    assert len(kernel.compiled) == 5
