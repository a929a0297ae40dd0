"""Each Triton kernel against the few lines of torch that say what it computes."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton", reason="kernels are written in Triton")

from gateway.asking import Tables
from gateway.gpu_kernels import combine, combine_and_norm, place, scatter, sort_by_expert
from gateway.model.batch import ForwardBatch, SequenceSlice
from gateway.model.decode_facts import DecodeFacts
from gateway.model.gpu_kernels import choose, num_splits, paged_decode, rms_norm, turn_and_store
from gateway.model.norm import RmsNorm
from gateway.model.rope import rotate_
from gateway.model.router import Router
from gateway.model.scores import NOT_A_NUMBER
from mesh.gpu_kernels import (
    Messages,
    deliver,
    gated,
    group_ends,
    grouped_in,
    grouped_out,
    ordered,
    row_times,
)
from mesh.linear import Linear
from mesh.mlp import GatedMlp, PlainMlp, StackedMlps
from mesh.model_config import RouterConfig
from tests.gpu.device import DEVICE, DTYPES, INTERPRETED, close

BLOCK = 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 8), (3, 700), (130, 1536)])
def test_gated_is_activation_times_up(dtype: torch.dtype, rows: int, hidden: int) -> None:
    gate_up = torch.randn(rows, 2 * hidden, device=DEVICE, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    close(gated(gate_up, "silu"), F.silu(gate) * up)
    close(gated(gate_up, "gelu_new"), F.gelu(gate, approximate="tanh") * up)


def through(x: torch.Tensor, matrix: torch.Tensor, activation: str | None) -> torch.Tensor:
    """What rows become by a matrix, of a gated expert with gate in front of up."""
    made = F.linear(x.double(), matrix.double())
    if activation is None:
        return made
    gate, up = made.chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") if activation == "gelu_new" else F.silu(gate)) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (37, 2048), (5120, 72), (3, 9000)])
@pytest.mark.parametrize("more", ["", "bias", "plus", "bias and plus"])
def test_a_row_is_multiplied(outputs: int, inputs: int, dtype: torch.dtype, more: str) -> None:
    x = torch.randn(1, inputs, device=DEVICE, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=DEVICE, dtype=dtype) * inputs**-0.5
    bias, plus = torch.randn(2, outputs, device=DEVICE, dtype=dtype)
    into = plus[None]
    bias, added = bias if "bias" in more else None, into if "plus" in more else None
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if added is not None:
        wanted += added
    made = row_times(x, weight, bias, added)
    close(made, wanted.to(dtype))
    assert row_times(x, weight, bias, added, into) is into is not made
    close(into, wanted.to(dtype))


@pytest.mark.skipif(DEVICE != "cuda", reason="of one row on a GPU")
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("inputs", [700, 20_000])
def test_a_matrix_of_a_gpu_multiplies_one_row_and_more(rows: int, inputs: int) -> None:
    x = torch.randn(rows, 2 * inputs, device=DEVICE, dtype=torch.bfloat16)[:, inputs:]
    weight = torch.randn(300, inputs, device=DEVICE, dtype=torch.bfloat16) * inputs**-0.5
    bias, plus = torch.randn(300, device=DEVICE).bfloat16(), torch.randn(rows, 300).bfloat16()
    wanted = F.linear(x.double(), weight.double(), bias.double())
    close(Linear(weight, bias)(x), wanted.bfloat16())
    close(Linear(weight, bias)(x, plus.to(DEVICE)), (wanted + plus.to(DEVICE)).bfloat16())


@pytest.mark.skipif(DEVICE != "cuda", reason="of one row on a GPU")
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", ["silu", "plain"])
def test_rows_are_replaced_by_what_an_expert_makes_of_them(rows: int, kind: str) -> None:
    x, into, down = (
        torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16) * shape[1] ** -0.5
        for shape in ((rows, 512), (2048, 512), (512, 1024 if kind == "silu" else 2048))
    )
    expert = PlainMlp(into, down, "silu") if kind == "plain" else GatedMlp(into, down, kind)
    hidden = through(x, into, kind if kind == "silu" else None)
    wanted = F.linear(hidden if kind == "silu" else F.silu(hidden), down.double())
    expert.replace(x)
    close(x, wanted.bfloat16())


HERE = [0, 2, 3, 6]
"""Of seven experts."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu", "gelu_new"])
@pytest.mark.parametrize(
    ("stride", "counts"),
    [
        (4, [[1, 0, 0, 0]]),
        (8, [[0, 2, 0, 1], [0, 0, 0, 0]]),
        (40, [[5, 0, 33, 1], [0, 1, 0, 0], [1, 2, 3, 4], [9, 9, 9, 9]]),
        (256, [[200, 0, 16, 30], [3, 100, 1, 17]]),
        (2000, [[700, 300, 900, 95]]),
    ],
    ids=str,
)
def test_rows_of_messages_go_through_their_experts_and_back(
    dtype: torch.dtype, activation: str | None, stride: int, counts: list[list[int]]
) -> None:
    width, hidden, ahead = 80, 144, 1
    parts, wide = len(counts), hidden if activation is None else 2 * hidden
    into = torch.randn(len(HERE), wide, width, device=DEVICE, dtype=dtype) / 9
    down = torch.randn(len(HERE), width, hidden, device=DEVICE, dtype=dtype) / 9
    x = torch.randn(parts * stride, width, device=DEVICE, dtype=dtype)
    before, words = x.clone(), x.view(-1).view(torch.int32)
    step = stride * len(words) // len(x)
    for part, of_part in enumerate(counts):
        said = torch.zeros(7, dtype=torch.int32)
        said[HERE] = torch.tensor(of_part, dtype=torch.int32)
        words[part * step : part * step + 7] = said.to(DEVICE)
    here_G = torch.tensor(HERE, dtype=torch.int32, device=DEVICE)
    messages = Messages(words, step, here_G, 7, parts, stride, ahead)
    on_host = torch.full((parts, 7), -1, dtype=torch.int32, pin_memory=DEVICE == "cuda")
    between = grouped_in(x, messages, into, activation, on_host)
    grouped_out(between, messages, down, x)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert on_host[:, HERE].tolist() == counts
    assert on_host.sum() == sum(map(sum, counts))
    place = 0
    begins = [part * stride + ahead for part in range(parts)]
    for expert in range(len(HERE)):
        for part, of_part in enumerate(counts):
            rows = slice(begins[part], begins[part] + of_part[expert])
            begins[part] = rows.stop
            want = through(before[rows], into[expert], activation)
            mine = slice(place, place + of_part[expert])
            place = mine.stop
            close(between[mine], want, of=dtype)
            close(x[rows], F.linear(between[mine].double(), down[expert].double()), of=dtype)
    for part, end in enumerate(begins):
        rest = slice(end, (part + 1) * stride)
        assert torch.equal(x[rest], before[rest])
    answers = torch.full((parts * stride, width), 7.0, device=DEVICE, dtype=dtype)
    firsts = [part * stride for part in reversed(range(parts))]
    spots = [Spot(answers, first, sum(of)) for first, of in zip(firsts, counts, strict=True)]
    grouped_out(between, messages, down, before, deliveries(*spots))
    for part, spot in enumerate(spots):
        rows = slice(part * stride + ahead, part * stride + ahead + spot.num_rows)
        assert torch.equal(answers[spot.first : spot.first + spot.num_rows], x[rows])
        assert (answers[spot.first + spot.num_rows : spot.first + stride] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.bfloat16, torch.half])
