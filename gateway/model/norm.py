"""RMSNorm.

Legend: D hidden size (or size of a head).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class RmsNorm:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension.

    A weight of more dimensions holds one weight for each head: ``x_THD`` with ``weight_HD``.
    """

    def __init__(self, weight_D: Tensor, eps: float) -> None:
        size = weight_D.shape[-1]
        self._weight_D = weight_D
        self._eps = eps
        self._on_cpu = weight_D.device.type == "cpu" and weight_D.dtype == torch.float32
        self._scaled_weight_D = weight_D * size**0.5
        self._floor = torch.tensor((size * eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        if self._on_cpu:
            # The same number from four kernels instead of the eight that F.rms_norm takes there:
            # sqrt(sum(x²) + D * eps) is the hypotenuse of |x| and a constant.
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return (x / torch.hypot(length, self._floor)).mul_(self._scaled_weight_D)
        if self._weight_D.dim() == 1:
            return F.rms_norm(x, self._weight_D.shape, self._weight_D, self._eps)
        return F.rms_norm(x, x.shape[-1:], eps=self._eps).mul_(self._weight_D)
