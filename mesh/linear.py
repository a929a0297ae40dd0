"""A matrix product, compiled where a tensor library's call costs more than the work.

Legend: R rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mesh import native

NATIVE_BYTES = 8 << 20
"""Of weights: about what a core's caches hold. Larger ones are the tensor library's."""


def linear(
    x_RI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    plus_RO: Tensor | None = None,
    out_RO: Tensor | None = None,
) -> Tensor:
    """``x_RI @ weight_OI.T``, with a bias and with ``plus_RO``, in ``out_RO`` where that is given.

    Of one row on a GPU, not in float32, by :func:`mesh.gpu_kernels.row_times`.
    """
    if _is_row(x_RI, weight_OI):
        from mesh.gpu_kernels import row_times

        return row_times(x_RI.contiguous(), weight_OI, bias_O, plus_RO, out_RO)
    if plus_RO is None and out_RO is None:
        return F.linear(x_RI, weight_OI, bias_O)
    if plus_RO is None:
        y_RO = torch.mm(x_RI, weight_OI.t(), out=out_RO)
    else:
        y_RO = torch.addmm(plus_RO, x_RI, weight_OI.t(), out=out_RO)
    return y_RO if bias_O is None else y_RO.add_(bias_O)


def _is_row(x_RI: Tensor, weight_OI: Tensor) -> bool:
    if not x_RI.is_cuda or len(x_RI) != 1 or x_RI.itemsize != 2 or not weight_OI.is_contiguous():
        return False
    from mesh.gpu_kernels import LONGEST_ROW

    return weight_OI.shape[1] <= LONGEST_ROW


class Linear:
    """``x_RI @ weight_OI.T + bias_O``.

    Of small matrices in float32 on a CPU by ``native/linear.c``, where a row's result does not
    depend on the rows beside it.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self._weight_OI = weight_OI
        self._bias_O = bias_O
        self._handle: int | None = None
        if (
            weight_OI.device.type == "cpu"
            and weight_OI.dtype == torch.float32
            and weight_OI.nbytes <= NATIVE_BYTES
        ):
            packed_OI = weight_OI.contiguous()
            self._handle = native.short.linear_new(packed_OI.data_ptr(), *packed_OI.shape)
            if not self._handle:
                raise MemoryError(f"there is no memory for a matrix of {tuple(weight_OI.shape)}")

    def __del__(self) -> None:
        if self._handle:
            native.short.linear_free(self._handle)

    def __call__(self, x_RI: Tensor, plus_RO: Tensor | None = None) -> Tensor:
        """``y_RO``, with the bias, and with ``plus_RO`` added where it is given; it may be ``y_RO``
        then, overwritten."""
        if self._handle is None:
            # On a GPU, a copy of it would be a kernel more.
            out_RO = plus_RO if plus_RO is not None and plus_RO.is_cuda else None
            return linear(x_RI, self._weight_OI, self._bias_O, plus_RO, out_RO)
        y_RO = self._multiply(self._handle, x_RI, plus_RO)
        return y_RO if self._bias_O is None else y_RO.add_(self._bias_O)

    def _multiply(self, handle: int, x_RI: Tensor, plus_RO: Tensor | None) -> Tensor:
        x_RI = x_RI.contiguous()
        y_RO = x_RI.new_empty(len(x_RI), len(self._weight_OI))
        if plus_RO is not None:
            plus_RO = plus_RO.contiguous()
        native.long.linear_run(
            handle,
            x_RI.data_ptr(),
            None if plus_RO is None else plus_RO.data_ptr(),
            y_RO.data_ptr(),
            len(x_RI),
        )
        return y_RO
