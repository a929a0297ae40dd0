"""From logits to tokens, for rows with different wishes in one batch.

Legend: N rows, V vocabulary, M (row, token) pairs or random rows, L rows that want logprobs, of X
tokens at most.

The chain is vLLM's: early ends are masked and penalties applied to the logits, then come
temperature, min_p, top_k and top_p, then the draw. A draw inverts the cumulative distribution
at a number that depends on the request's seed and output position alone, so that what runs
beside a request, or preempts it, does not change its tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from gateway.model.scores import NOT_A_NUMBER, Scores, likeliest
from gateway.request import Request, Sampling

_UNIFORMS = 64
"""Random numbers made at once: setting the generator up costs more than 64 of them."""


class TokenLogprobs(NamedTuple):
    """Log-softmax of the model's own logits at one output position."""

    chosen: float
    top: list[tuple[int, float]]
    """The likeliest tokens, as many as were asked for, best first."""


class Chosen(NamedTuple):
    """What was chosen for the rows of a step."""

    token_ids: list[int]
    """One a row, or NOT_A_NUMBER."""
    logprobs: Mapping[int, TokenLogprobs]
    """By row, of those that want some."""


class _Report(NamedTuple):
    """What was asked about the chosen tokens of L rows, on its way to the host."""

    rows: Sequence[int]
    counts: Sequence[int]
    """How many of the likeliest tokens each wants."""
    chosen_L: torch.Tensor
    top_ids_LX: torch.Tensor
    top_LX: torch.Tensor

    def by_row(self) -> dict[int, TokenLogprobs]:
        columns = self.chosen_L.tolist(), self.top_ids_LX.tolist(), self.top_LX.tolist()
        return {
            row: TokenLogprobs(logprob, list(zip(ids[:count], values[:count], strict=True)))
            for row, count, logprob, ids, values in zip(
                self.rows, self.counts, *columns, strict=True
            )
        }


class Sampled:
    """Tokens that are as good as chosen: a device may still be at it."""

    def __init__(
        self, token_ids_N: torch.Tensor, on_host_N: torch.Tensor, report: _Report | None = None
    ) -> None:
        self.token_ids_N = token_ids_N
        """int64, on the device."""
        self._on_host_N = on_host_N
        self._report = report
        self._there: torch.cuda.Event | None = None
        if token_ids_N.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record()

    def chosen(self) -> Chosen:
        """Wait for them, and for nothing that was launched behind them."""
        if self._there is not None:
            self._there.synchronize()
        report = self._report
        return Chosen(self._on_host_N.tolist(), {} if report is None else report.by_row())


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


class _Wishes:
    """What the rows of a step ask for: the same for as long as the requests are."""

    def __init__(self, requests: Sequence[Request], like_NV: torch.Tensor) -> None:
        self.requests = list(requests)
        samplings = [request.sampling for request in requests]

        def rows_where(wish: Callable[[Sampling], bool]) -> list[int]:
            return [row for row, sampling in enumerate(samplings) if wish(sampling)]

        self.early = rows_where(lambda sampling: sampling.min_tokens > 0)
        self.penalized = rows_where(lambda sampling: sampling.has_penalties)
        self.reported = rows_where(lambda sampling: sampling.logprobs is not None)
        self.random = rows_where(lambda sampling: not sampling.is_greedy)
        self.plain = not (self.early or self.penalized or self.reported or self.random)
        """Each row wants its likeliest token, and nothing else."""
        if self.reported:
            self.reported_L = _on(like_NV.device, np.array(self.reported))
        if self.random:
            self.random_M = _on(like_NV.device, np.array(self.random))
            self.limits = _Limits([samplings[row] for row in self.random], like_NV)


class _Limits:
    """The numbers of random rows. A column is [rows, 1], float32 where nothing else is said."""

    def __init__(self, samplings: Sequence[Sampling], like_NV: torch.Tensor) -> None:
        vocab_size = like_NV.shape[1]
        columns = np.array(
            [
                [s.temperature for s in samplings],
                [s.min_p for s in samplings],
                [s.top_p for s in samplings],
            ],
            dtype=np.float32,
        )
        columns_XN1 = _on(like_NV.device, columns).unsqueeze(-1)
        self.temperature_N1, self.min_p_N1, self.top_p_N1 = columns_XN1.unbind()
        kth = [max(vocab_size - s.top_k, 0) if s.top_k > 0 else 0 for s in samplings]
        self.kth_N1 = _on(like_NV.device, np.array(kth)).unsqueeze(-1)
        """int64: of the tokens in ascending order, where the top_k begin."""
        self.any_min_p = any(s.min_p > 0 for s in samplings)
        self.any_top_k = any(s.top_k > 0 for s in samplings)
        self.any_nucleus = any(s.top_k > 0 or s.top_p < 1 for s in samplings)


