"""What the papers' comparison asks of each side."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_BEGAN_S = time.monotonic()


def say(words: str) -> None:
    """Where a side is, and since when it runs; of several ranks the first speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{time.monotonic() - _BEGAN_S:10.1f} s  {words}", file=sys.stderr, flush=True)


def say_prefill(found: Mapping[str, Any]) -> None:
    """What a side found of its prompts."""
    say(f"prefill {found['prefill_tokens_per_s']:,.0f} tokens/s")


def say_tpot(found: Mapping[str, Any], batch: int) -> None:
    """What it found of so many sequences that decode."""
    say(f"TPOT {found['tpot_ms'][batch]:.2f} ms at {batch}")


@dataclass(frozen=True)
class Work:
    """What is asked of each side."""

    prefill_prompts: int
    prefill_len: int
    decode_len: int
    num_new: int
    batches: Sequence[int]
    max_batch_tokens: int

    @property
    def decode_steps(self) -> int:
        """Behind the steps with prompts, so many give every sequence a token."""
        return self.num_new - 2

    @property
    def max_len(self) -> int:
        return max(self.prefill_len + 1, self.decode_len + self.num_new)


def prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    """The same tokens for the same seed."""
    rng = random.Random(seed)
    return [rng.randrange(vocab_size) for _ in range(length)]


def shares(count: int, engines: int) -> list[range]:
    """Which sequences each engine has, of those that have any: as equally many as can be."""
    return [range(n, count, engines) for n in range(min(count, engines))]
