"""Sides of the papers' comparison that an engine drives: scheduler, sampler and all."""

from __future__ import annotations

import gc
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks.random_model import checkpoint_on, dtype_on
from benchmarks.work import Work, prompt, say, say_prefill, say_tpot, shares
from cli.bench_mesh import dispatcher_to
from gateway.engine import Engine, MeshExperts
from gateway.kv_blocks import BlockAllocator
from gateway.model.decoder import Decoder
from gateway.model.kv_cache import KvCache
from gateway.request import Request, Sampling
from gateway.sampler import Sampler
from gateway.scheduler import Limits, Scheduler
from mesh.config import GatewayConfig
from mesh.model_config import ModelConfig
from mesh.plan import ExpertId
from protos import engine_pb2 as pb

_BLOCK = 16
_REPLY_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Ran:
    """What one engine did with its share of the sequences."""

    sequences: Sequence[int]
    began_s: float
    """``time.perf_counter()``, which is the same for all processes of a machine."""
    steps_s: Sequence[float]
    tokens: Sequence[Sequence[int]]
    """What each sequence was given."""
    imbalance: float | None = None
    """Rows of a layer's busiest expert over the mean of its experts, mean over the layers; None
    where experts are here and nobody counts."""
    kernels_us: Mapping[str, float] | None = None
    """Of each kernel that this process launched, a step of those that were profiled."""

    @property
    def ended_s(self) -> float:
        return self.began_s + sum(self.steps_s)


Run = Callable[..., list[Ran]]
"""``(count, length, num_new)``: so many sequences behind prompts of ``length`` tokens are given
``num_new`` each; what every engine did that had any. Gateways take the steps to profile, too."""


def measure(run: Run, work: Work, engines: int) -> dict[str, Any]:
    """Every cell. Prefill lasts from the first engine's start to the last one's end; a token's
    time is the median over the steps of all engines, each of which is its own."""
    say("ready")
    run(4 * engines, work.prefill_len, 1)  # what is captured at its third use is, behind these
    say("warm")
    ran = run(work.prefill_prompts, work.prefill_len, 1)
    prefill_s = max(one.ended_s for one in ran) - min(one.began_s for one in ran)
    found: dict[str, Any] = {
        "prefill_tokens_per_s": work.prefill_prompts * work.prefill_len / prefill_s,
        "tpot_ms": {},
        "decode_tokens_per_s": {},
    }
    imbalances = [one.imbalance for one in ran if one.imbalance is not None]
    if imbalances:
        found["imbalance"] = fmean(imbalances)
    say_prefill(found)
    for batch in work.batches:
        run(batch, 32, 6)
        ran = run(batch, work.decode_len, work.num_new)
        decoding = [one.steps_s[-work.decode_steps :] for one in ran]
        found["tpot_ms"][batch] = median([step_s for steps in decoding for step_s in steps]) * 1e3
        say_tpot(found, batch)
        found["decode_tokens_per_s"][batch] = sum(
            len(one.sequences) / median(steps) for one, steps in zip(ran, decoding, strict=True)
        )
        of = {n: t for one in ran for n, t in zip(one.sequences, one.tokens, strict=True)}
        found.setdefault("tokens", of[0])
        found["batch_tokens"] = [of[n] for n in range(batch)]
    return found