class Sampler:
    """Chooses the next token of each row. Remembers a request for as long as it lives, and those
    of the last step until the next."""

    def __init__(self) -> None:
        self._streams: WeakKeyDictionary[Request, _RandomStream] = WeakKeyDictionary()
        self._histories: WeakKeyDictionary[Request, _History] = WeakKeyDictionary()
        self._wishes = _Wishes([], torch.empty(0, 0))
        """Of the last step's rows."""

    def takes_likeliest(self, requests: Sequence[Request]) -> bool:
        """Whether it is known that each of them gets its likeliest token, and nothing else is asked
        of its scores."""
        return self._wishes.plain and self._wishes.requests == requests

    def sample(self, scores: Scores, requests: Sequence[Request]) -> Sampled:
        """The next token of each request. Waits for no device. What is chosen is to be asked for
        before the next step's scores are made: a graph may put them in the same place."""
        wishes = self._wishes
        if wishes.requests != requests:
            wishes = self._wishes = _Wishes(requests, scores.logits_NV)
        if wishes.plain and scores.likeliest is not None:
            return Sampled(*scores.likeliest)
        logits_NV = scores.logits_NV
        logprobs_LV = None
        if wishes.reported:
            logprobs_LV = logits_NV.index_select(0, wishes.reported_L).log_softmax(dim=-1)
        if wishes.early:
            _mask_early_ends(logits_NV, requests, wishes.early)
        if wishes.penalized:
            self._penalize(logits_NV, requests, wishes.penalized)
        if not wishes.random:
            token_ids_N = likeliest(logits_NV)
        elif len(wishes.random) == len(requests):
            token_ids_N = self._draw(logits_NV, requests, wishes.limits)
        else:
            token_ids_N = likeliest(logits_NV)
            drawn_M = self._draw(
                logits_NV.index_select(0, wishes.random_M),
                [requests[row] for row in wishes.random],
                wishes.limits,
            )
            token_ids_N.index_copy_(0, wishes.random_M, drawn_M)
        report = None if logprobs_LV is None else _report(logprobs_LV, token_ids_N, wishes)
        return Sampled(token_ids_N, _to_host(token_ids_N), report)

    def _draw(
        self, logits_NV: torch.Tensor, requests: Sequence[Request], limits: _Limits
    ) -> torch.Tensor:
        """One token of each row by chance, NOT_A_NUMBER for NaN. Overwrites the logits."""
        uniforms = np.array([self._uniform(request) for request in requests], dtype=np.float32)
        weights_NV = _likely(logits_NV, limits)
        cdf_NV = weights_NV.cumsum(dim=-1)
        sums_N1 = cdf_NV[:, -1:]
        target_N1 = sums_N1 * _on(cdf_NV.device, uniforms).unsqueeze(1)
        # The first token past the target has a weight: the target is below the last sum.
        token_ids_N1 = torch.searchsorted(cdf_NV, target_N1, right=True)
        return token_ids_N1.masked_fill_(sums_N1.isnan(), NOT_A_NUMBER).flatten()

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

    def _penalize(
        self, logits_NV: torch.Tensor, requests: Sequence[Request], rows: Sequence[int]
    ) -> None:
        """Weigh tokens that were seen before; only they are touched."""
        histories = [self._history(requests[row]) for row in rows]
        lengths = [len(history.ids) for history in histories]
        samplings = [requests[row].sampling for row in rows]
        penalties = np.array(
            [
                [s.repetition_penalty for s in samplings],
                [s.presence_penalty for s in samplings],
                [s.frequency_penalty for s in samplings],
            ],
            dtype=np.float32,
        )
        counts = np.concatenate([history.counts for history in histories])
        facts = np.concatenate([np.repeat(penalties, lengths, axis=1), counts[None]])
        repetition_M, presence_M, frequency_M, counts_M = _on(logits_NV.device, facts)
        # As indices into the flat logits: a gather and a scatter of one dimension are quick.
        starts_M = np.repeat(np.array(rows) * logits_NV.shape[1], lengths)
        where_M = _on(
            logits_NV.device, starts_M + np.concatenate([history.ids for history in histories])
        )
        values_M = logits_NV.view(-1).index_select(0, where_M)
        values_M = values_M.clamp(min=0) / repetition_M + values_M.clamp(max=0) * repetition_M
        values_M -= frequency_M * counts_M + presence_M * counts_M.clamp(max=1)
        logits_NV.view(-1).index_copy_(0, where_M, values_M)


