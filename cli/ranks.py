"""Processes that talk through ``torch.distributed``, one a rank: NCCL on GPUs, gloo on CPUs."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

Work = Callable[[int, torch.device, Any], Any]
"""What a rank does: its number, its device and the order; what it answers must be JSON."""

_STUCK_S = 300.0


def run_ranks(work: Work, num_ranks: int, device: str, order: Any) -> Any:
    """What rank 0 answers. ``work`` is a function of a module; ``order`` must be JSON.

    Ranks end together: when one fails, its error is raised and the others are ended; and when
    this process is gone, they go too.
    """
    with tempfile.TemporaryDirectory() as directory:
        processes = start_processes(
            _rank,
            (work, num_ranks, device, json.dumps(order), directory),
            nprocs=num_ranks,
            join=False,
            daemon=True,
            start_method="spawn",
        )
        try:
            while not processes.join():
                pass
        finally:
            for process in processes.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return json.loads((Path(directory) / "answer").read_text())


def _rank(
    rank: int, work: Work, num_ranks: int, device_name: str, order: str, directory: str
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # NVLink multicast hangs in some virtual machines.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    # Libraries that were not told ask the environment which rank they are.
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks}
    os.environ |= {name: str(value) for name, value in places.items()}
    device = torch.device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=_STUCK_S),
    )
    with torch.inference_mode():
        answer = work(rank, device, json.loads(order))
    if rank == 0:
        (Path(directory) / "answer").write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
