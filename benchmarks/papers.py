"""The papers' comparison on the GPUs there are: a mesh, a monolith and ``transformers``.

    python -m benchmarks.papers --model one --model many

One model, random weights, the same for all three, whose greedy tokens are compared first. Prefill
in tokens/s over prompts of 10,000; decoding in ms a token (TPOT) with 1, 32 and 128 sequences
behind prompts of 1,000. Ours and the monolith are driven through the engine (scheduler, sampler
and all) without the front; ``transformers`` by hand with a growing cache.

The floor of TPOT is the bytes that a step must read (weights that have rows, keys and values)
over the bandwidth that a copy reaches in the same run.

``plain``, ``wide`` and ``deep`` are the papers' three models, their experts two matrices; ``one``
is the first with gated experts, which other systems have too. Each has an expert a GPU, as in the
papers: on one GPU that is a dense model. ``many`` is their 16 x 16 with as many workers, which
share the GPU under MPS. The baseline is *monolith* on one GPU; on n it is every TP x PP = n
(``--baseline tp2pp2`` for one), a rank a GPU, and ours has n gateways (``--gateways``), each with
its share of the sequences. With ``--device cpu`` everything runs small and in float32, ranks over
gloo: ``--model tiny --quick --device cpu --baseline tp2pp2``.
"""

from __future__ import annotations

import gc
import json
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks.baselines.shards import Split
from benchmarks.gateways import gateways_of, quiet
from benchmarks.random_model import checkpoint_on, config_of, save_random, workers_of
from benchmarks.sides import Side, decoder_of, dtype_on, measure, meshed
from benchmarks.work import Work, shares
from cli import mps
from cli.child import command_of
from cli.ranks import run_ranks
from mesh.device import open_device
from mesh.errors import ConfigError, MeshError
from mesh.model_config import GroupedAttention

_PAPERS = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_PLAIN = {
    "model_type": "expert_mesh_plain",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 16384,
    "num_local_experts": 1,
    "num_experts_per_tok": 1,
    "torch_dtype": "bfloat16",
}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": (_PLAIN, 1),
    "wide": (
        _PLAIN
        | {
            "hidden_size": 8192,
            "intermediate_size": 32768,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "head_dim": 512,
            "torch_dtype": "float16",
        },
        1,
    ),
    "deep": (
        _PLAIN
        | {
            "hidden_size": 7168,
            "intermediate_size": 2048,
            "dense_intermediate_size": 18432,
            "num_hidden_layers": 61,
            "first_k_dense_replace": 3,
            "num_attention_heads": 128,
        },
        1,
    ),
    "one": (_PAPERS | {"num_local_experts": 1, "num_experts_per_tok": 1}, 1),
    "many": (_PAPERS | {"num_local_experts": 16, "num_experts_per_tok": 2}, 16),
    "colocated": (
        _PAPERS
        | {
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "hidden_size": 2048,
            "intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
        1,
    ),
    "tiny": (
        _PAPERS
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 256,
        },
        2,
    ),
}


_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "head_dim": 8,
    "vocab_size": 256,
}


def model_of(name: str, device: str, layers: int = 0) -> tuple[dict[str, Any], int]:
    """Its settings and number of workers: with several GPUs one each, and of models of one expert
    an expert each. On a CPU it is narrow and shallow, its experts as many. ``layers``: fewer."""
    settings, workers = MODELS[name]
    if device == "cpu":
        dense = settings.get("first_k_dense_replace", 0)
        small = _SMALL | {"num_hidden_layers": dense + _SMALL["num_hidden_layers"]}
        if "dense_intermediate_size" in settings:
            small["dense_intermediate_size"] = 192
        if "num_key_value_heads" in settings:
            small["num_key_value_heads"] = min(8, settings["num_key_value_heads"])
        settings = settings | small
    else:
        gpus = torch.cuda.device_count()
        if settings["num_local_experts"] == 1:
            settings = settings | {"num_local_experts": max(1, gpus)}
        workers = max(workers, gpus)
    return settings | ({"num_hidden_layers": layers} if layers else {}), workers


def ours(
    settings: dict[str, Any],
    workers: int,
    work: Work,
    micro_batches: int,
    where: str,
    gateways: int = 1,
) -> dict[str, Any]:
    """The mesh, its gateways data-parallel; one alone is in this process."""
    device, config = open_device(where), config_of(settings)
    dtype_name = str(dtype_on(device, config)).removeprefix("torch.")
    with workers_of(settings, workers, device, dtype_name, work.max_batch_tokens) as mesh:
        if gateways == 1:
            admit = partial(mesh.admit, "bench")
            with meshed(admit, config, device, work, micro_batches) as side:
                return measure(side.run, work, 1)
        with gateways_of(mesh, settings, work, micro_batches, device.type, gateways) as run:
            found = measure(run, work, gateways)
    busy = {batch: len(shares(batch, gateways)) for batch in work.batches}
    return found | {"gateways": gateways, "gateways_of_batch": busy}


