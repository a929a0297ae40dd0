"""Launch Triton kernels for little more than what the driver takes.

A launch through ``triton.jit`` looks at every argument each time, to find the variant that was
compiled for such: 50 to 90 us on a slow core, where the kernels themselves take 3 to 10. Here the
caller says what tells variants apart, and the variant that came of it is launched again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_stream_of = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
_ALIGNED = 16
"""Bytes: Triton compiles for pointers that are, and for others."""


class Launcher:
    """One kernel, whose arguments are tensors, then ``varying`` integers, then ``fixed`` ones, then
    constants. The varying ones must be named in the kernel's ``do_not_specialize``."""

    def __init__(self, kernel: Any, **options: Any) -> None:
        """``options`` are Triton's own, such as ``num_warps``."""
        self._kernel = kernel
        self._options = options
        self._launches: dict[tuple[Any, ...], Callable[..., None] | None] = {}

    def __call__(
        self,
        grid: tuple[int, int],
        tensors: Sequence[Tensor],
        varying: tuple[int, ...] = (),
        fixed: tuple[int, ...] = (),
        constants: tuple[Any, ...] = (),
    ) -> None:
        """Launch on the current stream of the tensors' device, which must be the current one."""
        first = tensors[0]
        addresses, together = [], 0
        for tensor in tensors:
            address = tensor.data_ptr()
            together |= address
            addresses.append(address)
        key = (
            first.device.index,
            together % _ALIGNED == 0,
            fixed,
            constants,
            *[tensor.dtype for tensor in tensors],
        )
        launch = self._launches.get(key)
        if launch is None:
            # None comes of Triton's interpreter, which has no variants.
            variant = self._kernel[grid](*tensors, *varying, *fixed, *constants, **self._options)
            self._launches[key] = None if variant is None else _launch_of(variant)
        else:
            launch(grid, _stream_of(first.device.index), *addresses, *varying, *fixed, *constants)


def _launch_of(variant: Any) -> Callable[..., None]:
    """What ``variant[grid](...)`` does each time, as far as nobody has hooks on launches."""
    run, function, metadata = variant.run, variant.function, variant.packed_metadata

    def launch(grid: tuple[int, int], stream: int, *arguments: Any) -> None:
        run(*grid, 1, stream, function, metadata, None, None, None, *arguments)

    return launch
