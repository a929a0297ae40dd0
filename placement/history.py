"""What happened, for people and for the log. Pure: ``now`` is passed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

_MOST_EVENTS = 200


@dataclass(frozen=True)
class Event:
    """One fact. ``text`` is a sentence, ``facts`` are for machines."""

    at_s: float
    kind: str
    text: str
    facts: Mapping[str, object]
    is_bad: bool = False


class History:
    """The latest events, oldest first, and which of them nobody logged yet."""

    def __init__(self) -> None:
        self.latest: deque[Event] = deque(maxlen=_MOST_EVENTS)
        self._news: deque[Event] = deque(maxlen=_MOST_EVENTS)

    def note(self, now: float, kind: str, text: str, *, bad: bool = False, **facts: object) -> None:
        """Something happened."""
        event = Event(now, kind, text, facts, bad)
        self.latest.append(event)
        self._news.append(event)

    def take_news(self) -> list[Event]:
        """What happened since the last call."""
        news = list(self._news)
        self._news.clear()
        return news
