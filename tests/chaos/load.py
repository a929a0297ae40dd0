"""Open-loop load whose answers are known: what a quiet mesh said, token for token."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from expert_mesh import AsyncClient
from mesh.errors import MeshError

# A request whose expert is loaded elsewhere, whose gateway is stopped or whose host is cut waits
# that long; one that waits longer hangs.
PATIENCE_S = 120.0
_SURE = 1e-3
"""Least gap between the two likeliest tokens: above what another batch's rounding can turn."""
_TEXTS = (
    "It was the opinion of Mr. Darcy that",
    "In the beginning God created the heaven and the earth.",
    "The whale rose out of the sea, and the men in the boat",
    "There was no possibility of taking a walk that day.",
    "My father was a merchant, and I was the youngest of",
    "When the sun went down behind the hills, the old man said",
    "She had been a governess in the house for many years before",
    "The king sent for his servants and asked them what",
    "I have seen the city in the morning, when the streets are",
    "Upon the table lay a letter which nobody had opened",
    "He was a tall man, with a dark face and a quiet voice, who",
    "And the Lord said unto Moses, Go in unto Pharaoh, and tell him",
)


@dataclass(frozen=True)
class Question:
    """A prompt, and what a quiet mesh answers."""

    prompt: str
    answer: tuple[int, ...]


@dataclass(eq=False)
class Asked:
    """One request that was made. Times are ``time.monotonic()``."""

    question: Question
    gateway: str
    sent_s: float
    leaves_after: int | None = None
    """Tokens after which the client goes away; None: it stays."""
    tokens: list[int] = field(default_factory=list)
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When tokens came, and how many."""
    error: MeshError | None = None
    ended_s: float = 0.0

    @property
    def whole(self) -> bool:
        """Answered to the end."""
        return self.error is None and self.leaves_after is None

    def wrong(self) -> str | None:
        """How the tokens differ from the quiet answer, in words."""
        expected = self.question.answer[: None if self.whole else len(self.tokens)]
        if tuple(self.tokens) == expected:
            return None
        return f"{self.question.prompt!r} was answered {self.tokens}, in quiet {list(expected)}"


async def learn(
    client: AsyncClient, rng: random.Random, count: int, lengths: tuple[int, int]
) -> list[Question]:
    """Ask a quiet mesh ``count`` questions, and keep those whose greedy answer is beyond doubt."""
    questions = []
    for i in range(count):
        text = _TEXTS[i % len(_TEXTS)]
        prompt = text[: rng.randint(len(text) // 2, len(text))]
        done = await client.complete(
            prompt, max_tokens=rng.randint(*lengths), temperature=0.0, ignore_eos=True, logprobs=2
        )
        margins = [p.top[0].logprob - p.top[1].logprob for p in done.choices[0].logprobs]
        if min(margins) > _SURE:
            questions.append(Question(prompt, done.token_ids))
    return questions


class Load:
    """Requests at random times, ``rate`` a second, to the gateways that serve in turn."""

    def __init__(
        self,
        questions: Sequence[Question],
        serving: Mapping[str, AsyncClient],
        rng: random.Random,
        *,
        rate: float,
        leave_share: float = 0.0,
        on_end: Callable[[Asked], None] = lambda asked: None,
    ) -> None:
        self.asked: list[Asked] = []
        self._questions = questions
        self._serving = serving
        self._rng = rng
        self._rate = rate
        self._leave_share = leave_share
        self._on_end = on_end
        self._running: set[asyncio.Task[None]] = set()

    @property
    def num_running(self) -> int:
        return len(self._running)

    async def run(self) -> None:
        """Ask for ever."""
        due_s = time.monotonic()
        while True:
            due_s += self._rng.expovariate(self._rate)
            await asyncio.sleep(max(due_s - time.monotonic(), 0.0))
            self.ask()

    def ask(self) -> None:
        """Ask one more."""
        name = list(self._serving)[len(self.asked) % len(self._serving)]
        question = self._rng.choice(self._questions)
        asked = Asked(question, name, time.monotonic())
        if self._rng.random() < self._leave_share:
            asked.leaves_after = self._rng.randrange(1, len(question.answer))
        self.asked.append(asked)
        task = asyncio.create_task(self._ask(self._serving[name], asked))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def keep(self, count: int) -> None:
        """Keep ``count`` in flight, for ever."""
        while True:
            for _ in range(count - self.num_running):
                self.ask()
            await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)

    def leave(self) -> None:
        """One client that waits for more goes away."""
        running = (a for a in self.asked if not a.ended_s and a.leaves_after is None and a.tokens)
        if (asked := next(running, None)) is not None:
            asked.leaves_after = 1

    async def finish(self) -> None:
        """Wait for the end of every request."""
        await asyncio.gather(*self._running)

    async def _ask(self, client: AsyncClient, asked: Asked) -> None:
        answer = asked.question.answer
        chunks = client.generate(
            asked.question.prompt,
            max_tokens=len(answer),
            temperature=0.0,
            ignore_eos=True,
            timeout_s=PATIENCE_S,
        )
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    if chunk.token_ids:
                        asked.tokens += chunk.token_ids
                        asked.arrivals.append((time.monotonic(), len(chunk.token_ids)))
                    if asked.leaves_after and len(asked.tokens) >= asked.leaves_after:
                        break
        except MeshError as error:
            asked.error = error
        asked.ended_s = time.monotonic()
        self._on_end(asked)