@pytest.mark.parametrize("activation", [None, "silu", "gelu_new"])
@pytest.mark.parametrize(
    ("counts", "hidden"), [([1, 0, 0, 130], 48), ([300, 128, 5, 0], 136), ([9, 400, -3, 1], 256)]
)
def test_many_rows_in_order_go_through_their_experts_matrices(
    counts: list[int], hidden: int, activation: str | None, dtype: torch.dtype
) -> None:
    width, rows = 80, 400  # fewer than some counts say
    weights = torch.randn(4, hidden * (2 if activation else 1), width, dtype=dtype) / 9
    weights = weights.to(DEVICE)
    x_RD = torch.randn(rows, width, device=DEVICE).to(dtype)
    said = torch.zeros(7, dtype=torch.int32)
    said[HERE] = torch.tensor(counts, dtype=torch.int32)
    here_G = torch.tensor(HERE, dtype=torch.int32, device=DEVICE)
    out_RN = ordered(x_RD, said.to(DEVICE), here_G, weights, activation)
    begin = 0
    for count, matrix in zip(counts, weights, strict=True):
        end = min(rows, begin + max(0, count))
        want = through(x_RD[begin:end], matrix, activation)
        if end > begin:
            close(out_RN[begin:end], want, of=dtype)
        begin = end


