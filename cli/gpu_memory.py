"""What of a GPU's memory is spoken for by the others where processes share it.

A gateway that has a GPU for itself fills what is free behind its weights with KV blocks; beside
workers that are still loading, that is not its to take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mesh.config import GatewayConfig, WorkerConfig, resolve_dtype
from mesh.model_config import BYTES_PER_ELEMENT, ModelConfig

_PROCESS_BYTES = 1 << 30
"""CUDA's context and the libraries' workspaces."""
_UNEVEN = 2
"""Times the rows that a worker has in hand where all have as many: buffers are powers of two."""


def reserved_bytes(
    model: ModelConfig,
    config: GatewayConfig,
    gateway_devices: Sequence[str],
    worker_devices: Sequence[str],
    experts_per_worker: int,
    worker: WorkerConfig,
) -> list[int]:
    """What the workers on each gateway's GPU will take: weights, the rows of a step of all
    gateways, what an expert makes of its largest batch; 0 without a GPU."""
    dtype = resolve_dtype(config.dtype, config.device, model.dtype)
    held_bytes = len(model.moe_layers) * experts_per_worker * model.expert_bytes(dtype)
    routed = len(gateway_devices) * config.max_batch_tokens * model.experts_per_token
    in_hand = _UNEVEN * routed // max(1, len(worker_devices))
    width = model.hidden_size + 3 * model.expert_hidden_size
    merge_rows = worker.for_rows(model.hidden_size * BYTES_PER_ELEMENT[dtype]).merge_rows
    elements = in_hand * model.hidden_size + merge_rows * width
    workers = Counter(device for device in worker_devices if device.startswith("cuda"))
    each = held_bytes + elements * BYTES_PER_ELEMENT[dtype] + _PROCESS_BYTES
    return [workers[device] * each for device in gateway_devices]
