"""How a tensor is cut on its way to a device."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mesh.upload import fill, pieces


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    max_bytes=st.integers(4, 64),
    turned=st.booleans(),
)
def test_pieces_are_small_and_cover_everything_once(
    shape: list[int], max_bytes: int, turned: bool
) -> None:
    source = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    target = torch.zeros(shape[::-1]).permute(*range(len(shape))[::-1]) if turned else source * 0
    for to, part in pieces(target, source, max_bytes):
        assert to.shape == part.shape
        assert to.numel() * to.element_size() <= max_bytes
        to += part
    assert torch.equal(target, source)


def test_what_is_empty_has_no_pieces() -> None:
    assert list(pieces(torch.zeros(0, 3), torch.zeros(0, 3), 8)) == []


def test_on_a_cpu_it_is_a_copy_that_converts() -> None:
    target = torch.zeros(2, 3, dtype=torch.bfloat16)
    fill(target, torch.ones(2, 3))
    assert target.sum() == 6
