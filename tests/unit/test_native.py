"""The compiled MLP against torch, and what the C files take for granted of the wire."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mesh import native, wire
from mesh.mlp import GatedMlp

SOURCE = Path(native.__file__).parent


def gated(hidden_size: int, mlp_hidden_size: int, activation: str = "silu") -> GatedMlp:
    generator = torch.Generator().manual_seed(hidden_size)
    gate_up_HD = torch.randn(2 * mlp_hidden_size, hidden_size, generator=generator)
    down_DH = torch.randn(hidden_size, mlp_hidden_size, generator=generator)
    return GatedMlp(gate_up_HD / hidden_size**0.5, down_DH / mlp_hidden_size**0.5, activation)


# Widths that are no multiple of a vector, and row counts on both sides of a block of six.
@pytest.mark.parametrize(("hidden_size", "mlp_hidden_size"), [(128, 88), (8, 3), (37, 50)])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13])
def test_the_compiled_mlp_computes_what_torch_does(
    hidden_size: int, mlp_hidden_size: int, rows: int
) -> None:
    mlp = gated(hidden_size, mlp_hidden_size)
    assert mlp.native is not None
    x_RD = torch.randn(rows, hidden_size) * 4
    y_RD = mlp(x_RD)
    mlp.native = None
    torch.testing.assert_close(y_RD, mlp(x_RD), rtol=2e-5, atol=2e-5)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    mlp = gated(96, 40)
    x_RD = torch.randn(11, 96)
    together_RD = mlp(x_RD)
    assert all(torch.equal(mlp(x_RD[r : r + 1])[0], together_RD[r]) for r in range(11))


def test_silu_has_no_end_at_which_it_breaks() -> None:
    one = torch.ones(1, 1)
    mlp = GatedMlp(torch.ones(2, 1), one, "silu")
    x_RD = torch.tensor([[-1e30], [-200.0], [-88.0], [0.0], [88.0], [200.0]])
    torch.testing.assert_close(mlp(x_RD), F.silu(x_RD) * x_RD)


def test_what_it_cannot_do_is_left_to_torch() -> None:
    assert gated(8, 8, "gelu").native is None
    assert GatedMlp(torch.ones(8, 4).bfloat16(), torch.ones(4, 4).bfloat16(), "silu").native is None
    assert gated(2048, 1024).native is None


def test_the_c_files_read_the_same_frames() -> None:
    text = (SOURCE / "answering.c").read_text()
    constants = dict(re.findall(r"(\w+) = (1 << \w+|\d+)", text))
    assert int(constants["DISPATCH"]) == wire.Kind.DISPATCH
    assert int(constants["REPLY"]) == wire.Kind.REPLY
    assert wire.expert_key(1, 0) == 1 << int(constants["EXPERT_BITS"])
    tag = wire.encode(wire.Kind.DISPATCH, 0xABCD, 0x12, 3, 5, 77)
    assert tag >> 44 & 0xFFFF == 0xABCD
    assert tag >> 16 & 0xFFFFF == wire.expert_key(3, 5)
    reply = wire.encode(wire.Kind.REPLY, 7, 0x12, 3, 5, 77)
    assert wire.Kind.REPLY << 60 | 7 << 44 | tag & 0xFFFFFFFFFFF == reply
