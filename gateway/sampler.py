"""From logits to tokens, for rows with different wishes in one batch.

Legend: N rows, V vocabulary, M (row, token) pairs.

The chain is vLLM's: early ends are masked and penalties applied to the logits, then come
temperature, min_p, top_k and top_p, then the draw. A draw inverts the cumulative distribution
at a number that depends on the request's seed and output position alone, so that what runs
beside a request, or preempts it, does not change its tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from gateway.request import Request, Sampling

_UNIFORMS = 64
"""Random numbers made at once: setting the generator up costs more than 64 of them."""


class TokenLogprobs(NamedTuple):
    """Log-softmax of the model's own logits at one output position."""

    chosen: float
    top: list[tuple[int, float]]
    """The likeliest tokens, as many as were asked for, best first."""


class Choice(NamedTuple):
    """What was chosen for one row."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class _RandomStream:
    """One number in [0, 1) for each output position of a request."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._start = -1
        self._uniforms: list[float] = []

    def at(self, position: int) -> float:
        """A pure function of the seed and the position."""
        start = position // _UNIFORMS * _UNIFORMS
        if start != self._start:
            # Philox yields four numbers for each value of its counter.
            philox = np.random.Philox(key=self._seed, counter=start // 4)
            # 24 bits: in float32 the product with a sum stays below the sum.
            raw = philox.random_raw(_UNIFORMS) >> np.uint64(40)
            self._uniforms = (raw * 2.0**-24).tolist()
            self._start = start
        return self._uniforms[position - start]


class _History:
    """The distinct tokens of a request's prompt and output."""

    def __init__(self, request: Request) -> None:
        prompt = np.unique(np.array(request.token_ids[: request.num_prompt_tokens]))
        self.ids = array("q", prompt.tobytes())
        self.counts = array("f", bytes(4 * len(self.ids)))
        """How often each is in the output."""
        self._index = {token_id: i for i, token_id in enumerate(self.ids)}
        self._num_seen = request.num_prompt_tokens

    def catch_up(self, request: Request) -> None:
        """Count the output tokens that came since the last call."""
        for token_id in request.token_ids[self._num_seen :]:
            index = self._index.setdefault(token_id, len(self.ids))
            if index == len(self.ids):
                self.ids.append(token_id)
                self.counts.append(0)
            self.counts[index] += 1
        self._num_seen = len(request.token_ids)


class Sampler:
    """Chooses the next token of each row. Remembers a request for as long as it lives."""

    def __init__(self) -> None:
        self._streams: WeakKeyDictionary[Request, _RandomStream] = WeakKeyDictionary()
        self._histories: WeakKeyDictionary[Request, _History] = WeakKeyDictionary()

    def sample(self, logits_NV: torch.Tensor, requests: Sequence[Request]) -> list[Choice | None]:
        """The next token of each request; None where a row has a NaN.

        ``logits_NV`` is float32 and may be overwritten.
        """
        samplings = [request.sampling for request in requests]
        logprobs = _RawLogprobs(logits_NV, samplings)
        _mask_early_ends(logits_NV, requests)
        self._penalize(logits_NV, requests)
        is_nan_N = logits_NV.amax(dim=-1).isnan()
        random = [row for row, sampling in enumerate(samplings) if not sampling.is_greedy]
        if len(random) == len(requests):
            token_ids_N = self._draw(logits_NV, requests)
        else:
            token_ids_N = _argmax(logits_NV)
            if random:
                token_ids_N[random] = self._draw(logits_NV[random], [requests[r] for r in random])
        choices = logprobs.choices(token_ids_N)
        for row in is_nan_N.nonzero().flatten().tolist():
            choices[row] = None
        return choices

    def _draw(self, logits_NV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """One token of each row by chance. Overwrites the logits."""
        weights_NV = _likely(logits_NV, [request.sampling for request in requests])
        uniforms = [self._uniform(request) for request in requests]
        cdf_NV = weights_NV.cumsum(dim=-1)
        target_N1 = cdf_NV[:, -1:] * cdf_NV.new_tensor(uniforms).unsqueeze(1)
        # The first token past the target has a weight: the target is below the last sum.
        token_ids_N1 = torch.searchsorted(cdf_NV, target_N1, right=True)
        return token_ids_N1.flatten().clamp_(max=cdf_NV.shape[1] - 1)  # NaN would be past the end

    def _uniform(self, request: Request) -> float:
        stream = self._streams.get(request)
        if stream is None:
            stream = self._streams[request] = _RandomStream(request.sampling.seed)
        return stream.at(request.num_outputs)

    def _history(self, request: Request) -> _History:
        history = self._histories.get(request)
        if history is None:
            history = self._histories[request] = _History(request)
        history.catch_up(request)
        return history

    def _penalize(self, logits_NV: torch.Tensor, requests: Sequence[Request]) -> None:
        """Weigh tokens that were seen before; only they are touched."""
        rows = [row for row, request in enumerate(requests) if request.sampling.has_penalties]
        if not rows:
            return
        histories = [self._history(requests[row]) for row in rows]
        lengths = [len(history.ids) for history in histories]

        def per_pair(values: list[float]) -> torch.Tensor:
            return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), lengths)).to(
                logits_NV.device
            )

        samplings = [requests[row].sampling for row in rows]
        repetition_M = per_pair([s.repetition_penalty for s in samplings])
        presence_M = per_pair([s.presence_penalty for s in samplings])
        frequency_M = per_pair([s.frequency_penalty for s in samplings])
        # As indices into the flat logits: a gather and a scatter of one dimension are quick.
        starts_M = np.repeat(np.array(rows) * logits_NV.shape[1], lengths)
        where_M = torch.from_numpy(starts_M + np.concatenate([h.ids for h in histories]))
        where_M = where_M.to(logits_NV.device)
        counts_M = torch.from_numpy(np.concatenate([h.counts for h in histories])).to(logits_NV)
        values_M = logits_NV.view(-1).index_select(0, where_M)
        values_M = values_M.clamp(min=0) / repetition_M + values_M.clamp(max=0) * repetition_M
        values_M -= frequency_M * counts_M + presence_M * counts_M.clamp(max=1)
        logits_NV.view(-1).index_copy_(0, where_M, values_M)


