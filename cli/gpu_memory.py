"""What of a GPU's memory is spoken for by the others where processes share it.

A gateway that has a GPU for itself fills what is free behind its weights with KV blocks; beside
workers that are still loading, that is not its to take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mesh.config import GatewayConfig, resolve_dtype
from mesh.model_config import ModelConfig

_PROCESS_BYTES = 1 << 30
"""CUDA's context, the libraries' workspaces, buffers of rows and activations."""


def reserved_bytes(
    model: ModelConfig,
    config: GatewayConfig,
    gateway_devices: Sequence[str],
    worker_devices: Sequence[str],
    experts_per_worker: int,
) -> list[int]:
    """What the workers on each gateway's GPU will take, weights and all; 0 without a GPU."""
    dtype = resolve_dtype(config.dtype, config.device, model.dtype)
    held_bytes = len(model.moe_layers) * experts_per_worker * model.expert_bytes(dtype)
    workers = Counter(device for device in worker_devices if device.startswith("cuda"))
    return [workers[device] * (held_bytes + _PROCESS_BYTES) for device in gateway_devices]
