"""Models of any size with random weights that no file holds: each tensor follows from its name.

Workers are ``python -m benchmarks.random_model``, as :mod:`cli.layer_worker` but for a whole model.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from cli.bench_mesh import BenchWorkers, bench_workers
from cli.layer_worker import answer_asked
from expert_worker.expert_mlp import load_expert
from expert_worker.expert_store import ExpertStore
from mesh.checkpoint import INDEX_FILE, Checkpoint
from mesh.config import WorkerConfig, resolve_dtype
from mesh.device import open_device
from mesh.errors import ConfigError
from mesh.model_config import GroupedAttention, ModelConfig
from mesh.plan import ExpertId
from mesh.telemetry import configure_logging
from placement.rules import possible_shards

_ADDS = re.compile(r"\.(o_proj|down_proj|w2)\.")
_ADDED = 0.2


class RandomCheckpoint:
    """What a decoder and a worker ask of :class:`mesh.checkpoint.Checkpoint`."""

    directory = Path("random")

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Ones for a norm, else normal and scaled so that activations stay about one; numbers that
        bfloat16 has, as in checkpoints.

        What a layer adds is a fraction of what tokens are: else they become alike, and a router
        sends most of them the same way, which training sees to that it doesn't.
        """
        if "norm" in name:
            return torch.ones(shape, device=self._device, dtype=dtype)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        made = torch.empty(shape, device=self._device)
        std = 1.0 if "embed" in name else shape[-1] ** -0.5
        made.normal_(std=_ADDED * std if _ADDS.search(name) else std, generator=generator)
        return made.bfloat16().to(dtype or torch.float32)

    def slice(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor to take a part of."""
        return self.tensor(name, shape)

    def __contains__(self, name: str) -> bool:
        return "experts.gate_up_proj" not in name

    def __iter__(self) -> Iterator[str]:
        return iter(())


def checkpoint_on(device: torch.device) -> Checkpoint:
    """A random one, to be taken for a real one."""
    return cast(Checkpoint, RandomCheckpoint(device))


def dtype_on(device: torch.device, config: ModelConfig) -> torch.dtype:
    """The model's; a CPU is for seeing that it runs, and that tokens are the same."""
    dtype: torch.dtype = getattr(torch, resolve_dtype("auto", device.type, config.dtype))
    return dtype


def save_random(settings: dict[str, Any], directory: Path, device: torch.device) -> None:
    """The same weights as files, a layer in each, for who must read them: of Mixtral's kind or
    with plain experts."""
    checkpoint, config = RandomCheckpoint(device), config_of(settings)
    dtype, width, vocab = dtype_on(device, config), config.hidden_size, config.vocab_size
    files: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens": (vocab, width), "model.norm": (width,), "lm_head": (vocab, width)}
    ]
    for layer in range(config.num_layers):
        shapes = _layer_shapes(config, layer)
        files.append({f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()})
    where = {}
    for number, file in enumerate(files):
        tensors = {f"{n}.weight": shape for n, shape in file.items()}
        # A router's weights follow from the name that a decoder looks for first.
        made = {
            n: checkpoint.tensor(
                n.replace("block_sparse_moe.gate", "mlp.gate"), shape, dtype=dtype
            ).cpu()
            for n, shape in tensors.items()
        }
        save_file(made, directory / f"part-{number}.safetensors", {"format": "pt"})
        where |= dict.fromkeys(made, f"part-{number}.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    name = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(settings | {"torch_dtype": name}))


def _layer_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    attention, width = config.attention, config.hidden_size
    assert isinstance(attention, GroupedAttention)
    q, kv = (n * attention.head_dim for n in (attention.num_heads, attention.num_kv_heads))
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (q, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, q),
    }
    gated = config.expert_kind == "gated"
    into, back = (("w1", "w3"), "w2") if gated else (("up_proj",), "down_proj")
    if layer not in config.moe_layers:
        mlps, hidden = ["mlp"], config.dense_hidden_size
    else:
        block = "block_sparse_moe" if gated else "mlp"
        shapes[f"{block}.gate"] = (config.num_experts, width)
        mlps = [f"{block}.experts.{index}" for index in range(config.num_experts)]
        hidden = config.expert_hidden_size
    for mlp in mlps:
        shapes |= {f"{mlp}.{part}": (hidden, width) for part in into}
        shapes[f"{mlp}.{back}"] = (width, hidden)
    return shapes


def config_of(settings: dict[str, Any]) -> ModelConfig:
    """The model that a config.json of these settings describes."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(settings))
        (Path(directory) / INDEX_FILE).write_text(json.dumps({"weight_map": {}}))
        return ModelConfig.from_hf(Path(directory))


@contextmanager
def workers_of(
    settings: dict[str, Any],
    num_workers: int,
    device: torch.device,
    shards: int = 1,
) -> Iterator[BenchWorkers]:
    """Workers that hold every expert between them, each cut into ``shards``; on GPUs they take them
    in turn. Messages are as long as those of workers that are served."""
    config = config_of(settings)
    if shards not in possible_shards(config.num_experts, config.expert_hidden_size):
        raise ConfigError(f"{config.num_experts} experts a layer cannot be cut into {shards} each")
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    orders = [
        {
            "settings": settings,
            "number": number,
            "of": num_workers,
            "shards": shards,
            "device": f"cuda:{(number + 1) % gpus}" if gpus else "cpu",
        }
        for number in range(num_workers)
    ]
    held = [_held(config, shards, number, num_workers) for number in range(num_workers)]
    row_bytes = config.hidden_size * dtype_on(device, config).itemsize
    max_rows = WorkerConfig(device=device.type).for_rows(row_bytes).max_rows
    with bench_workers("benchmarks.random_model", orders, held, max_rows, shards) as workers:
        yield workers


def _held(config: ModelConfig, shards: int, number: int, of: int) -> list[ExpertId]:
    """What worker ``number`` of so many holds: every n-th unit, which is slice ``number`` of each
    expert where there are as many slices as workers."""
    mine = range(number, config.num_experts * shards, of)
    return [ExpertId(layer, index) for layer in config.moe_layers for index in mine]


def main() -> None:
    """One worker, until its standard input ends."""
    order = json.loads(sys.argv[1])
    configure_logging("bench-worker", str(order["number"]), "warning")
    config, device = config_of(order["settings"]), open_device(order["device"], behind=True)
    dtype, shards = dtype_on(device, config), order["shards"]
    checkpoint = checkpoint_on(device)
    store = ExpertStore(
        lambda e: load_expert(checkpoint, config, e.layer, e.index, device, dtype, shards),
        expert_bytes=1,
        memory_bytes=1 << 40,
        worker_id=str(order["number"]),
    )
    store.load(_held(config, shards, order["number"], order["of"]))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    answer_asked(
        store,
        hidden_size=config.hidden_size,
        dtype=dtype,
        device=device,
        num_experts=config.num_experts * shards,
        max_rows=order["max_rows"],
        threads=1,
    )


if __name__ == "__main__":
    main()
