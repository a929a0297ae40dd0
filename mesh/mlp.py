"""The MLP of routed experts, shared experts and dense layers.

Legend: R rows, D hidden size of the model, H hidden size of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mesh import native
from mesh.checkpoint import Checkpoint
from mesh.model_config import SwigluClamp

_NATIVE_BYTES = 8 << 20
"""Of weights: about what a core's caches hold. Larger ones are a tensor library's."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Mlp(Protocol):
    """Maps each row by itself: ``x_RD`` to ``y_RD`` of the same dtype and device."""

    def __call__(self, x_RD: Tensor) -> Tensor: ...


class PlainMlp:
    """Two matrices with an activation between them."""

    def __init__(self, up_HD: Tensor, down_DH: Tensor, activation: str) -> None:
        self._up_HD = up_HD
        self._down_DH = down_DH
        self._act = _ACTIVATIONS[activation]

    def __call__(self, x_RD: Tensor) -> Tensor:
        return F.linear(self._act(F.linear(x_RD, self._up_HD)), self._down_DH)


class NativeMlp:
    """A gated SiLU MLP of float32 on a CPU, compiled for experts so small that calling into a
    tensor library costs more than computing: see ``native/mlp.c``.

    A row's result does not depend on the rows beside it.
    """

    def __init__(self, gate_up_HD: Tensor, down_DH: Tensor) -> None:
        width, hidden = down_DH.shape
        self.handle: int | None = native.short.gated_mlp_new(
            gate_up_HD.data_ptr(), down_DH.data_ptr(), width, hidden
        )
        if not self.handle:
            raise MemoryError(f"there is no memory for an expert of {width} x {hidden}")

    def __del__(self) -> None:
        if self.handle:
            native.short.gated_mlp_free(self.handle)

    def __call__(self, x_RD: Tensor) -> Tensor:
        x_RD = x_RD.contiguous()
        y_RD = torch.empty_like(x_RD)
        rows = len(x_RD)
        scratch = torch.empty(native.short.gated_mlp_scratch_floats(self.handle, rows))
        native.long.gated_mlp_run(
            self.handle, x_RD.data_ptr(), y_RD.data_ptr(), rows, scratch.data_ptr()
        )
        return y_RD


class GatedMlp:
    """``down(act(gate(x)) * up(x))``; gate and up lie in one matrix, gate first: one GEMM."""

    def __init__(self, gate_up_HD: Tensor, down_DH: Tensor, activation: str) -> None:
        self._gate_up_HD = gate_up_HD
        self._down_DH = down_DH
        self._act = _ACTIVATIONS[activation]
        self.native: NativeMlp | None = None
        if (
            self._act is F.silu
            and down_DH.device.type == "cpu"
            and down_DH.dtype == torch.float32
            and gate_up_HD.nbytes + down_DH.nbytes <= _NATIVE_BYTES
        ):
            self.native = NativeMlp(gate_up_HD.contiguous(), down_DH.contiguous())

    def __call__(self, x_RD: Tensor) -> Tensor:
        if self.native is not None:
            return self.native(x_RD)
        gate_RH, up_RH = F.linear(x_RD, self._gate_up_HD).chunk(2, dim=-1)
        return F.linear(self._act(gate_RH).mul_(up_RH), self._down_DH)


class ClampedMlp:
    """gpt-oss's gated MLP, with biases; see :class:`mesh.model_config.SwigluClamp`."""

    def __init__(
        self,
        gate_up_HD: Tensor,
        gate_up_bias_H: Tensor,
        down_DH: Tensor,
        down_bias_D: Tensor,
        clamp: SwigluClamp,
    ) -> None:
        self._gate_up_HD = gate_up_HD
        self._gate_up_bias_H = gate_up_bias_H
        self._down_DH = down_DH
        self._down_bias_D = down_bias_D
        self._clamp = clamp

    def __call__(self, x_RD: Tensor) -> Tensor:
        alpha, limit = self._clamp.alpha, self._clamp.limit
        gate_up_RH = F.linear(x_RD, self._gate_up_HD, self._gate_up_bias_H)
        gate_RH, up_RH = gate_up_RH.chunk(2, dim=-1)
        gate_RH = gate_RH.clamp(max=limit)
        hidden_RH = up_RH.clamp(-limit, limit).add_(1).mul_(gate_RH)
        hidden_RH.mul_(gate_RH.mul_(alpha).sigmoid_())
        return F.linear(hidden_RH, self._down_DH, self._down_bias_D)


def load_gated(
    checkpoint: Checkpoint,
    names: tuple[str, str, str],
    hidden_size: int,
    mlp_hidden_size: int,
    activation: str,
    device: torch.device | str,
    dtype: torch.dtype,
) -> GatedMlp:
    """Read an MLP that is stored as three tensors, ``names`` of gate, up and down."""
    gate, up, down = names
    inner = (mlp_hidden_size, hidden_size)
    gate_up_HD = torch.empty(2 * mlp_hidden_size, hidden_size, device=device, dtype=dtype)
    gate_up_HD[:mlp_hidden_size] = checkpoint.tensor(gate, inner)
    gate_up_HD[mlp_hidden_size:] = checkpoint.tensor(up, inner)
    down_DH = checkpoint.tensor(down, inner[::-1], device=device, dtype=dtype)
    return GatedMlp(gate_up_HD, down_DH, activation)


def load_plain(
    checkpoint: Checkpoint,
    names: tuple[str, str],
    hidden_size: int,
    mlp_hidden_size: int,
    activation: str,
    device: torch.device | str,
    dtype: torch.dtype,
) -> PlainMlp:
    """Read an MLP that is stored as two tensors, ``names`` of up and down."""
    inner = (mlp_hidden_size, hidden_size)
    up_HD, down_DH = (
        checkpoint.tensor(name, shape, device=device, dtype=dtype)
        for name, shape in zip(names, (inner, inner[::-1]), strict=True)
    )
    return PlainMlp(up_HD, down_DH, activation)
