"""A worker's data plane in a process of its own, told what to do in JSON lines on stdin."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from mesh.plan import ExpertId
from mesh.transport.ucx import UcxTransport
from tests.rig import Worker


def main() -> None:
    torch.set_num_threads(1)
    worker_id, max_rows, *experts = sys.argv[1:]
    worker = Worker(
        worker_id,
        UcxTransport,
        [ExpertId(*map(int, expert.split("."))) for expert in experts],
        max_rows=int(max_rows),
    )
    print(json.dumps({"address": worker.address.hex()}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "connect" in order:
            address = bytes.fromhex(order["connect"])
            answer: object = worker.plane.connect("gateway", address, order["reply_session"])
        elif "stats" in order:
            stats = worker.plane.stats()
            answer = {"refused": stats.refused, "sessions": stats.sessions, "busy": stats.busy}
        else:
            cpu = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
            answer = (int(cpu[11]) + int(cpu[12])) / 100
        print(json.dumps({"answer": answer}), flush=True)
    worker.plane.stop()


if __name__ == "__main__":
    main()
