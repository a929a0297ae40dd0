"""RMSNorm.

Legend: D hidden size (or size of a head).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mesh import native


class RmsNorm:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension.

    A weight of more dimensions holds one weight for each head: ``x_THD`` with ``weight_HD``.
    """

    def __init__(self, weight_D: Tensor, eps: float) -> None:
        self.weight_D = weight_D.contiguous()
        self.eps = eps
        self._on_cpu = weight_D.device.type == "cpu" and weight_D.dtype == torch.float32

    def goes_by_kernel(self, x: Tensor) -> bool:
        """Whether kernels of ours take it, by itself or with what comes before or behind."""
        return x.is_cuda and x.dim() == 2 and x.is_contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        if self._on_cpu:
            # Compiled: for a few rows, a tensor library's calls cost more than the work.
            x = x.contiguous()
            y = torch.empty_like(x)
            size = self.weight_D.shape[-1]
            native.short.rms_norm(
                x.data_ptr(),
                x.numel() // size,
                self.weight_D.data_ptr(),
                self.weight_D.numel() // size,
                size,
                self.eps,
                y.data_ptr(),
            )
            return y
        if self.goes_by_kernel(x):
            from gateway.model import gpu_kernels

            return gpu_kernels.rms_norm(x, self)
        if self.weight_D.dim() == 1:
            return F.rms_norm(x, self.weight_D.shape, self.weight_D, self.eps)
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).mul_(self.weight_D)