class Side:
    """An engine over some experts."""

    def __init__(
        self,
        config: ModelConfig,
        decoder: Decoder,
        kv: KvCache,
        experts: MeshExperts,
        work: Work,
        overlap_tokens: int | None = None,
        shards: int = 1,
    ) -> None:
        self._shards = shards
        self._config, self._work, self._experts = config, work, experts
        self._requests: dict[int, Request] = {}
        self._engine = Engine(
            Scheduler(
                BlockAllocator(kv.num_blocks, _BLOCK, prefix_cache=False),
                Limits(work.max_batch_tokens, max(work.batches), 4096, 1.0, 1.0),
            ),
            lambda batches, rows: decoder.forward(batches, kv, rows),
            experts,
            Sampler(),
            overlap_tokens=overlap_tokens,
            ahead=decoder.ahead,
        )

    def run(self, count: int, length: int, num_new: int) -> list[Ran]:
        """See :data:`Run`."""
        self.submit(range(count), length, num_new)
        return [self.go()]

    def submit(self, sequences: Sequence[int], length: int, num_new: int) -> None:
        """What the next :meth:`go` is to do."""
        self._requests = {
            n: Request(
                str(n),
                array("q", prompt(length, self._config.vocab_size, n)),
                Sampling(num_new, temperature=0.0),
            )
            for n in sequences
        }
        for request in self._requests.values():
            self._engine.submit(request)

    def go(self, profiled: range = range(0)) -> Ran:
        """Step until all are through; of the profiled steps the kernels are told, too."""
        times: list[float] = []
        before = dict(self._experts.rows_by_expert)
        profiler = None
        first_s = time.perf_counter()
        while self._engine.num_requests:
            if profiled and len(times) == profiled.start:
                profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA])
                profiler.start()
            began_s = time.perf_counter()
            self._engine.step()
            times.append(time.perf_counter() - began_s)
            if profiler is not None and len(times) == profiled.stop:
                profiler.stop()
        if len(times) < profiled.stop:
            raise SystemExit(f"there were {len(times)} steps: {profiled} were to be profiled")
        ends = [output.end for output in self._engine.take_outputs() if output.end]
        wrong = [end.error or end.finish_reason for end in ends if end.finish_reason != "length"]
        if wrong:
            raise SystemExit(f"{len(wrong)} requests ended otherwise, the first with: {wrong[0]}")
        tokens = [list(one.token_ids[one.num_prompt_tokens :]) for one in self._requests.values()]
        kernels_us = None if profiler is None else _kernels_us(profiler, len(profiled))
        imbalance = self._imbalance(before)
        return Ran(list(self._requests), first_s, times, tokens, imbalance, kernels_us)

    def _imbalance(self, before: Mapping[ExpertId, int]) -> float | None:
        layers: defaultdict[int, Counter[int]] = defaultdict(Counter)
        for unit, rows in self._experts.rows_by_expert.items():
            layers[unit.layer][unit.index // self._shards] += rows - before.get(unit, 0)
        busiest = [max(rows.values()) / rows.total() for rows in layers.values() if rows.total()]
        return fmean(busiest) * self._config.num_experts if busiest else None


def _kernels_us(profiler: torch.profiler.profile, num_steps: int) -> dict[str, float]:
    return {
        one.key: one.self_device_time_total / num_steps
        for one in profiler.key_averages()
        if one.self_device_time_total
    }


@contextmanager
def decoder_of(
    config: ModelConfig, device: torch.device, work: Work, engines: int = 1
) -> Iterator[tuple[Decoder, KvCache]]:
    """The gateway's part of the model and room for its share of the sequences."""
    dtype = dtype_on(device, config)
    decoder = Decoder.load(config, checkpoint_on(device), device, dtype)
    blocks = max(
        len(shares(max(work.batches), engines)[0]) * -(-(work.decode_len + work.num_new) // _BLOCK),
        2 * -(-(work.prefill_len + 1) // _BLOCK) + 2,
    )
    yield decoder, KvCache(config, blocks, _BLOCK, device, dtype)
    del decoder
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def meshed(
    admit: Callable[[bytes], pb.Routing],
    config: ModelConfig,
    device: torch.device,
    work: Work,
    micro_batches: int,
    engines: int = 1,
) -> Iterator[Side]:
    """One of so many gateways, over the workers that ``admit`` knows.

    With one micro-batch large steps are two, as in a gateway that is served.
    """
    with (
        decoder_of(config, device, work, engines) as (decoder, kv),
        dispatcher_to(
            admit,
            config,
            device=device,
            dtype=dtype_on(device, config),
            max_tokens=work.max_batch_tokens,
            reply_timeout_s=_REPLY_TIMEOUT_S,
        ) as dispatcher,
    ):
        if device.type == "cuda":
            from gateway.model.decode_graphs import DecodeGraphs

            decoder.use_graphs(DecodeGraphs(decoder, kv, dispatcher, work.max_len))
        served = GatewayConfig(device=device.type).overlap_tokens
        overlap = 1 if micro_batches == 2 else served
        yield Side(config, decoder, kv, dispatcher, work, overlap, dispatcher.shards)
