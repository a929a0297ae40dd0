"""The device that a process computes on."""

from __future__ import annotations

import os

import torch

from mesh.errors import ConfigError

_MPS_PRIORITY = "CUDA_MPS_CLIENT_PRIORITY"
_BELOW_NORMAL = "1"


def open_device(name: str, *, behind: bool = False) -> torch.device:
    """The device that ``--device`` names; ConfigError when this machine has none such.

    ``behind``: where a GPU is shared, what other processes launch on it goes first. To be said
    before this process uses CUDA.
    """
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
        if behind:
            os.environ.setdefault(_MPS_PRIORITY, _BELOW_NORMAL)
    return device
