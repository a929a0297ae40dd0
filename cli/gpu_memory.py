"""What of a GPU's memory is spoken for by the others where processes share it.

A gateway that has a GPU for itself fills what is free behind its weights with KV blocks; beside
workers that are still loading, that is not its to take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mesh.config import GatewayConfig, resolve_dtype
from mesh.model_config import BYTES_PER_ELEMENT, ModelConfig

_PROCESS_BYTES = 1 << 30
"""CUDA's context and the libraries' workspaces."""
_ROWS_IN_HAND = 4
"""Times the largest batch, that rows come, wait and leave; of what an expert makes of them, one."""


def reserved_bytes(
    model: ModelConfig,
    config: GatewayConfig,
    gateway_devices: Sequence[str],
    worker_devices: Sequence[str],
    experts_per_worker: int,
    merge_rows: int,
) -> list[int]:
    """What the workers on each gateway's GPU will take, weights, largest batches (``merge_rows``)
    and all; 0 without a GPU."""
    dtype = resolve_dtype(config.dtype, config.device, model.dtype)
    held_bytes = len(model.moe_layers) * experts_per_worker * model.expert_bytes(dtype)
    width = _ROWS_IN_HAND * model.hidden_size + 3 * model.expert_hidden_size
    rows_bytes = merge_rows * width * BYTES_PER_ELEMENT[dtype]
    workers = Counter(device for device in worker_devices if device.startswith("cuda"))
    each = held_bytes + rows_bytes + _PROCESS_BYTES
    return [workers[device] * each for device in gateway_devices]
