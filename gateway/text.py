"""Text to token ids and back: the tokenizer of the checkpoint, incremental detokenization,
stop strings.

``tokenizers`` has a ``DecodeStream``; it is not used here because bytes that are not UTF-8,
which any model may sample, make it raise or decode an ever longer run on every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from mesh.errors import CheckpointError
from protos import inference_pb2 as pb

REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 5
# No character spans as many tokens; what is still broken then was never a character.
_MAX_PENDING_TOKENS = 16


def load_tokenizer(model: Path) -> Tokenizer | None:
    """The checkpoint's tokenizer, or None for a directory without one: it serves token ids.

    Raises CheckpointError for a tokenizer.json that cannot be read.
    """
    path = model / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{path} is not a tokenizer: {error}; fetch it again, or remove it to serve token ids"
        ) from error
    # Some checkpoints were saved with settings of their training: a prompt is never cut.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Detokenizer:
    """Turns one choice's tokens into text, each character once all of its bytes are there.

    Joined, the pieces are what the tokenizer decodes from all of the tokens behind the prompt.
    Work per token is bounded: only the last few tokens are ever decoded again.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # Decoders of the SentencePiece kind drop the space in front of a text's first word:
        # the tokens before decide whether there is one.
        self._context = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        self._context_text = self._decode(self._context)
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        """New text, possibly none."""
        self._pending.append(token_id)
        text = self._pending_text()
        incomplete = not text or text.endswith(REPLACEMENT)
        if incomplete and len(self._pending) < _MAX_PENDING_TOKENS:
            return ""
        return self._take(text)

    def finish(self) -> str:
        """What is left: bytes that never became a character, as U+FFFD."""
        return self._take(self._pending_text())

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _pending_text(self) -> str:
        whole = self._decode(self._context + self._pending)
        if whole.startswith(self._context_text):
            return whole[len(self._context_text) :]
        # The context ended within a character that is whole now.
        clean = self._context_text.rstrip(REPLACEMENT)
        if whole.startswith(clean):
            return whole[len(clean) :]
        # A byte-fallback decoder gives up a whole run of bytes for one that is invalid.
        return self._decode(self._pending)

    def _take(self, text: str) -> str:
        if text:
            self._context = self._pending
            self._context_text = self._decode(self._context)
        self._pending = []
        return text


class StopStrings:
    """Finds the stop string that is complete first, however the text is cut into pieces."""

    def __init__(self, stop: Sequence[str], include: bool) -> None:
        self._stop = tuple(stop)
        self._include = include
        self._held = ""

    def add(self, text: str) -> tuple[str, str]:
        """Text that may go out, and the stop string that ended it or "".

        What could be the beginning of a stop string is held back.
        """
        text = self._held + text
        found = [(text.find(stop) + len(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, stop = min(found, key=lambda match: (match[0], -len(match[1])))
            self._held = ""
            return text[: end if self._include else end - len(stop)], stop
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], ""

    def finish(self) -> str:
        """What was held back and has become no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` starts with, without being it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Piece(NamedTuple):
    """What some new tokens of a choice amount to."""

    text: str
    num_tokens: int
    """How many of them belong to the choice; fewer than given when a stop string ended it."""
    stop: str
    """The stop string that ended it, or ""."""


class ChoiceText:
    """The text of one choice: detokenized, watched for stop strings.

    Without a tokenizer the text is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_token_ids: Sequence[int],
        sampling: pb.SamplingParams,
    ) -> None:
        self._detokenizer = (
            Detokenizer(tokenizer, prompt_token_ids, sampling.skip_special_tokens)
            if tokenizer is not None
            else None
        )
        self._stop = StopStrings(sampling.stop, sampling.include_stop_str_in_output)
        self._include_stop = sampling.include_stop_str_in_output
        self._unwatched_tokens = max(sampling.min_tokens - 1, 0)

    def add(
        self, token_ids: Sequence[int], last: bool = False, stopped_by_token: bool = False
    ) -> Piece:
        """Take new tokens; with ``last``, let go of whatever was held back.

        A token that ended the choice shows in the text only where stop strings do.
        """
        if self._detokenizer is None:
            return Piece("", len(token_ids), "")
        hidden = int(stopped_by_token and not self._include_stop and len(token_ids) > 0)
        text = ""
        for count, token_id in enumerate(token_ids[: len(token_ids) - hidden], start=1):
            new = self._detokenizer.add(token_id)
            if self._unwatched_tokens > 0:
                self._unwatched_tokens -= 1
                text += new
                continue
            new, stop = self._stop.add(new)
            text += new
            if stop:
                return Piece(text, count, stop)
        if not last:
            return Piece(text, len(token_ids), "")
        rest, stop = self._stop.add(self._detokenizer.finish())
        return Piece(text + rest + self._stop.finish(), len(token_ids), stop)