class _RawLogprobs:
    """Keeps the logprobs of the rows that want them from being changed with the logits."""

    def __init__(self, logits_NV: torch.Tensor, samplings: Sequence[Sampling]) -> None:
        self._counts = {
            row: sampling.logprobs
            for row, sampling in enumerate(samplings)
            if sampling.logprobs is not None
        }
        if self._counts:
            self._logprobs_NV = logits_NV[list(self._counts)].log_softmax(dim=-1)

    def choices(self, token_ids_N: torch.Tensor) -> list[Choice | None]:
        """The chosen tokens with what was asked about them."""
        choices: list[Choice | None] = [Choice(token_id) for token_id in token_ids_N.tolist()]
        if not self._counts:
            return choices
        chosen_N1 = token_ids_N[list(self._counts)].unsqueeze(1)
        chosen = self._logprobs_NV.gather(1, chosen_N1).flatten().tolist()
        top = self._logprobs_NV.topk(min(max(self._counts.values()), self._logprobs_NV.shape[1]))
        for (row, count), logprob, ids, values in zip(
            self._counts.items(), chosen, top.indices.tolist(), top.values.tolist(), strict=True
        ):
            likeliest = list(zip(ids[:count], values[:count], strict=True))
            choices[row] = Choice(int(token_ids_N[row]), TokenLogprobs(logprob, likeliest))
        return choices


def _mask_early_ends(logits_NV: torch.Tensor, requests: Sequence[Request]) -> None:
    """No token may end a request before its min_tokens."""
    for row, request in enumerate(requests):
        sampling = request.sampling
        if request.num_outputs < sampling.min_tokens:
            ends = sampling.eos_token_ids | sampling.stop_token_ids
            logits_NV[row, sorted(ends)] = -torch.inf


def _likely(logits_NV: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Probabilities, up to a factor a row, with zeros for what min_p, top_k and top_p cut off.

    Each of them is a threshold: equally likely tokens stay or go together, so that the result
    does not depend on how a sort breaks ties. Overwrites the logits.
    """

    def column(values: list[float]) -> torch.Tensor:
        return logits_NV.new_tensor(values).unsqueeze(1)

    probs_NV = logits_NV.div_(column([s.temperature for s in samplings])).softmax(dim=-1)
    if any(s.min_p > 0 for s in samplings):
        floor_N1 = column([s.min_p for s in samplings]) * probs_NV.amax(dim=-1, keepdim=True)
        _zero_below(probs_NV, floor_N1)
    if any(s.top_k > 0 or s.top_p < 1 for s in samplings):
        top_p_N1 = column([s.top_p for s in samplings])
        _zero_below(probs_NV, _nucleus_floor(probs_NV, [s.top_k for s in samplings], top_p_N1))
    return probs_NV


def _nucleus_floor(
    probs_NV: torch.Tensor, top_k: list[int], top_p_N1: torch.Tensor
) -> torch.Tensor:
    """The least probability in the smallest set of mass top_p of the top_k."""
    ascending_NV = _sort(probs_NV)
    vocab_size = probs_NV.shape[1]
    if any(top_k):
        kth = [max(vocab_size - k, 0) if k > 0 else 0 for k in top_k]
        kth_N1 = torch.tensor(kth, device=probs_NV.device).unsqueeze(1)
        _zero_below(ascending_NV, ascending_NV.gather(1, kth_N1))
    cdf_NV = ascending_NV.cumsum(dim=-1)
    # What may go: the least likely tokens, as long as their mass is at most 1 - top_p.
    num_cut_N1 = torch.searchsorted(cdf_NV, cdf_NV[:, -1:] * (1 - top_p_N1), right=True)
    return ascending_NV.gather(1, num_cut_N1.clamp_(max=vocab_size - 1))


def _zero_below(x_NV: torch.Tensor, floor_N1: torch.Tensor) -> None:
    """Zero what is below its row's floor, in place."""
    # A mask of floats: on a CPU, many times faster than a boolean one.
    x_NV.mul_(torch.ge(x_NV, floor_N1, out=torch.empty_like(x_NV)))


def _argmax(x_NV: torch.Tensor) -> torch.Tensor:
    """Of each row. On a CPU by NumPy, which is many times faster at it."""
    if x_NV.device.type == "cpu":
        return torch.from_numpy(x_NV.numpy().argmax(axis=-1))
    return x_NV.argmax(dim=-1)


def _sort(x_NV: torch.Tensor) -> torch.Tensor:
    """Each row ascending. On a CPU by NumPy, which is many times faster at it."""
    if x_NV.device.type == "cpu":
        return torch.from_numpy(np.sort(x_NV.numpy(), axis=-1))
    return x_NV.sort(dim=-1).values