class Spot(NamedTuple):
    """Where outputs are to be, and what is allowed there."""

    answers: torch.Tensor
    first: int
    num_rows: int
    permit: torch.Tensor | None = None
    wanted: int = 5


def deliveries(*spots: Spot) -> torch.Tensor:
    said = [
        (
            spot.answers[spot.first :].data_ptr(),
            spot.num_rows,
            0 if spot.permit is None else spot.permit.data_ptr(),
            spot.wanted,
        )
        for spot in spots
    ]
    return torch.tensor(said, device=DEVICE)


@pytest.mark.parametrize("said", [None, 5, 6])
def test_outputs_go_where_they_are_wanted_and_no_further(said: int | None) -> None:
    """Of six rows in one message, four fit where they are to be, or none are wanted there."""
    permit = None if said is None else torch.tensor([said], device=DEVICE)
    width, ahead, dtype = 80, 1, torch.float16
    x = torch.randn(8, width, device=DEVICE, dtype=dtype)
    x.view(-1).view(torch.int32)[:2] = torch.tensor([2, 4], dtype=torch.int32, device=DEVICE)
    down = torch.randn(2, width, width, device=DEVICE, dtype=dtype) / 9
    here_G = torch.arange(2, dtype=torch.int32, device=DEVICE)
    words = x.view(-1).view(torch.int32)
    messages = Messages(words, len(words), here_G, 2, 1, 8, ahead)
    wants = [F.linear(row.double(), down[int(n >= 2)].double()) for n, row in enumerate(x[1:5])]
    answers = torch.full((8, width), 7.0, device=DEVICE, dtype=dtype)
    to_P4 = deliveries(Spot(answers, 1, 4, permit))
    grouped_out(x[1:].contiguous(), messages, down, x, to_P4)
    if said == 6:
        assert (answers == 7).all()
    else:
        close(answers[1:5], torch.stack(wants), of=dtype)
        assert (answers[[0, 5, 6, 7]] == 7).all()
    answers.fill_(7)
    deliver(x[:6], to_P4)
    assert (answers[[0, 5, 6, 7]] == 7).all()
    assert torch.equal(answers[1:5], x[:4]) == (said != 6)


@pytest.mark.parametrize(
    ("counts", "ends"),
    [
        ([2, 0, 0, 3], [2, 2, 2, 5]),
        ([5, 0, 9, 1], [5, 5, 8, 8]),
        ([-5, 3, 0, 1 << 30], [0, 3, 3, 8]),
    ],
)
def test_groups_end_within_the_rows(counts: list[int], ends: list[int]) -> None:
    said = torch.zeros(7, dtype=torch.int32)
    said[HERE] = torch.tensor(counts, dtype=torch.int32)
    here_G = torch.tensor(HERE, dtype=torch.int32, device=DEVICE)
    assert group_ends(said.to(DEVICE), here_G, 8).tolist() == ends


@pytest.mark.parametrize("counts", [[9, 0, 0, 0], [-5, 3, 0, 0], [1 << 30, 1 << 30, 1 << 30, 7]])
def test_counts_that_do_not_add_up_touch_no_row_of_another_message(counts: list[int]) -> None:
    stride, width = 8, 80
    x = torch.randn(3 * stride, width, device=DEVICE, dtype=torch.float16)
    before, words = x.clone(), x.view(-1).view(torch.int32)
    step = stride * len(words) // len(x)
    for part, said in enumerate(([1, 0, 0, 0], counts, [0, 0, 0, 2])):
        words[part * step : part * step + 4] = torch.tensor(said, dtype=torch.int32, device=DEVICE)
    into, down = (torch.randn(4, width, width, device=DEVICE).half() / 9 for _ in range(2))
    here_G = torch.arange(4, dtype=torch.int32, device=DEVICE)
    messages = Messages(words, step, here_G, 4, 3, stride, 1)
    grouped_out(grouped_in(x, messages, into), messages, down, x)
    for row, expert in ((1, 0), (2 * stride + 1, 3), (2 * stride + 2, 3)):
        hidden = F.linear(before[row].double(), into[expert].double()).half()
        close(x[row], F.linear(hidden.double(), down[expert].double()), of=torch.float16)
    for rest in (slice(2, stride), slice(2 * stride + 3, 3 * stride)):
        assert torch.equal(x[rest], before[rest])


