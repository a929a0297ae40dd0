"""Attention over pages, held against attention over the whole sequence at once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.model import attention
from gateway.model.attention import KvLayout, PagedAttention
from gateway.model.batch import SequenceSlice
from gateway.model.kv_cache import KvCache
from gateway.model.norm import RmsNorm
from mesh.model_config import GroupedAttention, ModelConfig, RopeConfig, RouterConfig

BLOCK = 4


def config(num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 8) -> ModelConfig:
    """A model of one layer, of which only the attention's sizes matter here."""
    return ModelConfig(
        family="test",
        hidden_size=8,
        num_layers=1,
        vocab_size=8,
        max_model_len=64,
        num_experts=2,
        experts_per_token=1,
        moe_layers=(0,),
        expert_hidden_size=8,
        expert_kind="plain",
        dtype="float32",
        eos_token_ids=(),
        fingerprint="",
        attention=GroupedAttention(num_heads, num_kv_heads, head_dim, scale=head_dim**-0.5),
        windows=(None,),
        rope=RopeConfig("default", 1e4, head_dim, 64),
        router=RouterConfig(),
        norm_eps=1e-6,
        activation="relu",
    )


def layout(model: ModelConfig) -> KvLayout:
    """Keys of all heads, then values of all heads."""
    heads = model.attention
    assert isinstance(heads, GroupedAttention)
    size = heads.num_kv_heads * heads.head_dim
    return KvLayout(
        heads.kv_width, heads.num_kv_heads, heads.head_dim, heads.head_dim, size, heads.scale
    )


def dense(
    q_HK: torch.Tensor, kv_LW: torch.Tensor, model: ModelConfig, window: int | None, sinks_H
) -> torch.Tensor:
    """The last position's attention over all of its sequence, head by head, without a library."""
    heads = model.attention
    assert isinstance(heads, GroupedAttention)
    k_JLK, v_JLK = kv_LW.view(len(kv_LW), 2, heads.num_kv_heads, heads.head_dim).permute(1, 2, 0, 3)
    out = []
    for head, q_K in enumerate(q_HK):
        shared = head * heads.num_kv_heads // heads.num_heads
        first = 0 if window is None else max(0, len(kv_LW) - window)
        scores = (k_JLK[shared, first:] @ q_K * heads.scale).exp()
        rest = 0.0 if sinks_H is None else sinks_H[head].exp()
        out.append(scores @ v_JLK[shared, first:] / (scores.sum() + rest))
    return torch.stack(out)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 13), st.integers(1, 9)), min_size=1, max_size=5),
    window=st.sampled_from([None, 1, 3, 4, 6]),
    with_sinks=st.booleans(),
    kv_heads=st.sampled_from([1, 2, 4]),
    tile=st.sampled_from([1, 2048, 1 << 30]),
    seed=st.integers(0, 1 << 16),
)
def test_pages_hold_what_the_sequence_holds(lengths, window, with_sinks, kv_heads, tile, seed):
    """Any mix of decoding and prefilling sequences, in any blocks, equals dense attention."""
    generator = torch.Generator().manual_seed(seed)
    model = config(num_kv_heads=kv_heads)
    needed = [-(-(cached + new) // BLOCK) for cached, new in lengths]
    order = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    kv = KvCache(model, len(order), BLOCK, "cpu", torch.float32)
    sequences, slices = [], []
    for (cached, new), blocks in zip(lengths, needed, strict=True):
        table = tuple(order.pop() for _ in range(blocks))
        slices.append(SequenceSlice(cached, new, table))
        kv_LW = torch.randn(cached + new, kv.rows[0].shape[1], generator=generator)
        sequences.append(kv_LW)
        for position in range(cached):
            row = table[position // BLOCK] * BLOCK + position % BLOCK
            kv.rows[0][row] = kv_LW[position]
    for block in order:
        kv.pages[0][block] = torch.nan  # what another request left behind
    num_tokens = sum(new for _, new in lengths)
    q_THK = torch.randn(num_tokens, 4, 8, generator=generator)
    sinks_H = torch.randn(4, generator=generator) if with_sinks else None

    before, attention._TILE_BYTES = attention._TILE_BYTES, tile
    try:
        paged = PagedAttention(slices, kv, {window}, with_sinks)
    finally:
        attention._TILE_BYTES = before
    new_rows = [one[-new:] for one, (_, new) in zip(sequences, lengths, strict=True)]
    paged.store(0, torch.cat(new_rows))
    out_THV = paged(0, q_THK, layout(model), window, sinks_H)

    token = 0
    for (cached, new), kv_LW in zip(lengths, sequences, strict=True):
        for position in range(cached, cached + new):
            assert paged.positions_T[token] == position
            expected = dense(q_THK[token], kv_LW[: position + 1], model, window, sinks_H)
            torch.testing.assert_close(out_THV[token], expected, rtol=1e-4, atol=1e-5)
            token += 1


def test_a_lone_token_attends_to_itself():
    model = config()
    kv = KvCache(model, 1, BLOCK, "cpu", torch.float32)
    paged = PagedAttention([SequenceSlice(0, 1, (0,))], kv, {None}, sinks=False)
    row_TW = torch.arange(32.0)[None]
    paged.store(0, row_TW)
    out_THV = paged(0, torch.ones(1, 4, 8), layout(model))
    assert out_THV[0, 0].tolist() == row_TW[0, 16:24].tolist()
    assert out_THV[0, 3].tolist() == row_TW[0, 24:32].tolist()


def test_blocks_cost_what_they_take():
    model = config()
    kv = KvCache(model, 3, BLOCK, "cpu", torch.float16)
    taken = sum(page.nbytes for page in kv.pages)
    assert KvCache.bytes_per_block(model, BLOCK, torch.float16) * (3 + 1) == taken


@pytest.mark.parametrize("shape", [(8,), (3, 8)])
def test_rms_norm_is_its_formula(shape):
    x = torch.randn(2, *shape)
    weight = torch.rand(shape)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
    torch.testing.assert_close(RmsNorm(weight, 0.1)(x), expected)
    half = RmsNorm(weight.bfloat16(), 0.1)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.03, atol=0.03)


def test_rms_norm_of_zeros_is_zero():
    assert RmsNorm(torch.ones(4), 1e-6)(torch.zeros(1, 4)).tolist() == [[0.0] * 4]
    assert math.isfinite(RmsNorm(torch.ones(4), 1e-6)(torch.full((1, 4), 1e18)).sum())
