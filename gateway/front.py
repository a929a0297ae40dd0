"""The public API: requests through the door to the engine, tokens back as text."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import grpc
import structlog
from tokenizers import Tokenizer

from gateway import validate
from gateway.calls import Call, Choice
from gateway.engine_link import EngineLink
from gateway.metrics import GatewayMetrics
from gateway.text import ChoiceText
from mesh.config import GatewayConfig
from mesh.errors import AlreadyExists, EngineDied, MeshError, Overloaded, Unavailable
from mesh.model_config import ModelConfig
from protos import engine_pb2
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc

if TYPE_CHECKING:  # generic in the type stubs alone
    _Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger()

# A longer text is tokenized beside the event loop, so that it delays nobody's stream.
_INLINE_CHARACTERS = 4096
# A message costs some 0.5 ms of CPU on both sides together, however many tokens are in it: where
# that is more than a few percent of the machine, tokens gather, but no longer than a reader sees.
_MESSAGES_PER_S = min(1000, 125 * (os.cpu_count() or 1))
_LONGEST_PAUSE_S = 0.1


class Front(pb_grpc.InferenceServicer):
    """The ``Inference`` service of one gateway. Its engine is at the other end of ``link``."""

    def __init__(
        self,
        config: GatewayConfig,
        model: ModelConfig,
        *,
        model_name: str,
        gateway_id: str,
        tokenizer: Tokenizer | None,
        defaults: pb.SamplingParams,
        link: EngineLink,
        metrics: GatewayMetrics,
        num_workers: Callable[[], int],
    ) -> None:
        self._config = config
        self._model = model
        self._model_name = model_name
        self._gateway_id = gateway_id
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._longest_token = max(map(len, tokenizer.get_vocab())) if tokenizer is not None else 0
        self._link = link
        self._metrics = metrics
        self._num_workers = num_workers
        self._calls: dict[str, Call] = {}
        self._max_choices = config.max_running + config.max_waiting
        self._admitted = 0
        self._serial = 0
        self._since_s = time.monotonic()
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def Generate(
        self, request: pb.GenerateRequest, context: _Context
    ) -> AsyncIterator[pb.GenerateReply]:
        """Stream tokens as they come; ends with a final message a choice, or with an error."""
        arrival_s = time.monotonic()
        limits = self._limits()
        sampling = validate.check_request(request, limits)
        with self._admit(sampling.n):
            if request.WhichOneof("input") == "prompt":
                token_ids = await self._encode(request.prompt, add_special_tokens=True)
            else:
                token_ids = list(request.prompt_token_ids.ids)
            max_tokens = validate.check_prompt(token_ids, sampling, limits)
            call = Call(request.request_id or uuid.uuid4().hex, token_ids, arrival_s)
            with self._running(call):
                self._submit(call, sampling, max_tokens, context.time_remaining())
                async for reply in self._replies(call, request.stream):
                    yield reply

    async def Cancel(self, request: pb.CancelRequest, context: _Context) -> pb.CancelReply:
        """End a request that runs: its stream ends with finish reason "cancelled"."""
        call = self._calls.get(request.request_id)
        if call is not None:
            self._link.cancel(choice.engine_id for choice in call.choices)
        return pb.CancelReply(found=call is not None)

    async def Tokenize(self, request: pb.TokenizeRequest, context: _Context) -> pb.TokenizeReply:
        """Token ids of a text, by default as Generate would see it."""
        limits = self._limits()
        validate.check_text(request.text, "text", limits)
        with self._admit(1):
            special = request.add_special_tokens if request.HasField("add_special_tokens") else True
            token_ids = await self._encode(request.text, special)
        return pb.TokenizeReply(token_ids=token_ids, max_model_len=limits.max_model_len)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: _Context
    ) -> pb.ModelInfo:
        """What is served."""
        model, started = self._model, self._started()
        return pb.ModelInfo(
            model=self._model_name,
            family=model.family,
            num_layers=model.num_layers,
            num_moe_layers=len(model.moe_layers),
            num_experts=model.num_experts,
            experts_per_token=model.experts_per_token,
            hidden_size=model.hidden_size,
            vocab_size=model.vocab_size,
            max_model_len=started.max_model_len,
            dtype=started.dtype,
            has_tokenizer=self._tokenizer is not None,
            eos_token_ids=model.eos_token_ids,
            fingerprint=model.fingerprint,
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: _Context
    ) -> pb.ServerInfo:
        """How it is doing."""
        config, started, stats = self._config, self._started(), self._link.stats
        return pb.ServerInfo(
            gateway_id=self._gateway_id,
            version=version("expert-mesh"),
            device=config.device,
            epoch=stats.epoch,
            num_workers=self._num_workers(),
            running=stats.running,
            waiting=stats.waiting,
            kv_usage=stats.kv_usage,
            kv_blocks=started.kv_blocks,
            kv_block_size=started.kv_block_size,
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            uptime_s=time.monotonic() - self._since_s,
            expert_rows=[
                pb.ExpertRows(layer=load.expert.layer, index=load.expert.index, rows=load.rows)
                for load in stats.load
            ],
            failovers=stats.failovers,
            replayed_rows=stats.replayed_rows,
            pause_s=stats.pause_s,
            stalled_s=stats.stalled_s,
            workers=stats.paces,
        )

    async def drain(self, timeout_s: float) -> bool:
        """Take no new work; whether what runs has ended within ``timeout_s``."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Free what the front holds."""
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    def _started(self) -> engine_pb2.Started:
        if self._link.ended:
            raise EngineDied("the gateway's engine process ended; ask another gateway")
        if not self._link.started.done():
            raise Unavailable("the gateway is loading its model; try again once it is ready")
        return self._link.started.result()

    def _limits(self) -> validate.Limits:
        max_model_len = self._started().max_model_len
        return validate.Limits(
            model=self._model_name,
            vocab_size=self._model.vocab_size,
            max_model_len=max_model_len,
            max_characters=max_model_len * self._longest_token,
            defaults=self._defaults,
        )

    @contextmanager
    def _admit(self, count: int) -> Iterator[None]:
        """Count what is in flight, so that nothing a client does grows without bound."""
        if self._draining:
            raise Unavailable("the gateway is shutting down; ask another gateway")
        if self._admitted + count > self._max_choices:
            raise Overloaded(
                f"{self._admitted} requests are in flight and the gateway takes "
                f"{self._max_choices}; try again later, or raise max_waiting"
            )
        self._admitted += count
        self._idle.clear()
        try:
            yield
        finally:
            self._admitted -= count
            if self._admitted == 0:
                self._idle.set()

    async def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; the door has seen that there is a tokenizer."""
        tokenizer = cast(Tokenizer, self._tokenizer)
        encode = partial(tokenizer.encode, text, add_special_tokens=add_special_tokens)
        if len(text) <= _INLINE_CHARACTERS:
            return list(encode().ids)
        loop = asyncio.get_running_loop()
        return list((await loop.run_in_executor(self._tokenizing, encode)).ids)

    def _submit(
        self, call: Call, sampling: pb.SamplingParams, max_tokens: int, remaining_s: float | None
    ) -> None:
        """Hand each choice to the engine, under an id that no late output of another has."""
        deadline_s = 0.0 if remaining_s is None else time.monotonic() + remaining_s
        for index in range(sampling.n):
            self._serial += 1
            text = ChoiceText(self._tokenizer, call.prompt_token_ids, sampling)
            choice = Choice(index, f"{call.request_id}#{self._serial}", text, call)
            call.choices.append(choice)
            submit = engine_pb2.Submit(
                request_id=choice.engine_id,
                prompt_token_ids=call.prompt_token_ids,
                sampling=validate.choice_sampling(sampling, index, max_tokens),
                deadline_s=deadline_s,
                arrival_s=call.arrival_s,
            )
            self._link.submit(submit, choice.deliver)

    async def _replies(self, call: Call, stream: bool) -> AsyncIterator[pb.GenerateReply]:
        """While a reply is on its way, what comes meanwhile gathers for the next."""
        running = call.choices
        while running:
            await call.news()
            for choice in running:
                choice.advance(self._metrics)
                if choice.finish_reason:
                    self._link.forget([choice.engine_id])
                if choice.finish_reason or (stream and choice.has_news):
                    for reply in choice.take_replies():
                        yield reply
            call.pause(min(len(self._calls) / _MESSAGES_PER_S, _LONGEST_PAUSE_S))
            running = [choice for choice in running if not choice.finish_reason]

    @contextmanager
    def _running(self, call: Call) -> Iterator[None]:
        """Whichever way the call ends, the engine is told and the end is noted once."""
        if call.request_id in self._calls:
            raise AlreadyExists(
                f"request_id {call.request_id!r} is in flight; choose another or leave it empty"
            )
        self._calls[call.request_id] = call
        error = ""
        try:
            yield
        except MeshError as failure:
            error = failure.code
            raise
        finally:
            del self._calls[call.request_id]
            call.close()
            self._link.forget([choice.engine_id for choice in call.choices])
            self._note_end(call, error)

    def _note_end(self, call: Call, error: str) -> None:
        for choice in call.choices:
            if not choice.finish_reason:  # the client is gone, or another choice failed
                choice.end("error" if error else "cancelled", time.monotonic())
            self._metrics.observe_end(choice.times, choice.finish_reason)
            timing = choice.times.timing()
            log.info(
                "request_finished",
                request_id=call.request_id,
                choice=choice.index,
                engine_id=choice.engine_id,
                finish_reason=choice.finish_reason,
                error=error,
                prompt_tokens=len(call.prompt_token_ids),
                completion_tokens=choice.times.num_tokens,
                queue_s=round(timing.queue_s, 6),
                ttft_s=round(timing.ttft_s, 6),
                tpot_s=round(timing.tpot_s, 6),
                e2e_s=round(timing.e2e_s, 6),
            )
