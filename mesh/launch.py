"""Launch Triton kernels for little more than what the driver takes.

A launch through ``triton.jit`` looks at every argument each time, to find the variant that was
compiled for such: 50 to 90 us on a slow core, where the kernels themselves take 3 to 10. Here the
caller says what tells variants apart, and the variant that came of it is launched again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_ALIGNED = 16
"""Bytes: Triton compiles for pointers that are, and for others."""


class Launcher:
    """One kernel, whose arguments are tensors, then ``varying`` integers, then ``fixed`` ones, then
    constants. The varying ones must be named in the kernel's ``do_not_specialize``."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._variants: dict[tuple[Any, ...], Any] = {}

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
        variant = self._variants.get(key)
        if variant is None:
            # None comes of Triton's interpreter, which has no variants.
            arguments = (*tensors, *varying, *fixed, *constants)
            self._variants[key] = self._kernel[grid](*arguments)
        else:
            variant[*grid, 1](*addresses, *varying, *fixed, *constants)
