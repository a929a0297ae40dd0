"""What others wrote, on the same work: ``transformers``, a growing cache, grouped experts."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.work import Work, prompt, say, say_prefill, say_tpot


def measure(rank: int, device: torch.device, order: dict[str, Any]) -> dict[str, Any]:
    """Every cell by its own tensor plan; a rank's part in :func:`cli.ranks.run_ranks`."""
    from transformers import MixtralForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    work = Work(**order["work"])
    model = MixtralForCausalLM.from_pretrained(
        order["directory"],
        dtype="auto",
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
        distributed_config=DistributedConfig(tp_size=dist.get_world_size()),
    ).eval()
    return measure_model(model, work, model.config.vocab_size, device)


def measure_model(model: Any, work: Work, vocab: int, device: torch.device) -> dict[str, Any]:
    """Every cell."""
    found: dict[str, Any] = {"tpot_ms": {}}

    def prefill(count: int, length: int) -> Any:
        ids = torch.tensor([prompt(length, vocab, n) for n in range(count)], device=device)
        return model(ids, use_cache=True, logits_to_keep=1)

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        _synchronize(device)
        began_s = time.perf_counter()
        out = call()
        _synchronize(device)
        return time.perf_counter() - began_s, out

    with torch.inference_mode():
        say("ready")
        prefill(1, work.prefill_len)
        say("warm")
        seconds = [timed(lambda: prefill(1, work.prefill_len))[0] for _ in range(4)]
        found["prefill_tokens_per_s"] = work.prefill_len / median(seconds)
        say_prefill(found)
        for batch in work.batches:
            outs = [prefill(min(8, batch - n), work.decode_len) for n in range(0, batch, 8)]
            cache = outs[0].past_key_values
            for out in outs[1:]:
                for mine, theirs in zip(cache.layers, out.past_key_values.layers, strict=True):
                    mine.keys = torch.cat([mine.keys, theirs.keys])
                    mine.values = torch.cat([mine.values, theirs.values])
            token = torch.cat([out.logits[:, -1] for out in outs]).argmax(-1, keepdim=True)
            if batch > 8:
                token = token[:1].expand(batch, 1).contiguous()
            del outs
            tokens, times = [int(token[0])], []
            for _ in range(min(16, work.num_new - 1)):
                step = partial(model, token, past_key_values=cache, use_cache=True)
                seconds_of, out = timed(step)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                times.append(seconds_of)
                tokens.append(int(token[0]))
            found["tpot_ms"][batch] = median(times[2:]) * 1e3
            say_tpot(found, batch)
            found["tokens"] = found.get("tokens", tokens)
            del cache, out, step
            torch.cuda.empty_cache()
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