@pytest.mark.parametrize(("rows", "small"), [(7, True), (64, True), (700, True), (700, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["silu", "gelu", "plain"])
@pytest.mark.skipif(DEVICE != "cuda", reason="stacks are made on a GPU alone")
def test_a_stack_computes_as_its_mlps(
    kind: str, dtype: torch.dtype, rows: int, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many rows go through torch's products where an expert is not small."""
    monkeypatch.setattr("mesh.mlp._SMALL_BYTES", (16 << 20) if small else 0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, dtype=dtype) / 16

    mlps: dict[int, PlainMlp | GatedMlp] = {
        index: PlainMlp(weight(128, 64), weight(64, 128), "gelu")
        if kind == "plain"
        else GatedMlp(weight(256, 64), weight(64, 128), kind)
        for index in (0, 1, 4)
    }
    ends = [0, rows // 2, rows // 2 + 2, rows]
    x_RD = torch.randn(rows, 64, device=DEVICE, dtype=dtype)
    outs = [mlp(x_RD[ends[n] : ends[n + 1]]).double() for n, mlp in enumerate(mlps.values())]
    stack = StackedMlps.of(mlps)
    assert stack is not None
    counts_E = torch.tensor([ends[1], 2, 0, 0, rows - ends[2]], dtype=torch.int32, device=DEVICE)
    close(stack(x_RD, counts_E), torch.cat(outs), of=dtype)
    buffer_RD = torch.zeros(2 * (rows + 1), 64, device=DEVICE, dtype=dtype)
    for part in buffer_RD.chunk(2):
        part.view(-1).view(torch.int32)[:5] = counts_E
        part[1:] = x_RD
    alone_RD = buffer_RD[: rows + 1]
    for buffer in (alone_RD, buffer_RD):
        parts = len(buffer) // (rows + 1)
        on_host_PE = torch.zeros(parts, 5, dtype=torch.int32, pin_memory=True)
        answers = torch.zeros(parts, rows, 64, device=DEVICE, dtype=dtype)
        spots = [Spot(of_part, 0, rows) for of_part in answers]
        stack.deliver(buffer, 1, on_host_PE, deliveries(*spots))
        torch.cuda.synchronize()
        assert (on_host_PE == counts_E.cpu()).all()
        for of_part in answers:
            close(of_part, torch.cat(outs), of=dtype)
    on_host_E = torch.zeros(5, dtype=torch.int32, pin_memory=True)
    elsewhere_RD = stack.answer(alone_RD.clone(), 1, on_host_E, in_place=False)
    assert stack.answer(alone_RD, 1, on_host_E) is None
    torch.cuda.synchronize()
    assert on_host_E.equal(counts_E.cpu())
    close(alone_RD[1:], torch.cat(outs), of=dtype)
    if elsewhere_RD is not None:
        close(elsewhere_RD, torch.cat(outs), of=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (33, 100), (700, 2048)])
def test_a_row_is_normed_in_float32(dtype: torch.dtype, rows: int, width: int) -> None:
    x = torch.randn(rows, width, device=DEVICE, dtype=dtype)
    weight = torch.randn(width, device=DEVICE, dtype=dtype)
    close(rms_norm(x, RmsNorm(weight, 1e-5)), F.rms_norm(x, (width,), weight, 1e-5))


@pytest.mark.parametrize("tokens", [1, 128, 700])
@pytest.mark.parametrize(
    ("experts", "top_k", "config"),
    [
        (1, 1, RouterConfig(normalize=True)),
        (16, 2, RouterConfig(normalize=True, bias=True)),
        (60, 4, RouterConfig()),
        (128, 8, RouterConfig(scoring="sigmoid", normalize=True, correction_bias=True, scale=2.5)),
        (8, 2, RouterConfig(scoring="sigmoid", correction_bias=True)),
    ],
)
def test_experts_are_chosen_as_on_a_cpu(
    tokens: int, experts: int, top_k: int, config: RouterConfig
) -> None:
    x_TD = torch.randn(tokens, 256).bfloat16()
    weight_ED = torch.randn(experts, 256).bfloat16() / 16
    bias_E = torch.randn(experts) if config.bias else None
    correction_E = torch.randn(experts) / 8 if config.correction_bias else None
    there_T = (torch.arange(tokens, dtype=torch.int32) % 3).clamp(max=1)
    want_ids, want_weights = Router(config, top_k, weight_ED, bias_E, correction_E)(x_TD, there_T)
    on_gpu = [None if t is None else t.to(DEVICE) for t in (weight_ED, bias_E, correction_E)]
    assert on_gpu[0] is not None
    ids, weights = Router(config, top_k, on_gpu[0], *on_gpu[1:])(
        x_TD.to(DEVICE), there_T.to(DEVICE)
    )
    assert torch.equal(ids.cpu(), want_ids)
    assert (want_ids[::3] == experts).all()
    torch.testing.assert_close(weights.cpu(), want_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "width"),
    [(1, 2, 1, 80), (5, 7, 2, 80), (64, 16, 4, 80), (1, 128, 8, 2048), (40, 60, 4, 4096)],
)
def test_a_row_is_normed_and_scored_in_one_pass(
    dtype: torch.dtype, tokens: int, experts: int, top_k: int, width: int
) -> None:
    norm = RmsNorm(torch.rand(width, device=DEVICE, dtype=dtype) + 0.5, 1e-5)
    x_TD = torch.randn(tokens, width, device=DEVICE, dtype=dtype)
    weight_ED = torch.randn(experts, width, device=DEVICE, dtype=dtype) / width**0.5
    bias_E = torch.randn(experts, device=DEVICE)
    arrived_T = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
    ids_TK, weights_TK, normed_TD = choose(
        x_TD,
        weight_ED.float(),
        top_k,
        scoring="softmax",
        normalize=False,
        softmax_of_chosen=False,
        scale=2.0,
        num_experts=experts,
        arrived_T=arrived_T,
        bias_E=bias_E,
        norm=norm,
    )
    assert not arrived_T.any()
    close(normed_TD, norm(x_TD))
    scores_TE = F.linear(normed_TD.double(), weight_ED.double(), bias_E.double()).softmax(dim=-1)
    want_TK, want_ids_TK = scores_TE.topk(top_k)
    assert torch.equal(ids_TK, want_ids_TK)
    torch.testing.assert_close(weights_TK, 2 * want_TK.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("tokens", "choices", "experts"), [(1, 2, 4), (33, 8, 128), (700, 4, 40)])
def test_rows_are_sorted_by_expert_scattered_and_combined(
    tokens: int, choices: int, experts: int
) -> None:
    ids_TK = torch.rand(tokens, experts, device=DEVICE).topk(choices).indices
    positions_R = torch.full((tokens * choices,), -7, dtype=torch.int32, device=DEVICE)
    counts_E = torch.full((experts,), -7, dtype=torch.int32, device=DEVICE)
    sort_by_expert(ids_TK.view(-1), positions_R, counts_E)
    order_R = ids_TK.view(-1).argsort(stable=True)
    want_R = torch.empty_like(positions_R)
    want_R[order_R] = torch.arange(len(order_R), dtype=torch.int32, device=DEVICE)
    assert torch.equal(positions_R, want_R)
    assert torch.equal(counts_E.long(), torch.bincount(ids_TK.view(-1), minlength=experts))

    x_TD = torch.randn(tokens, 48, device=DEVICE)
    arena_RD = torch.full((tokens * choices + 9, 48), torch.nan, device=DEVICE)
    row_of_position = torch.randperm(len(arena_RD), device=DEVICE)[: tokens * choices]
    rows_TK = torch.empty_like(ids_TK)
    scatter(x_TD, positions_R, row_of_position.int(), rows_TK, arena_RD)
    assert torch.equal(rows_TK.view(-1), row_of_position[positions_R.long()])
    assert torch.equal(arena_RD[rows_TK], x_TD[:, None].expand(-1, choices, -1))
    assert arena_RD.isnan().any(dim=1).sum() == 9

    weights_TK = torch.rand(tokens, choices, device=DEVICE)
    want_TD = (arena_RD[rows_TK] * weights_TK[..., None]).sum(dim=1)
    close(combine(arena_RD, rows_TK, weights_TK), want_TD)
    close(combine(arena_RD, rows_TK, weights_TK, x_TD), x_TD + want_TD)
    norm = RmsNorm(torch.rand(48, device=DEVICE), 1e-5)
    summed_TD, normed_TD = combine_and_norm(arena_RD, rows_TK, weights_TK, x_TD, norm)
    close(summed_TD, x_TD + want_TD)
    close(normed_TD, norm(summed_TD))


def test_ids_past_the_experts_count_for_none_and_come_last() -> None:
    ids_R = torch.tensor([9, 1, 9, 0], device=DEVICE)
    positions_R = torch.empty(4, dtype=torch.int32, device=DEVICE)
    counts_E = torch.empty(2, dtype=torch.int32, device=DEVICE)
    sort_by_expert(ids_R, positions_R, counts_E)
    assert positions_R.tolist() == [2, 1, 3, 0]
    assert counts_E.tolist() == [1, 1]


@pytest.mark.parametrize(("rows", "experts"), [(2049, 3), (5000, 96), (40_001, 70)])
def test_many_rows_are_sorted_by_what_each_block_has(rows: int, experts: int) -> None:
    ids_R = torch.randint(0, experts + 3, (rows,), device=DEVICE)  # the last three are nobody's
    positions_R = torch.full((rows,), -7, dtype=torch.int32, device=DEVICE)
    counts_E = torch.full((experts,), -7, dtype=torch.int32, device=DEVICE)
    sort_by_expert(ids_R, positions_R, counts_E)
    order_R = ids_R.clamp(max=experts).argsort(stable=True)
    assert torch.equal(positions_R[order_R].long(), torch.arange(rows, device=DEVICE))
    assert torch.equal(counts_E.long(), torch.bincount(ids_R, minlength=experts)[:experts])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "choices", "experts"), [(1, 2, 4), (9, 8, 70), (70, 4, 8), (590, 4, 70)]
)
def test_rows_are_placed_by_the_tables(
    tokens: int, choices: int, experts: int, dtype: torch.dtype
) -> None:
    """Expert 0 is nobody's, 1 is alone, and the others share two messages by turns."""
    width, frame, header = 1100, 2 + tokens * choices, 2
    groups = [-1, 0] + [1 + e % 2 for e in range(2, experts)]
    starts = [frame * n for n in range(3)]
    tables = Tables(experts, torch.device(DEVICE))
    limit = starts[1] + header + max(1000, tokens * choices)
    tables.write(groups, [n + header for n in starts], [starts[1], limit, 1 << 30], [1, 2], header)
    arena_RD = torch.full((3 * frame, width), torch.nan, dtype=dtype, device=DEVICE)
    x_TD = torch.randn(tokens, width, dtype=dtype, device=DEVICE)
    ids_TK = torch.rand(tokens, experts, device=DEVICE).topk(choices).indices
    ids_TK[-1, -1] = experts  # of nobody: such pad a batch
    rows_TK = torch.empty_like(ids_TK)
    counts_E = torch.empty(experts, dtype=torch.int32, pin_memory=DEVICE == "cuda")
    place(x_TD, ids_TK, tables.words, arena_RD, rows_TK, counts_E)
    if DEVICE == "cuda":
        torch.cuda.synchronize()

    ids = ids_TK.view(-1).tolist()
    assert counts_E.tolist() == [ids.count(e) for e in range(experts)]
    taken = {n: start + header for n, start in enumerate(starts)}
    want = [-1] * len(ids)
    for expert in range(1, experts):
        for n in (n for n, one in enumerate(ids) if one == expert):
            want[n], taken[groups[expert]] = taken[groups[expert]], taken[groups[expert]] + 1
    assert rows_TK.view(-1).tolist() == want
    for n, row in enumerate(want):
        if row >= 0:
            assert torch.equal(arena_RD[row], x_TD[n // choices])
    words = arena_RD.view(torch.int32)
    for group in (1, 2):
        want_E = [ids.count(e) if groups[e] == group else 0 for e in range(experts)]
        assert words[starts[group]].tolist()[:experts] == want_E
    assert arena_RD[starts[0] : starts[0] + header].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "choices", "experts", "shards"),
    [(1, 2, 4, 2), (9, 8, 20, 3), (40, 2, 8, 8), (700, 2, 8, 2)],
)
def test_rows_go_to_every_slice_of_an_expert_and_are_summed_with_its_weight(
    tokens: int, choices: int, experts: int, shards: int, dtype: torch.dtype
) -> None:
    """Slice s of every expert is on worker s; of the last worker there is nothing."""
    width, frame, header, units = 1100, 2 + tokens * choices, 2, experts * shards
    groups = [s if s < shards - 1 else -1 for _ in range(experts) for s in range(shards)]
    starts = [frame * s for s in range(shards - 1)]
    tables = Tables(units, torch.device(DEVICE))
    firsts, limits = [n + header for n in starts], [n + frame for n in starts]
    tables.write(groups, firsts, limits, range(shards - 1), header)
    arena_RD = torch.full(((shards - 1) * frame, width), torch.nan, dtype=dtype, device=DEVICE)
    x_TD = torch.randn(tokens, width, dtype=dtype, device=DEVICE)
    ids_TK = torch.rand(tokens, experts, device=DEVICE).topk(choices).indices
    ids_TK[-1, -1] = experts  # of nobody: such pad a batch
    rows_TK = ids_TK.new_empty(tokens, choices * shards)
    counts_E = torch.empty(units, dtype=torch.int32, pin_memory=DEVICE == "cuda")
    place(x_TD, ids_TK, tables.words, arena_RD, rows_TK, counts_E)
    if DEVICE == "cuda":
        torch.cuda.synchronize()

    ids_R, there_TK = ids_TK.view(-1), ids_TK < experts
    counts = torch.bincount(ids_R, minlength=experts + 1)[:experts]
    assert torch.equal(counts_E.long(), counts.cpu().repeat_interleave(shards))
    place_R = torch.empty_like(ids_R)
    place_R[ids_R.argsort(stable=True)] = torch.arange(len(ids_R), device=DEVICE)
    words = arena_RD.view(torch.int32)
    for s, start in enumerate(starts):
        rows_of_slice_TK = rows_TK[:, s::shards]
        want_TK = torch.where(there_TK, start + header + place_R.view_as(ids_TK), -1)
        assert torch.equal(rows_of_slice_TK, want_TK)
        of_slice_TKD = x_TD[:, None].expand(-1, choices, -1)[there_TK]
        assert torch.equal(arena_RD[rows_of_slice_TK[there_TK]], of_slice_TKD)
        header_E = words[start : start + header].view(-1)[:units].view(experts, shards)
        assert torch.equal(header_E[:, s].long(), counts)
        assert header_E.sum() == counts.sum()
    assert (rows_TK[:, shards - 1 :: shards] == -1).all()

    weights_TK = torch.rand(tokens, choices, device=DEVICE)
    reply_RD = torch.randn(len(arena_RD), width, dtype=dtype, device=DEVICE)
    each_TKD = reply_RD[rows_TK].double() * (rows_TK >= 0).unsqueeze(-1)
    sum_TD = (each_TKD * weights_TK.repeat_interleave(shards, dim=1).unsqueeze(-1)).sum(dim=1)
    close(combine(reply_RD, rows_TK, weights_TK), sum_TD, of=dtype)
    close(combine(reply_RD, rows_TK, weights_TK, x_TD), x_TD + sum_TD, of=dtype)
    norm = RmsNorm(torch.rand(width, dtype=dtype, device=DEVICE), 1e-5)
    summed_TD, normed_TD = combine_and_norm(reply_RD, rows_TK, weights_TK, x_TD, norm)
    close(summed_TD, x_TD + sum_TD, of=dtype)
    close(normed_TD, norm(summed_TD))


