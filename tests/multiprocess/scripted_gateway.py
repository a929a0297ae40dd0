"""A gateway process whose engine process obeys its prompts. Run with the config as JSON."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from pathlib import Path
from types import ModuleType

from gateway.ipc import EngineChannel
from gateway.service import main
from mesh.config import GatewayConfig
from mesh.errors import CheckpointError, MeshError
from protos import engine_pb2 as pb


def run_engine(config: GatewayConfig, sock: socket.socket) -> int:
    """Prompt token 1: one token and no end; 2: die; 3: one token, then hang; else two tokens."""
    if config.threads == 7:
        raise CheckpointError("the weights are bad; fetch them again")
    channel = EngineChannel(sock)
    started = pb.Started(ucx_address=b"x", max_model_len=64, dtype="float32", kv_blocks=1)
    channel.send(pb.FromEngine(started=started))
    while not channel.closed:
        select.select([channel], [], [])
        for message in channel.recv_all():
            match message.WhichOneof("body"):
                case "submit":
                    _obey(channel, message.submit)
                case "ping":
                    channel.send(pb.FromEngine(stats=pb.EngineStats(pong=message.ping.sequence)))
                case "shutdown":
                    return 0
    return 0


def _obey(channel: EngineChannel, submit: pb.Submit) -> None:
    output = pb.Output(request_id=submit.request_id, token_ids=[5])
    order = submit.prompt_token_ids[0]
    if order == 2:
        os._exit(3)
    if order not in (1, 3):
        output.token_ids.append(6)
        output.finish_reason = "length"
    channel.send(pb.FromEngine(outputs=pb.Outputs(outputs=[output])))
    if order == 3:
        time.sleep(3600)


if __name__ == "__main__":
    fake = ModuleType("gateway.engine_process")
    fake.run_engine = run_engine  # type: ignore[attr-defined]
    sys.modules["gateway.engine_process"] = fake
    fields = json.loads(sys.argv[1])
    try:
        sys.exit(main(GatewayConfig(**{**fields, "model": Path(fields["model"])})))
    except MeshError as error:
        sys.exit(f"error: {error}")
