"""The MLP of routed experts, shared experts and dense layers.

Legend: R rows, D hidden size of the model, H hidden size of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mesh import native
from mesh.checkpoint import Checkpoint
from mesh.linear import NATIVE_BYTES, linear
from mesh.model_config import SwigluClamp

if TYPE_CHECKING:
    from mesh.gpu_kernels import Messages

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

    def tensors(self) -> dict[str, Tensor]:
        """Its weights by name, contiguous: what another process makes the same MLP of."""
        ...


class TwoMatrices:
    """A matrix on either side of what is between them."""

    gate: str | None = None
    """What a kernel may do at once with the first matrix; None: nothing."""
    _between: Callable[[Tensor], Tensor]

    def __init__(self, into_HD: Tensor, down_DH: Tensor) -> None:
        self._into_HD = into_HD
        self._down_DH = down_DH

    def __call__(self, x_RD: Tensor) -> Tensor:
        return linear(self._between(linear(x_RD, self._into_HD)), self._down_DH)

    def replace(self, x_RD: Tensor) -> None:
        """The rows by their outputs."""
        if x_RD.is_cuda:
            hidden_RH = self._between(linear(x_RD, self._into_HD))
            linear(hidden_RH, self._down_DH, out_RO=x_RD)
        else:
            x_RD.copy_(self(x_RD))


class PlainMlp(TwoMatrices):
    """Two matrices with an activation between them."""

    def __init__(self, up_HD: Tensor, down_DH: Tensor, activation: str) -> None:
        super().__init__(up_HD, down_DH)
        self._between = _ACTIVATIONS[activation]

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Mlp`."""
        return {"up": self._into_HD, "down": self._down_DH}


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