def test_rows_past_the_limit_are_not_written() -> None:
    tables = Tables(2, torch.device(DEVICE))
    tables.write([0, 0], [3], [5], [], 1)
    arena_RD = torch.zeros(9, 8, device=DEVICE)
    ids_TK = torch.tensor([[1], [0], [1], [1]], device=DEVICE)
    rows_TK, counts_E = torch.empty_like(ids_TK), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    place(torch.ones(4, 8, device=DEVICE), ids_TK, tables.words, arena_RD, rows_TK, counts_E)
    assert rows_TK.view(-1).tolist() == [4, 3, -1, -1]
    assert counts_E.tolist() == [1, 3]
    assert arena_RD.any(dim=1).nonzero().view(-1).tolist() == [3, 4]


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_and_keys_turn_and_keys_and_values_are_kept(dtype: torch.dtype) -> None:
    heads, kv_heads, dim = 6, 2, 32
    qkv = torch.randn(5, (heads + 2 * kv_heads) * dim, device=DEVICE, dtype=dtype)
    cis = torch.polar(torch.ones(5, dim // 2), torch.rand(5, dim // 2))[:, None].to(DEVICE)
    slots = torch.tensor([3, 40, -1, 0, 17], device=DEVICE)
    cache = torch.zeros(48, 2 * kv_heads * dim, device=DEVICE, dtype=dtype)
    want = qkv.clone()
    rotate_(want[:, : (heads + kv_heads) * dim].view(5, heads + kv_heads, dim), cis)
    turn_and_store(qkv, cis, slots, cache, heads * dim, (heads + kv_heads) * dim)
    close(qkv, want)
    kept = [0, 1, 3, 4]
    assert torch.equal(cache[slots[kept]], qkv[kept, heads * dim :])
    assert cache.any(dim=1).sum() == len(kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "sinks"),
    [
        (4, 4, 64, None, False),
        (8, 2, 16, None, True),
        (32, 1, 128, 70, False),
        (6, 2, 80, 9, True),
        (2, 2, 512, None, False),
        (4, 1, 320, 40, True),
    ],
)
def test_decode_reads_pages(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int | None, sinks: bool
) -> None:
    lengths = [1, 16, 17, 300, 0]
    width = 2 * kv_heads * dim
    cache = torch.randn(64 * BLOCK, width, device=DEVICE, dtype=dtype)
    tables = torch.randperm(64, device=DEVICE)[:60].int().view(3, 20).repeat(2, 1)[: len(lengths)]
    q = torch.randn(len(lengths), heads, dim, device=DEVICE, dtype=dtype)
    sinks_H = torch.randn(heads, device=DEVICE, dtype=dtype) if sinks else None
    for splits in (1, 3, num_splits(q, kv_heads, 300)):
        got = paged_decode(
            q,
            cache,
            tables,
            torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
            splits=splits,
            block_size=BLOCK,
            num_kv_heads=kv_heads,
            value_dim=dim,
            value_offset=kv_heads * dim,
            scale=dim**-0.5,
            window=window,
            sinks_H=sinks_H,
        )
        for b, length in enumerate(lengths):
            if length == 0:
                assert not got[b].any()
                continue
            at = torch.arange(max(0, length - (window or length)), length, device=DEVICE)
            rows = cache[tables[b].long()[at // BLOCK] * BLOCK + at % BLOCK].double()
            k, v = (
                part.view(-1, kv_heads, dim).repeat_interleave(heads // kv_heads, dim=1)
                for part in rows.chunk(2, dim=1)
            )
            scores = torch.einsum("hk,nhk->hn", q[b].double(), k) * dim**-0.5
            if sinks_H is not None:
                scores = torch.cat([scores, sinks_H.double()[:, None]], dim=1)
            weights = scores.softmax(dim=1)[:, : len(at)]
            close(got[b].double(), torch.einsum("hn,nhv->hv", weights, v), of=dtype)


def test_sequences_go_on_as_if_they_had_been_filled_in() -> None:
    block_size, tables = 4, [(7, 2, 9), (5, 3), (8, 1, 4)]
    gone_on, filled = (DecodeFacts(4, 8, torch.device(DEVICE)) for _ in "12")

    def batch(positions: list[int], tokens: list[int]) -> ForwardBatch:
        slices = map(SequenceSlice, positions, [1, 1, 1], tables)
        return ForwardBatch.of(slices, torch.tensor(tokens), torch.arange(3))

    gone_on.fill(batch([6, 3, 8], [11, 12, 13]), block_size)
    assert gone_on.foresee(tables, block_size)
    # Of a graph there are as many as it was made for; who is nobody stays so.
    gone_on._move_on(torch.tensor([21, NOT_A_NUMBER, 23, 24], device=DEVICE), block_size)
    filled.fill(batch([7, 4, 9], [21, 0, 23]), block_size)
    assert gone_on.facts_4B.tolist() == filled.facts_4B.tolist()
