"""Weights that go to a GPU in pieces."""

from __future__ import annotations

import pytest
import torch

from mesh import upload


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_piece_arrives_whatever_the_layout(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "PIECE_BYTES", 4096)
    monkeypatch.delattr(upload._kept, "buffers", raising=False)
    for shape in ((3,), (1, 70_000), (513, 129), (4, 33, 65)):
        source = torch.randn(shape)
        target = torch.zeros(shape, device="cuda", dtype=dtype)
        turned = torch.zeros(shape[::-1], device="cuda", dtype=dtype).permute(
            *range(len(shape))[::-1]
        )
        for one in (target, turned):
            upload.fill(one, source)
            assert torch.equal(one.cpu(), source.to(dtype))
    monkeypatch.delattr(upload._kept, "buffers", raising=False)