def monolith(settings: dict[str, Any], work: Work, where: str) -> dict[str, Any]:
    """The baseline on one device."""
    from benchmarks.baselines.monolith import ExpertsHere, WholeStep

    device, config = open_device(where), config_of(settings)
    with decoder_of(config, device, work) as (decoder, kv):
        experts: Any = ExpertsHere(config, checkpoint_on(device), device, dtype_on(device, config))
        if device.type == "cuda":
            graphs: Any = WholeStep(decoder, kv, experts, work.max_len)
            decoder.use_graphs(graphs)
        side = Side(config, decoder, kv, experts, work)
        return measure(side.run, work, 1)


def parallel(settings: dict[str, Any], work: Work, split: Split, where: str) -> dict[str, Any]:
    """The baseline on as many devices as the split has ranks."""
    from benchmarks.baselines.parallel import measure

    dtype = str(dtype_on(torch.device(where), config_of(settings))).removeprefix("torch.")
    order = {"settings": settings, "work": asdict(work), "split": split.name, "dtype": dtype}
    found: dict[str, Any] = run_ranks(measure, split.num_ranks, where, order)
    return found


def transformers(settings: dict[str, Any], work: Work, where: str) -> dict[str, Any]:
    """The peer, its weights under the same names."""
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    from benchmarks.baselines.transformers_peer import measure_model

    _require_peer(settings)
    device = open_device(where)
    dtype = dtype_on(device, config_of(settings))
    kept = {k: v for k, v in settings.items() if k not in ("architectures", "torch_dtype")}
    config = MixtralConfig(**kept, dtype=dtype, attn_implementation="sdpa")
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        model = MixtralForCausalLM(config).eval()
    model.to(dtype).to_empty(device=device)
    model.model.rotary_emb = MixtralRotaryEmbedding(config).to(device)
    checkpoint = checkpoint_on(device)
    for name, parameter in model.named_parameters():
        block, _, last = name.rpartition(".")
        hidden = (settings["intermediate_size"], settings["hidden_size"])
        if last == "gate_up_proj":
            for index in range(len(parameter)):
                for half, part in enumerate(("w1", "w3")):
                    at = slice(half * hidden[0], (half + 1) * hidden[0])
                    stored = _stored(block, index, part)
                    parameter.data[index, at] = checkpoint.tensor(stored, hidden)
        elif last == "down_proj":
            for index in range(len(parameter)):
                stored = _stored(block, index, "w2")
                parameter.data[index] = checkpoint.tensor(stored, hidden[::-1])
        else:
            parameter.data.copy_(checkpoint.tensor(name, tuple(parameter.shape)))
    return measure_model(model, work, settings["vocab_size"], device)


def transformers_tp(settings: dict[str, Any], work: Work, ranks: int, where: str) -> dict[str, Any]:
    """The peer by its own tensor plan, from a checkpoint that it reads itself."""
    from benchmarks.baselines.transformers_peer import measure

    _require_peer(settings)
    with tempfile.TemporaryDirectory() as directory:
        device = open_device(where)
        save_random(settings, Path(directory), device, dtype_on(device, config_of(settings)))
        order = {"directory": directory, "work": asdict(work)}
        found: dict[str, Any] = run_ranks(measure, ranks, where, order)
    return found


def _require_peer(settings: dict[str, Any]) -> None:
    if settings["model_type"] != "mixtral":
        raise ConfigError("transformers has no model whose experts are two matrices")


def _stored(block: str, index: int, part: str) -> str:
    layer = block.split(".")[2]
    return f"model.layers.{layer}.block_sparse_moe.experts.{index}.{part}.weight"


def floors(settings: dict[str, Any], work: Work) -> dict[str, Any]:
    """TPOT that reading alone takes, and the share of a GEMM's rate that prefill is."""
    a = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    copy_s, gemm_s = _seconds(lambda: b.copy_(a)), _seconds(lambda: square @ square)
    bytes_per_s, flops = 2 * a.nbytes / copy_s, 2 * 8192**3 / gemm_s
    config, attention = config_of(settings), config_of(settings).attention
    assert isinstance(attention, GroupedAttention)
    d, layers, k = config.hidden_size, config.num_layers, config.experts_per_token
    matrices = 3 if config.expert_kind == "gated" else 2
    expert, dense = (
        matrices * d * h for h in (config.expert_hidden_size, config.dense_hidden_size)
    )
    num_moe, experts = len(config.moe_layers), config.num_experts
    q_width = attention.num_heads * attention.head_dim
    kv_width = 2 * attention.num_kv_heads * attention.head_dim
    here = layers * d * (2 * q_width + kv_width) + (layers - num_moe) * dense
    tpot = {}
    for batch in work.batches:
        touched = experts * (1 - (1 - k / experts) ** batch)
        weights = here + num_moe * touched * expert + config.vocab_size * d
        context = work.decode_len + work.num_new / 2
        kv = batch * layers * kv_width * context
        tpot[batch] = 2 * (weights + kv) / bytes_per_s * 1e3
    per_token = 2 * (here + num_moe * k * expert + layers * q_width * work.prefill_len)
    return {
        "tpot_ms": tpot,
        "prefill_tokens_per_s": flops / per_token,
        "tb_per_s": bytes_per_s / 1e12,
        "tflops": flops / 1e12,
    }


