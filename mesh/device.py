"""The device that a process computes on."""

from __future__ import annotations

import torch

from mesh.errors import ConfigError


def open_device(name: str) -> torch.device:
    """The device that ``--device`` names; ConfigError when this machine has none such."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is none of cpu, cuda, cuda:N") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(
                f"device {name!r} is not there: this process sees {count} CUDA devices; "
                "see CUDA_VISIBLE_DEVICES, or use --device cpu"
            )
        device = torch.device("cuda", device.index or 0)
    return device