def _report(logprobs_LV: torch.Tensor, token_ids_N: torch.Tensor, wishes: _Wishes) -> _Report:
    chosen_L1 = token_ids_N.index_select(0, wishes.reported_L).clamp_(min=0).unsqueeze(1)
    counts = [wishes.requests[row].sampling.logprobs or 0 for row in wishes.reported]
    chosen_L = logprobs_LV.gather(1, chosen_L1).flatten()
    top_LX, top_ids_LX = logprobs_LV.topk(min(max(counts), logprobs_LV.shape[1]))
    return _Report(wishes.reported, counts, *map(_to_host, (chosen_L, top_ids_LX, top_LX)))


def _to_host(values: torch.Tensor) -> torch.Tensor:
    """In pinned memory, once the device's stream has come so far."""
    return values.to("cpu", non_blocking=True)


def _mask_early_ends(
    logits_NV: torch.Tensor, requests: Sequence[Request], rows: Sequence[int]
) -> None:
    """No token may end a request before its min_tokens."""
    width = logits_NV.shape[1]
    where = [
        row * width + token_id
        for row in rows
        if requests[row].num_outputs < requests[row].sampling.min_tokens
        for token_id in requests[row].sampling.end_token_ids
        if token_id < width
    ]
    if where:
        where_M = _on(logits_NV.device, np.array(where))
        logits_NV.view(-1).index_fill_(0, where_M, -torch.inf)


def _likely(logits_NV: torch.Tensor, limits: _Limits) -> torch.Tensor:
    """Probabilities, up to a factor a row, with zeros for what min_p, top_k and top_p cut off.

    Each of them is a threshold: equally likely tokens stay or go together, so that the result
    does not depend on how a sort breaks ties. Overwrites the logits.
    """
    probs_NV = logits_NV.div_(limits.temperature_N1).softmax(dim=-1)
    if limits.any_min_p:
        _zero_below(probs_NV, limits.min_p_N1 * probs_NV.amax(dim=-1, keepdim=True))
    if limits.any_nucleus:
        _zero_below(probs_NV, _nucleus_floor(probs_NV, limits))
    return probs_NV


def _nucleus_floor(probs_NV: torch.Tensor, limits: _Limits) -> torch.Tensor:
    """The least probability in the smallest set of mass top_p of the top_k."""
    ascending_NV = _sort(probs_NV)
    if limits.any_top_k:
        _zero_below(ascending_NV, ascending_NV.gather(1, limits.kth_N1))
    cdf_NV = ascending_NV.cumsum(dim=-1)
    # What may go: the least likely tokens, as long as their mass is at most 1 - top_p.
    num_cut_N1 = torch.searchsorted(cdf_NV, cdf_NV[:, -1:] * (1 - limits.top_p_N1), right=True)
    return ascending_NV.gather(1, num_cut_N1.clamp_(max=probs_NV.shape[1] - 1))


def _zero_below(x_NV: torch.Tensor, floor_N1: torch.Tensor) -> None:
    """Zero what is below its row's floor, in place."""
    # A mask of floats: on a CPU, many times faster than a boolean one.
    x_NV.mul_(torch.ge(x_NV, floor_N1, out=torch.empty_like(x_NV)))


def _sort(x_NV: torch.Tensor) -> torch.Tensor:
    """Each row ascending. On a CPU by NumPy, which is many times faster at it."""
    if x_NV.device.type == "cpu":
        return torch.from_numpy(np.sort(x_NV.numpy(), axis=-1))
    return x_NV.sort(dim=-1).values


def _on(device: torch.device, values: npt.NDArray[Any]) -> torch.Tensor:
    """Bring values there without waiting for what a device is at."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
