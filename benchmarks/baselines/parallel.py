"""The papers' baseline: tensor parallel times pipeline parallel, experts colocated.

Every rank has its stage's layers and of each layer ``1 / tp`` of the heads and of the hidden units
of every expert, or dense MLP; two sums over the stage's ranks a layer. Prompts go through the
stages one micro-batch behind the other; decoding sequences in as many groups as there are stages,
so that each stage has one in hand: a stage's step of a group is one CUDA graph, sums and all, that
also moves the group's positions on, so that between two steps the host does nothing but queue.

Kernels are the mesh's own and the monolith's. Batches are static: no scheduler, greedy tokens.

Legend: T tokens, B sequences of a group, N rows whose tokens are wanted, D hidden size, V the
vocabulary's part of a rank.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.monolith import Computed, ExpertsHere, through_layers
from benchmarks.baselines.shards import Split, checkpoint_part, part_of
from benchmarks.random_model import checkpoint_on, config_of, dtype_on
from benchmarks.work import Work, prompt, say, say_prefill, say_tpot
from gateway.model.attention import AttentionBlock, PagedAttention
from gateway.model.batch import SequenceSlice
from gateway.model.decoder import Decoder, Layer
from gateway.model.kv_cache import KvCache
from mesh.checkpoint import Checkpoint
from mesh.mlp import Mlp
from mesh.model_config import ModelConfig

_BLOCK = 16
_PROMPT_TOKENS = 8192
"""Of a micro-batch, unless one prompt is longer: GEMMs gain nothing from more."""


class _Links:
    """A rank's process groups. Activations and tokens have communicators of their own: with one,
    each end of a pair could wait for the other to receive."""

    def __init__(self, split: Split, rank: int, vocab_size: int, device: torch.device) -> None:
        self.split = split
        starts = [vocab_size * n // split.tp for n in range(split.tp)]
        # Made here: a graph may not bring it from the host.
        self._starts_R = torch.tensor(starts, device=device)
        self.stage, self.tp_rank = divmod(rank, split.tp)
        stages = [[s * split.tp + r for r in range(split.tp)] for s in range(split.pp)]
        pipes = [list(ranks) for ranks in zip(*stages, strict=True)]
        # Every rank must make every group, in the same order.
        self._tp = [dist.new_group(ranks) for ranks in stages][self.stage]
        self._onward = [dist.new_group(ranks) for ranks in pipes][self.tp_rank]
        self._back = [dist.new_group(ranks) for ranks in pipes][self.tp_rank]
        self._pipe = pipes[self.tp_rank]
        self._sent: list[tuple[Any, Tensor]] = []

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.split.pp - 1

    def sum_(self, x: Tensor) -> Tensor:
        """Over the ranks of the stage, in place."""
        if self.split.tp > 1:
            dist.all_reduce(x, group=self._tp)
        return x

    def best(self, logits_NV: Tensor) -> Tensor:
        """``tokens_N``, int64: the greedy ones over every rank's part of the vocabulary."""
        best = logits_NV.max(dim=-1)
        if self.split.tp == 1:
            return best.indices
        # A token is below 2^24: float32 holds it.
        mine_N2 = torch.stack([best.values, best.indices.float()], dim=-1)
        all_RN2 = mine_N2.new_empty(self.split.tp, *mine_N2.shape)
        dist.all_gather_into_tensor(all_RN2.flatten(0, 1), mine_N2, group=self._tp)
        rank_1N = all_RN2[..., 0].argmax(dim=0, keepdim=True)
        tokens_N = all_RN2[..., 1].gather(0, rank_1N)[0].long()
        return tokens_N + self._starts_R[rank_1N[0]]

    def send_onward(self, x_TD: Tensor) -> None:
        self._send(x_TD, self._pipe[self.stage + 1], self._onward)

    def receive_onward(self, x_TD: Tensor) -> Tensor:
        dist.recv(x_TD, self._pipe[self.stage - 1], group=self._onward)
        return x_TD

    def send_back(self, tokens_B: Tensor) -> None:
        self._send(tokens_B, self._pipe[0], self._back)

    def receive_back(self, tokens_B: Tensor) -> Tensor:
        dist.recv(tokens_B, self._pipe[-1], group=self._back)
        return tokens_B

    def _send(self, x: Tensor, to: int, group: Any) -> None:
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        self._sent.append((dist.isend(x, to, group=group), x))

    def settle(self) -> None:
        """Wait for everything that is on its way, and for everybody."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()
        dist.barrier()


class _SummedAttention:
    """See :class:`AttentionBlock`: of a part of the heads, summed over the ranks."""

    def __init__(self, part: AttentionBlock, links: _Links) -> None:
        self._part, self._links = part, links

    def __call__(
        self, layer: int, x_TD: Tensor, residual_TD: Tensor, cis_T1C: Tensor, paged: Any
    ) -> Tensor:
        # The residual is to be in the sum once.
        mine_TD = residual_TD if self._links.tp_rank == 0 else torch.zeros_like(residual_TD)
        return self._links.sum_(self._part(layer, x_TD, mine_TD, cis_T1C, paged))


class _SummedExperts:
    """See :class:`gateway.model.batch.Experts`: of a part of each, summed over the ranks."""

    def __init__(self, part: ExpertsHere, links: _Links) -> None:
        self._part, self._links = part, links

    def dispatch(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Computed:
        y_TD = self._part.dispatch(layer, x_TD, ids_TK, weights_TK).combine()
        return Computed(self._links.sum_(y_TD))


class _SummedMlp:
    """See :class:`mesh.mlp.Mlp`: of a part of the hidden units, summed over the ranks."""

    def __init__(self, part: Mlp, links: _Links) -> None:
        self._part, self._links = part, links
        self.tensors = part.tensors

    def __call__(self, x_RD: Tensor) -> Tensor:
        return self._links.sum_(self._part(x_RD))


class _Group(Protocol):
    """Sequences that decode together; a call is a step of this stage."""

    def __call__(self, given: Tensor) -> Tensor: ...


class Stage:
    """One rank."""

    def __init__(
        self,
        config: ModelConfig,
        whole: Checkpoint,
        split: Split,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
        max_tokens: int,
    ) -> None:
        """``max_tokens`` of all sequences that are there at a time, each rounded up to a block."""
        self.links = links = _Links(split, rank, config.vocab_size, device)
        part = part_of(config, split, links.tp_rank, links.stage)
        checkpoint = checkpoint_part(whole, config, split, links.tp_rank, links.stage)
        decoder = Decoder.load(part, checkpoint, device, dtype)
        decoder.layers = [_summed(layer, links) for layer in decoder.layers]
        self._decoder = decoder
        self._experts = _SummedExperts(
            ExpertsHere(part, checkpoint, device, dtype, links.tp_rank, split.tp), links
        )
        self._kv = KvCache(part, max_tokens // _BLOCK, _BLOCK, device, dtype)
        self._windows = frozenset(part.windows)
        self._device, self._dtype = device, dtype
        self._hidden = config.hidden_size
        self._own: list[Tensor] = []
        self._paged: type[PagedAttention] = PagedAttention
        if device.type == "cuda":
            from gateway.model.gpu_attention import GpuPagedAttention

            self._paged = GpuPagedAttention

    def generate(
        self, prompts: Sequence[Sequence[int]], num_new: int
    ) -> tuple[float, list[float], list[list[int]]]:
        """Seconds for the prompts, seconds of each step behind them, and, on ranks of the first
        stage, ``num_new`` tokens of each prompt. All prompts are of one length."""
        length, links = len(prompts[0]), self.links
        blocks = -(-(length + num_new) // _BLOCK)
        tables = [tuple(range(n * blocks, (n + 1) * blocks)) for n in range(len(prompts))]
        size = max(1, min(_PROMPT_TOKENS // length, -(-len(prompts) // links.split.pp)))
        self._settle()
        began_s = time.perf_counter()
        for n in range(0, len(prompts), size):
            self._prefill(prompts[n : n + size], tables[n : n + size])
        firsts = [
            self._receive_tokens(len(prompts[n : n + size])) for n in range(0, len(prompts), size)
        ]
        self._settle()
        prefill_s = time.perf_counter() - began_s
        tokens_B = torch.cat(firsts) if links.first else torch.empty(0)
        size = -(-len(prompts) // links.split.pp)
        parts = [slice(n, min(n + size, len(prompts))) for n in range(0, len(prompts), size)]
        groups = [self._group(tables[part], length, length + num_new) for part in parts]
        found = [[tokens_B[part]] for part in parts]
        self._settle()
        marks = [time.perf_counter()]
        for step in range(num_new - 1):
            for group, part, tokens in zip(groups, parts, found, strict=True):
                if links.first and step:
                    tokens.append(self._receive_tokens(part.stop - part.start))
                self._pass(group, tokens[-1], part.stop - part.start)
            # The host runs ahead of the device: a step ends where its first token is known.
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            marks.append(time.perf_counter())
        if links.first and num_new > 1:
            for part, tokens in zip(parts, found, strict=True):
                tokens.append(self._receive_tokens(part.stop - part.start))
        self._settle()
        steps = [end - start for start, end in pairwise(marks)]
        if not links.first:
            return prefill_s, steps, []
        rows = [row for tokens in found for row in torch.stack(tokens, dim=-1).tolist()]
        return prefill_s, steps, rows

    def _pass(self, run: _Group, tokens_B: Tensor, size: int) -> None:
        """A batch through this stage: from the one before, to the one behind or back."""
        links = self.links
        if links.first:
            given = tokens_B
        else:
            empty = torch.empty(size, self._hidden, device=self._device, dtype=self._dtype)
            given = links.receive_onward(empty)
        made = run(given)
        if not links.last:
            links.send_onward(made)
        elif links.first:
            self._own.append(made)
        else:
            links.send_back(made)

    def _receive_tokens(self, count: int) -> Tensor:
        links = self.links
        if not links.first:
            return torch.empty(0)
        if links.last:
            return self._own.pop(0)
        return links.receive_back(torch.empty(count, device=self._device, dtype=torch.int64))

    def _prefill(self, prompts: Sequence[Sequence[int]], tables: Sequence[tuple[int, ...]]) -> None:
        length = len(prompts[0])
        slices = tuple(SequenceSlice(0, length, table) for table in tables)
        tokens_T = torch.tensor([token for one in prompts for token in one]).to(self._device)
        last_N = torch.arange(1, len(prompts) + 1) * length - 1
        self._pass(lambda given: self._run(given, slices, last_N), tokens_T, len(prompts) * length)

    def _run(self, given: Tensor, slices: tuple[SequenceSlice, ...], rows_N: Tensor) -> Tensor:
        paged = self._paged(slices, self._kv, self._windows, False)
        return self._through(given, self._decoder.rope(paged.positions_T), paged, rows_N)

    def _through(self, given: Tensor, cis_T1C: Tensor, paged: Any, rows_N: Tensor) -> Tensor:
        """Tokens or what the stage before made, to what this one makes or tokens."""
        decoder, links = self._decoder, self.links
        x_TD = F.embedding(given, decoder.embedding_VD) if links.first else given
        x_TD = through_layers(decoder, self._experts, x_TD, cis_T1C, paged)
        return links.best(decoder.score(x_TD, rows_N).logits_NV) if links.last else x_TD

    def _group(self, tables: Sequence[tuple[int, ...]], length: int, max_len: int) -> _Group:
        if self._device.type == "cuda":
            return self._graphed(tables, length, max_len)
        return self._eager(tables, length)

    def _eager(self, tables: Sequence[tuple[int, ...]], length: int) -> _Group:
        slices = tuple(SequenceSlice(length, 1, table) for table in tables)
        rows_N = torch.arange(len(tables))

        def step(given: Tensor) -> Tensor:
            nonlocal slices
            made = self._run(given, slices, rows_N)
            slices = tuple(one._replace(num_cached=one.num_cached + 1) for one in slices)
            return made

        return step

    def _graphed(self, tables: Sequence[tuple[int, ...]], length: int, max_len: int) -> _Group:
        from expert_worker.gpu_compute import capture
        from gateway.model.gpu_attention import Decoding

        device, size = self._device, len(tables)
        tables_BM = torch.tensor(tables, dtype=torch.int32, device=device)
        facts_2B = torch.empty(2, size, dtype=torch.int32, device=device)
        slots_B = torch.empty(size, dtype=torch.int32, device=device)
        positions_B, lengths_B = facts_2B
        rows_N = torch.arange(size, device=device)
        given = (
            torch.zeros(size, dtype=torch.int64, device=device)
            if self.links.first
            else torch.zeros(size, self._hidden, dtype=self._dtype, device=device)
        )
        decoding = Decoding(self._kv, slots_B, tables_BM, lengths_B, max_len)
        made: dict[str, Tensor] = {}

        def start() -> None:
            positions_B.fill_(length)
            lengths_B.fill_(length + 1)

        def step() -> None:
            block_B1 = (positions_B // _BLOCK).long()[:, None]
            slots_B.copy_(tables_BM.gather(1, block_B1)[:, 0] * _BLOCK + positions_B % _BLOCK)
            cis_T1C = self._decoder.rope(positions_B)
            made["y"] = self._through(given, cis_T1C, decoding, rows_N)
            facts_2B.add_(1)

        start()
        torch.cuda.synchronize(device)
        with torch.cuda.stream(torch.cuda.Stream(device)):
            step()
            torch.cuda.synchronize(device)
            graph = capture(step)
        start()

        # The graph knows these and does not keep them.
        known = (facts_2B, slots_B, rows_N, decoding)

        def replay(value: Tensor, _: object = known) -> Tensor:
            given.copy_(value)
            graph.replay()
            # The next replay overwrites what this one made; it may still be on its way then.
            return made["y"].clone()

        return replay

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.links.settle()
        self._own = []


def _summed(layer: Layer, links: _Links) -> Layer:
    dense = None if layer.dense is None else _SummedMlp(layer.dense, links)
    return replace(layer, attention=_SummedAttention(layer.attention, links), dense=dense)


def measure(rank: int, device: torch.device, order: dict[str, Any]) -> dict[str, Any]:
    """Every cell of a :class:`Work`; a rank's part in :func:`cli.ranks.run_ranks`."""
    config, checkpoint = config_of(order["settings"]), checkpoint_on(device)
    work = Work(**order["work"])
    dtype = dtype_on(device, config)
    block_up = -(-(work.decode_len + work.num_new) // _BLOCK) * _BLOCK
    prompt_up = -(-(work.prefill_len + 1) // _BLOCK) * _BLOCK
    max_tokens = max(max(work.batches) * block_up, work.prefill_prompts * prompt_up)
    split = Split.parse(order["split"])
    stage = Stage(config, checkpoint, split, rank, device, dtype, max_tokens)

    def prompts(count: int, length: int) -> list[list[int]]:
        return [prompt(length, config.vocab_size, n) for n in range(count)]

    say("ready")
    stage.generate(prompts(2, work.prefill_len), 1)
    say("warm")
    seconds, _, _ = stage.generate(prompts(work.prefill_prompts, work.prefill_len), 1)
    found: dict[str, Any] = {
        "prefill_tokens_per_s": work.prefill_prompts * work.prefill_len / seconds,
        "tpot_ms": {},
    }
    say_prefill(found)
    for batch in work.batches:
        stage.generate(prompts(batch, 32), 6)
        _, steps, tokens = stage.generate(prompts(batch, work.decode_len), work.num_new)
        found["tpot_ms"][batch] = median(steps[1:]) * 1e3
        say_tpot(found, batch)
        if tokens:
            found.setdefault("tokens", tokens[0])
            found["batch_tokens"] = tokens
    return found
