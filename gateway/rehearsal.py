"""What a gateway asks of its own engine before it says that it is ready.

Whoever comes first to a GPU waits for kernels to be compiled, graphs to be captured, libraries to
be loaded and connections to be made, a second for some sizes of step. Here nobody has come yet: the
engine decodes at every size of batch, and takes prompts at every power of two of tokens.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import structlog

from gateway.engine_link import EngineLink
from gateway.validate import filled
from mesh.config import GatewayConfig
from mesh.errors import MeshError, error_from_code
from protos import engine_pb2 as pb
from protos import inference_pb2

log = structlog.get_logger()

_PROMPT = 4
"""Tokens of a prompt that is there to be decoded behind."""
_DECODED = 6
"""Tokens that decode together, behind the step in which the last prompt was taken."""
_AT_ONCE = 16
"""Prompts of a step that has several."""
_FEWEST_TOKENS = 64
_LIKELIEST = inference_pb2.SamplingParams(temperature=0.0, ignore_eos=True)
_CHOICES = (
    inference_pb2.SamplingParams(logprobs=1),
    inference_pb2.SamplingParams(temperature=1.0, top_p=0.9, top_k=50, min_p=0.01),
    inference_pb2.SamplingParams(temperature=1.0, repetition_penalty=1.1, presence_penalty=0.1),
)
"""How tokens are chosen otherwise than by taking the likeliest."""


@dataclass(frozen=True)
class Scene:
    """Requests that are asked at once, each with so many tokens of prompt and of output."""

    lengths: tuple[tuple[int, int], ...]
    choice: inference_pb2.SamplingParams = field(default_factory=inference_pb2.SamplingParams)
    """How tokens are chosen where not by taking the likeliest."""


def scenes(config: GatewayConfig, started: pb.Started) -> Iterator[Scene]:
    """All that is rehearsed by a gateway of this configuration, the smallest first."""
    longest = min(started.max_model_len, started.kv_blocks * started.kv_block_size)
    budget, most = config.max_batch_tokens, config.max_running

    def lengths(prompt: int, output: int) -> tuple[int, int]:
        prompt = max(1, min(prompt, longest - output))
        return prompt, max(1, min(output, longest - prompt))

    for count in _doubled(1, most):
        steps = -(-count * _PROMPT // budget)
        yield Scene((lengths(_PROMPT, steps + _DECODED),) * count)
    for choice in _CHOICES:
        yield Scene((lengths(_PROMPT, _DECODED),) * min(2, most), choice)
    for tokens in _doubled(_FEWEST_TOKENS, budget):
        count = min(_AT_ONCE, most)
        yield Scene((lengths(tokens // count, 2),) * count)
    # One in several pieces, the last behind what is known of it, beside one that decodes.
    yield Scene((lengths(_PROMPT, 2 * _DECODED), lengths(budget + budget // 2, 2))[-most:])


def _doubled(first: int, last: int) -> Iterator[int]:
    """first, twice that, and so on; then ``last``."""
    while first < last:
        yield first
        first *= 2
    yield last


class Rehearsal:
    """Plays the scenes once. Lives on the event loop of ``link``."""

    def __init__(self, config: GatewayConfig, vocab_size: int, link: EngineLink) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._link = link
        self._random = random.Random(0)
        self._num_asked = 0
        self.over = not config.rehearsal_s
        """Also where there is nothing to be rehearsed, or it was broken off."""

    async def run(self) -> None:
        """Returns when all is played, its time is up or some of it failed; the last two are logged.
        The engine has started, and every expert is served."""
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(self._config.rehearsal_s):
                for scene in scenes(self._config, self._link.started.result()):
                    await self._play(scene)
        except TimeoutError:
            log.warning("rehearsal_cut_short", after_s=self._config.rehearsal_s)
        except MeshError as error:
            log.warning("rehearsal_failed", error=str(error))
        finally:
            self.over = True
        log.info("rehearsed", seconds=round(time.monotonic() - began_s, 3))

    async def _play(self, scene: Scene) -> None:
        """Raises MeshError where a request does not end well."""
        ends: dict[str, asyncio.Future[pb.Output]] = {}
        try:
            for num_prompt, max_tokens in scene.lengths:
                self._num_asked += 1
                request_id = f"rehearsal#{self._num_asked}"
                ends[request_id] = asyncio.get_running_loop().create_future()
                request = pb.Submit(
                    request_id=request_id,
                    # Of its own: no block of it is known.
                    prompt_token_ids=self._random.choices(range(self._vocab_size), k=num_prompt),
                    sampling=filled(_LIKELIEST, scene.choice),
                    arrival_s=time.monotonic(),
                )
                request.sampling.max_tokens = max_tokens
                self._link.submit(request, partial(_note_end, ends[request_id]))
            for output in await asyncio.gather(*ends.values()):
                if output.finish_reason == "error":
                    raise error_from_code(output.error_code, output.error_message)
        finally:
            self._link.forget(ends)


def _note_end(end: asyncio.Future[pb.Output], output: pb.Output, now: float) -> None:
    if output.finish_reason and not end.done():
        end.set_result(output)
