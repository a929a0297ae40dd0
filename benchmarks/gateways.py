"""Several gateways of one mesh, data-parallel: each in a process of its own, on GPUs one on each.

They share nothing but the workers, and step as they please. A gateway is
``python -m benchmarks.gateways ORDER`` and speaks one JSON object a line: ``{"address": hex}`` out,
``{"routing": hex}`` in; then, over and over, ``{"sequences": [...], "length": n, "num_new": n}``
in, ``{"ready": true}`` out, ``{"go": [first, end of the profiled steps]}`` in, a
:class:`benchmarks.sides.Ran` out. It ends when its standard input does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.random_model import config_of
from benchmarks.sides import Ran, Run, meshed
from benchmarks.work import Work, shares
from cli.bench_mesh import BenchWorkers, Child, children
from mesh.device import open_device
from mesh.telemetry import configure_logging
from protos import engine_pb2 as pb


@contextmanager
def gateways_of(
    workers: BenchWorkers,
    settings: dict[str, Any],
    work: Work,
    micro_batches: int,
    device_type: str,
    count: int,
) -> Iterator[Run]:
    """What runs sequences on so many gateways, each its share."""
    gpus = torch.cuda.device_count() if device_type == "cuda" else 0
    orders = [
        {
            "settings": settings,
            "work": asdict(work),
            "micro_batches": micro_batches,
            "device": f"cuda:{number % gpus}" if gpus else "cpu",
            "gateways": count,
        }
        for number in range(count)
    ]
    with children("benchmarks.gateways", orders) as gateways:
        for number, gateway in enumerate(gateways):
            address = bytes.fromhex(gateway.hear()["address"])
            routing = workers.admit(f"bench-{number}", address)
            gateway.tell({"routing": routing.SerializeToString().hex()})
        yield lambda *what: _run(gateways, *what)


def _run(
    gateways: Sequence[Child],
    count: int,
    length: int,
    num_new: int,
    profiled: range = range(0),
) -> list[Ran]:
    busy = []
    for gateway, sequences in zip(gateways, shares(count, len(gateways)), strict=False):
        gateway.tell({"sequences": list(sequences), "length": length, "num_new": num_new})
        busy.append(gateway)
    # Prompts take time to make: no gateway starts before all have theirs.
    for gateway in busy:
        gateway.hear()
    for gateway in busy:
        gateway.tell({"go": [profiled.start, profiled.stop]})
    return [Ran(**gateway.hear()) for gateway in busy]


def _say(word: Mapping[str, Any]) -> None:
    print(json.dumps(word), flush=True)


def _admitted(address: bytes) -> pb.Routing:
    _say({"address": address.hex()})
    return pb.Routing.FromString(bytes.fromhex(json.loads(sys.stdin.readline())["routing"]))


def main() -> None:
    """One gateway, until its standard input ends."""
    order = json.loads(sys.argv[1])
    configure_logging("bench-gateway", order["device"], "warning")
    device, config = open_device(order["device"]), config_of(order["settings"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    work, micro_batches = Work(**order["work"]), order["micro_batches"]
    with (
        torch.inference_mode(),
        meshed(_admitted, config, device, work, micro_batches, order["gateways"]) as side,
    ):
        for line in sys.stdin:
            asked = json.loads(line)
            if "go" in asked:
                _say(asdict(side.go(range(*asked["go"]))))
            else:
                side.submit(**asked)
                _say({"ready": True})


if __name__ == "__main__":
    main()