def _seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times[2:])


def main(
    model: Annotated[list[str], typer.Option(help=", ".join(MODELS))] = ["one"],  # noqa: B006
    side: Annotated[
        list[str],
        typer.Option(
            help="ours, two, monolith, transformers, transformers-tp2, a baseline such as tp2pp2"
        ),
    ] = ["ours", "two", "monolith", "transformers"],  # noqa: B006
    baseline: Annotated[
        list[str] | None, typer.Option(help="Splits; without, all of the number of GPUs.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes too.")] = None,
    device: Annotated[
        str, typer.Option(help="cpu: small and in float32, to see that it runs.")
    ] = "cuda",
    quick: Annotated[bool, typer.Option(help="Small, to see that it runs.")] = False,
    layers: Annotated[
        int, typer.Option(min=0, help="Fewer than the model has, where memory forces it; 0: all.")
    ] = 0,
    gateways: Annotated[
        int, typer.Option(min=0, help="Of our own side; 0: one a GPU, on a CPU one.")
    ] = 0,
    only: Annotated[bool, typer.Option(help="One side of one model, in this process.")] = False,
) -> None:
    """Compare, and print a line for each side."""
    work = Work(8, 10_000, 1_000, 66, (1, 32, 128), 10_000)
    if quick:
        work = Work(2, 200, 50, 10, (1, 4), 512)
    quiet()
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    gateways = gateways or max(1, gpus)
    if only:
        if device == "cpu":
            torch.set_num_threads(1)  # the other sides' processes have one each, too
        # Before this process has a context: it must be a client of the service like its workers.
        alone = side[0] in ("ours", "two")
        settings, workers = model_of(model[0], device, layers)
        with mps.sharing() if alone else nullcontext(), torch.inference_mode():
            found = _measured(side[0], settings, workers, work, device, gateways)
            found["device"] = device if device == "cpu" else torch.cuda.get_device_name()
        print(json.dumps(found), flush=True)
        return
    splits = baseline or [split.name for split in Split.all_of(gpus) if gpus > 1]
    peers = [f"transformers-tp{gpus}"] if gpus > 1 else []
    side = [*side, *peers, *(Split.parse(split).name for split in splits)]
    results: dict[str, Any] = {}
    for name in model:
        results[name] = {}
        first_whole: list[list[int]] | None = None
        for one in (*(["floor"] if device != "cpu" else []), *side):
            # A process for each: what one leaves on the GPU, or in its queue, is not the next's.
            command = command_of("benchmarks.papers", "--only", "--model", name)
            command += ["--side", one, "--device", device, "--layers", str(layers)]
            command += ["--gateways", str(gateways)]
            command += ["--quick"] if quick else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            found = results[name][one] = json.loads(lines[-1]) if lines else {"failed": "no word"}
            if layers:
                found["layers"] = layers
            # Of the largest batch a side's are many: they are compared, not kept.
            whole = found.pop("batch_tokens", None)
            if "tokens" in found:
                first = next(
                    other["tokens"] for other in results[name].values() if "tokens" in other
                )
                found["tokens_agree"] = agreeing([first], [found["tokens"]])
            if whole is not None:
                first_whole = first_whole or whole
                found["batch_tokens_agree"] = agreeing(first_whole, whole)
            print(f"{name:10} {one:13}", json.dumps(found)[:700], flush=True)
            if out is not None:
                out.write_text(json.dumps(results, indent=1))


def agreeing(some: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> str:
    """How many tokens are equal from the start of each sequence on, of how many both have."""
    equal = total = 0
    for one, other in zip(some, others, strict=True):
        pairs = list(zip(one, other, strict=False))
        equal += next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
        total += len(pairs)
    return f"{equal} of {total}"


def _measured(
    side: str, settings: dict[str, Any], workers: int, work: Work, device: str, gateways: int
) -> dict[str, Any]:
    try:
        if side == "floor":
            return floors(settings, work)
        if side in ("ours", "two"):
            return ours(settings, workers, work, 1 if side == "ours" else 2, device, gateways)
        if side in ("monolith", "transformers"):
            return (monolith if side == "monolith" else transformers)(settings, work, device)
        if side.startswith("transformers-tp"):
            ranks = int(side.removeprefix("transformers-tp"))
            return transformers_tp(settings, work, ranks, device)
        return parallel(settings, work, Split.parse(side), device)
    except MeshError as error:  # it says what is not to be had
        return {"failed": str(error)}
    except (Exception, SystemExit) as error:  # the other sides are still worth having
        traceback.print_exc()
        return {"failed": repr(error)[:300]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)
