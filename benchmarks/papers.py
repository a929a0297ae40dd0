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
share the GPU under MPS. *slices* is ours with every expert cut into as many slices as there are
workers: worker w holds slice w of each, so that it reads a part of a chosen expert's bytes, as in
TP. The baseline is *monolith* on one GPU; on n it is every TP x PP = n (``--side tp2pp2`` for one),
a rank a GPU, and ours has n gateways (``--gateways``), each with its share of the sequences. With
``--device cpu`` everything runs small and in float32, ranks over gloo:
``--model tiny --quick --device cpu --side ours --side slices --side tp2pp2``.
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
from rich.console import Console

from benchmarks.baselines.shards import Split
from benchmarks.gateways import gateways_of
from benchmarks.models import MODELS, model_of
from benchmarks.random_model import checkpoint_on, config_of, dtype_on, save_random, workers_of
from benchmarks.report import agreeing, plot, table_of
from benchmarks.sides import Side, decoder_of, measure, meshed
from benchmarks.work import Work, say, shares
from cli import mps
from cli.child import command_of
from cli.ranks import run_ranks
from mesh.device import open_device
from mesh.errors import ConfigError, MeshError
from mesh.model_config import GroupedAttention
from mesh.telemetry import configure_logging

_OURS = ("ours", "slices", "two")


def sides_on(gpus: int) -> list[str]:
    """What is worth comparing on so many: a model that one GPU holds is not spread over them."""
    if gpus < 2:
        return ["ours", "two", "monolith", "transformers"]
    splits = [split.name for split in Split.all_of(gpus)]
    return ["ours", "slices", "two", *splits, f"transformers-tp{gpus}"]


def ours(
    settings: dict[str, Any],
    workers: int,
    work: Work,
    micro_batches: int,
    where: str,
    gateways: int = 1,
    shards: int = 1,
) -> dict[str, Any]:
    """The mesh, its gateways data-parallel; one alone is in this process."""
    device, config = open_device(where), config_of(settings)
    with workers_of(settings, workers, device, shards) as mesh:
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

    order = {"settings": settings, "work": asdict(work), "split": split.name}
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
        save_random(settings, Path(directory), device)
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
    config = config_of(settings)
    attention = config.attention
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
        list[str] | None,
        typer.Option(
            help="ours, slices (of every expert one a worker), two (always two micro-batches), "
            "monolith, transformers, transformers-tp2, a baseline such as tp2pp2; without, what "
            "there is to compare on so many GPUs."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for papers.json and papers.png.")
    ] = None,
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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    only: Annotated[bool, typer.Option(help="One side of one model, in this process.")] = False,
) -> None:
    """Compare, and print a table for each model."""
    # Two prompts a step: while one's rows are away, the other attends.
    work = Work(8, 10_000, 1_000, 66, (1, 32, 128), 20_000)
    if quick:
        work = Work(2, 200, 50, 10, (1, 4), 512)
    configure_logging("benchmark", "papers", "warning")
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    gateways = gateways or max(1, gpus)
    if only:
        if device == "cpu":
            torch.set_num_threads(1)  # the other sides' processes have one each, too
        (one,) = side or ()
        # Before this process has a context: it must be a client of the service like its workers.
        alone = one in _OURS
        settings, workers = model_of(model[0], device, layers)
        with mps.sharing() if alone else nullcontext(), torch.inference_mode():
            found = _measured(one, settings, workers, work, device, gateways)
            found["layers"] = settings["num_hidden_layers"]
            found["device"] = device if device == "cpu" else torch.cuda.get_device_name()
        print(json.dumps(found), flush=True)
        return
    flags = ["--device", device, "--layers", str(layers), "--gateways", str(gateways)]
    flags += ["--quick"] if quick else []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in model:
        floor = [] if device == "cpu" else ["floor"]
        results[name] = compared(name, [*floor, *(side or sides_on(gpus))], flags)
        if out is not None:
            (out / "papers.json").write_text(json.dumps(results, indent=1))
            plot(results, out / "papers.png")
        if not as_json:
            Console().print(table_of(name, results[name], work.batches))
    if as_json:
        print(json.dumps(results))
    if not all(any("tpot_ms" in found for found in sides.values()) for sides in results.values()):
        raise typer.Exit(1)


def compared(model: str, sides: Sequence[str], flags: Sequence[str]) -> dict[str, Any]:
    """What each side found, and how many of its tokens are those of the first one that has any."""
    results: dict[str, Any] = {}
    first_tokens: list[int] | None = None
    first_whole: list[list[int]] | None = None
    for side in sides:
        say(f"{model}: {side}")
        # A process for each: what one leaves on the GPU, or in its queue, is not the next's.
        command = command_of("benchmarks.papers", "--only", "--model", model, "--side", side)
        done = subprocess.run([*command, *flags], stdout=subprocess.PIPE, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        found = results[side] = json.loads(lines[-1]) if lines else {"failed": "no word"}
        if "tokens" in found:
            first_tokens = first_tokens or found["tokens"]
            found["tokens_agree"] = agreeing([first_tokens], [found["tokens"]])
        # Of the largest batch a side's are many: they are compared, not kept.
        whole = found.pop("batch_tokens", None)
        if whole is not None:
            first_whole = first_whole or whole
            found["batch_tokens_agree"] = agreeing(first_whole, whole)
        say(json.dumps(found)[:700])
    return results


def _measured(
    side: str, settings: dict[str, Any], workers: int, work: Work, device: str, gateways: int
) -> dict[str, Any]:
    try:
        if side == "floor":
            return floors(settings, work)
        if side in _OURS:
            micro_batches, shards = 2 if side == "two" else 1, workers if side == "slices" else 1
            return ours(settings, workers, work, micro_batches, device, gateways, shards)
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
