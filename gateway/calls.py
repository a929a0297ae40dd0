"""One Generate call on its way: what the engine says, folded into what the client is told."""

from __future__ import annotations

import asyncio
import time

from gateway.metrics import GatewayMetrics, Timeline
from gateway.text import ChoiceText
from mesh.errors import error_from_code
from protos import engine_pb2
from protos import inference_pb2 as pb

# A reply takes no more once it is so long: with one more output it is far below what a message
# may be.
_FULL_BYTES = 1 << 20


class Choice:
    """One of a call's n outputs: one request of the engine."""

    def __init__(self, index: int, engine_id: str, text: ChoiceText, call: Call) -> None:
        self.index = index
        self.engine_id = engine_id
        self.times = Timeline(call.arrival_s)
        self.finish_reason = ""
        self._text = text
        self._call = call
        self._arrived: list[tuple[engine_pb2.Output, float]] = []
        self._full: list[pb.GenerateReply] = []
        self._reply = pb.GenerateReply()
        self._reply_bytes = 0
        self._cached_tokens = 0

    def deliver(self, output: engine_pb2.Output, now: float) -> None:
        """Take an output of the engine; folded in when the client is ready for more."""
        self._arrived.append((output, now))
        self._call.note_arrival(now, ends=output.finish_reason != "")

    def advance(self, metrics: GatewayMetrics) -> None:
        """Fold what arrived into the next reply. Raises the error that the engine reports."""
        arrived, self._arrived = self._arrived, []
        for output, now in arrived:
            if self.finish_reason:
                return  # a stop string came before
            if output.finish_reason == "error":
                self.end("error", now)
                raise error_from_code(output.error_code, output.error_message)
            gap_s = self._fold(output, now)
            if gap_s > 0:
                metrics.observe_inter_token(gap_s)

    def _fold(self, output: engine_pb2.Output, now: float) -> float:
        self.times.scheduled_s = output.scheduled_s or self.times.scheduled_s
        self._cached_tokens = output.cached_tokens or self._cached_tokens
        piece = self._text.add(
            output.token_ids,
            last=output.finish_reason != "",
            stopped_by_token=output.finish_reason == "stop",
        )
        count = piece.num_tokens
        if self._reply_bytes > _FULL_BYTES:
            self._full.append(self._reply)
            self._reply, self._reply_bytes = pb.GenerateReply(), 0
        self._reply_bytes += output.ByteSize() + len(piece.text.encode())
        self._reply.text += piece.text
        self._reply.token_ids.extend(output.token_ids[:count])
        self._reply.logprobs.extend(output.logprobs[:count])
        gap_s = self.times.add_tokens(count, now) / count if count else 0.0
        if piece.stop or output.finish_reason:
            self.end("stop" if piece.stop else output.finish_reason, now)
            self._reply.stop_reason = piece.stop or output.stop_reason
        return gap_s

    def end(self, finish_reason: str, now: float) -> None:
        """Note how the choice ended."""
        self.finish_reason = finish_reason
        self.times.end_s = now

    @property
    def has_news(self) -> bool:
        """Whether there are tokens that the client has not seen."""
        return len(self._reply.token_ids) > 0

    def take_replies(self) -> list[pb.GenerateReply]:
        """All since the last ones; the very last says how it ended. More than one where one
        message could not hold it."""
        replies = [*self._full, self._reply]
        self._full, self._reply, self._reply_bytes = [], pb.GenerateReply(), 0
        for reply in replies:
            reply.request_id = self._call.request_id
            reply.index = self.index
        if self.finish_reason:
            last = replies[-1]
            last.finish_reason = self.finish_reason
            last.usage.prompt_tokens = len(self._call.prompt_token_ids)
            last.usage.completion_tokens = self.times.num_tokens
            last.usage.cached_tokens = self._cached_tokens
            last.timing.CopyFrom(self.times.timing())
        return replies


class Call:
    """One Generate call: its choices, and when there is something to tell its client."""

    def __init__(self, request_id: str, prompt_token_ids: list[int], arrival_s: float) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.arrival_s = arrival_s
        self.choices: list[Choice] = []
        self._news = asyncio.Event()
        self._next_reply_s = arrival_s
        self._timer: asyncio.TimerHandle | None = None

    async def news(self) -> None:
        """Wait until something has arrived that the client may be told now."""
        await self._news.wait()
        self._news.clear()

    def pause(self, pause_s: float) -> None:
        """Let what arrives gather for ``pause_s``; the end of a choice is told at once."""
        self._next_reply_s = time.monotonic() + pause_s

    def note_arrival(self, now: float, ends: bool) -> None:
        """Something has arrived; with ``ends``, the end of a choice."""
        if ends or now >= self._next_reply_s:
            self._news.set()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._next_reply_s - now, self._end_pause)

    def close(self) -> None:
        """Nobody waits for news any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _end_pause(self) -> None:
        self._timer = None
        self._news.set()