class GatedMlp(TwoMatrices):
    """``down(act(gate(x)) * up(x))``; gate and up lie in one matrix, gate first: one GEMM."""

    def __init__(self, gate_up_HD: Tensor, down_DH: Tensor, activation: str) -> None:
        super().__init__(gate_up_HD, down_DH)
        self._between = _gate_on(gate_up_HD.device, activation)
        self.gate = activation if _in_one_pass(gate_up_HD.device, activation) else None
        self.native: NativeMlp | None = None
        if (
            _ACTIVATIONS[activation] is F.silu
            and down_DH.device.type == "cpu"
            and down_DH.dtype == torch.float32
            and gate_up_HD.nbytes + down_DH.nbytes <= NATIVE_BYTES
        ):
            self.native = NativeMlp(gate_up_HD.contiguous(), down_DH.contiguous())

    def __call__(self, x_RD: Tensor) -> Tensor:
        if self.native is not None:
            return self.native(x_RD)
        return super().__call__(x_RD)

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Mlp`."""
        return {"gate_up": self._into_HD, "down": self._down_DH}


def _in_one_pass(device: torch.device, activation: str) -> bool:
    if device.type != "cuda":
        return False
    from mesh import gpu_kernels

    return gpu_kernels.gates(activation)


def _gate_on(device: torch.device, activation: str) -> Callable[[Tensor], Tensor]:
    """``act(gate) * up`` of the two side by side; on a GPU in one pass over them."""
    act = _ACTIVATIONS[activation]
    if _in_one_pass(device, activation):
        from mesh import gpu_kernels

        return lambda gate_up_RH: gpu_kernels.gated(gate_up_RH, activation)

    def gate(gate_up_RH: Tensor) -> Tensor:
        gate_RH, up_RH = gate_up_RH.chunk(2, dim=-1)
        return act(gate_RH).mul_(up_RH)

    return gate


_FEW_ROWS = 64
"""Of an expert, on average: up to here a grouped GEMM of ours, which reads weights as fast as the
memory gives them, is quicker than torch's, which is bfloat16's alone (of 8 experts of 4096 x 16384
with 48 rows each 806 to 1097 us on an H200, with 96 rows 1130 to 980)."""
_SMALL_BYTES = 16 << 20
"""Of an expert's matrix: an H200's second cache has 50 MB."""


class StackedMlps:
    """MLPs of one layer and kind as one: a grouped GEMM a matrix, however many there are.

    Their weights move into one tensor each, of which the MLPs keep views.
    """

    _into_HD: Tensor
    _down_DH: Tensor

    def __init__(self, mlps: Mapping[int, PlainMlp | GatedMlp]) -> None:
        first = next(iter(mlps.values()))
        self._between, self._gate = first._between, first.gate
        device = first._into_HD.device
        self._here_G = torch.tensor(list(mlps), dtype=torch.int32, device=device)
        for name in ("_into_HD", "_down_DH"):
            like = getattr(first, name)
            stack = torch.empty(len(mlps), *like.shape, dtype=like.dtype, device=device)
            for place, mlp in zip(stack, mlps.values(), strict=True):
                place.copy_(getattr(mlp, name))
                setattr(mlp, name, place)
            setattr(self, name, stack)

    @classmethod
    def of(cls, mlps: Mapping[int, Any]) -> StackedMlps | None:
        """The MLPs by their index in the layer; None where no grouped kernel takes them."""
        if {type(mlp) for mlp in mlps.values()} not in ({PlainMlp}, {GatedMlp}):
            return None
        weights = [mlp._into_HD for mlp in mlps.values()]
        if not all(w.is_cuda and w.dtype in (torch.bfloat16, torch.float16) for w in weights):
            return None
        return cls(dict(sorted(mlps.items())))

    def __call__(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """``y_RD`` of rows in order of expert, with how many each has: int32, on the device.

        Counts that do not add up are nobody's harm: rows past them come back as anything.
        """
        from mesh.gpu_kernels import Messages

        x_RD = x_RD.contiguous()
        if self._are_many(len(x_RD)):
            return self._in_order(x_RD, counts_E)
        y_RD = torch.empty_like(x_RD)
        messages = Messages(counts_E, 0, self._here_G, len(counts_E), 1, len(x_RD), 0)
        self._compute(x_RD, messages, y_RD)
        return y_RD

    def answer(
        self, buffer_RD: Tensor, header_rows: int, on_host_E: Tensor, in_place: bool = True
    ) -> Tensor | None:
        """Replace the rows of a message by the outputs. It has its counts (int32) in
        ``header_rows`` ahead of its rows; they go to the host, too. Where they need not be
        ``in_place``, the outputs may be returned instead."""
        messages = self._messages(buffer_RD, header_rows, 1, len(on_host_E))
        if self._are_many(len(buffer_RD)):
            rows_RD = buffer_RD[header_rows:]
            answers_RD = self._in_order_of(messages, rows_RD, on_host_E)
            if not in_place:
                return answers_RD
            rows_RD.copy_(answers_RD)
            return None
        self._compute(buffer_RD, messages, buffer_RD, on_host_E)
        return None

    def deliver(
        self, buffer_RD: Tensor, header_rows: int, on_host_PE: Tensor, to_P4: Tensor
    ) -> None:
        """The outputs of P messages, equal parts of the buffer, go where ``to_P4`` says; see
        :func:`mesh.gpu_kernels.grouped_out`. All else as with :meth:`answer`."""
        parts, num_experts = on_host_PE.shape
        messages = self._messages(buffer_RD, header_rows, parts, num_experts)
        if parts == 1 and self._are_many(len(buffer_RD)):
            from mesh.gpu_kernels import deliver

            deliver(self._in_order_of(messages, buffer_RD[header_rows:], on_host_PE[0]), to_P4)
        else:
            self._compute(buffer_RD, messages, buffer_RD, on_host_PE, to_P4)

    def _messages(
        self, buffer_RD: Tensor, header_rows: int, parts: int, num_experts: int
    ) -> Messages:
        from mesh.gpu_kernels import Messages

        counts = buffer_RD.view(-1).view(torch.int32)
        stride = len(buffer_RD) // parts
        step = stride * len(counts) // len(buffer_RD)
        return Messages(counts, step, self._here_G, num_experts, parts, stride, header_rows)

    def _in_order_of(self, messages: Messages, rows_RD: Tensor, on_host_E: Tensor) -> Tensor:
        counts_E = messages.counts[: messages.num_experts]
        on_host_E.copy_(counts_E, non_blocking=True)
        return self._in_order(rows_RD, counts_E)

    def _are_many(self, num_rows: int) -> bool:
        some_kernel = self._small or self._into_HD.dtype == torch.bfloat16
        return some_kernel and num_rows > _FEW_ROWS * len(self._here_G)

    @cached_property
    def _small(self) -> bool:
        """Whether a GPU that copies tiles by itself holds a few of its experts in its cache."""
        if torch.cuda.get_device_capability(self._into_HD.device) < (9, 0):
            return False
        largest = max(self._into_HD[0].nbytes, self._down_DH[0].nbytes)
        aligned = all(w.stride(-2) * w.itemsize % 16 == 0 for w in (self._into_HD, self._down_DH))
        return largest <= _SMALL_BYTES and aligned

    def _in_order(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        from mesh.gpu_kernels import group_ends, ordered

        if self._small:
            hidden_RH = ordered(x_RD, counts_E, self._here_G, self._into_HD, self._gate)
            if self._gate is None:
                hidden_RH = self._between(hidden_RH)
            return ordered(hidden_RH, counts_E, self._here_G, self._down_DH)
        ends_G = group_ends(counts_E, self._here_G, len(x_RD))
        hidden_RH = F.grouped_mm(x_RD, self._into_HD.transpose(1, 2), offs=ends_G)
        return F.grouped_mm(self._between(hidden_RH), self._down_DH.transpose(1, 2), offs=ends_G)

    def _compute(
        self,
        x_RD: Tensor,
        messages: Messages,
        out_RD: Tensor,
        on_host: Tensor | None = None,
        to_P4: Tensor | None = None,
    ) -> None:
        from mesh.gpu_kernels import grouped_in, grouped_out

        hidden_RH = grouped_in(x_RD, messages, self._into_HD, self._gate, on_host)
        if self._gate is None:
            hidden_RH = self._between(hidden_RH)
        grouped_out(hidden_RH, messages, self._down_DH, out_RD, to_P4)


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
        gate_up_RH = linear(x_RD, self._gate_up_HD, self._gate_up_bias_H)
        gate_RH, up_RH = gate_up_RH.chunk(2, dim=-1)
        gate_RH = gate_RH.clamp(max=limit)
        hidden_RH = up_RH.clamp(-limit, limit).add_(1).mul_(gate_RH)
        hidden_RH.mul_(gate_RH.mul_(alpha).sigmoid_())
        return linear(hidden_RH, self._down_DH, self._down_bias_D)

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Mlp`."""
        return {
            "gate_up": self._gate_up_HD,
            "gate_up_bias": self._gate_up_bias_H,
            "down": self._down_DH,
            "down_bias": self._down_bias_D,
        }


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
