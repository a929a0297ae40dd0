"""Layers that leave in one compiled call, to workers that are processes: deaths and hangs."""

from __future__ import annotations

import signal

import pytest
import torch

from mesh.transport.ucx import UcxTransport
from protos import engine_pb2, placement_pb2
from tests.multiprocess.test_ucx import ALL, Process
from tests.rig import expected, random_step
from tests.seats import Layer, seated_dispatcher
from tests.stand_in import compiled

NUM_TOKENS = 4


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_costs_nothing_but_a_pause_where_there_is_a_replica(
    tmp_path_factory: pytest.TempPathFactory, how: signal.Signals
) -> None:
    workers = [Process(name, ALL) for name in ("doomed", "fine")]
    transport = UcxTransport()
    dispatcher = seated_dispatcher(transport, compiled(tmp_path_factory.mktemp("driver")))
    routing = engine_pb2.Routing(epoch=1)
    for number, worker in enumerate(workers):
        worker.wait_started()
        session = worker.ask(connect=transport.address.hex(), reply_session=number)
        routing.peers.add(
            worker_id=worker.worker_id,
            ucx_address=worker.address,
            session=session,
            reply_session=number,
            max_rows=worker.max_rows,
        )
    for expert in ALL:
        routing.experts.add(
            expert=placement_pb2.ExpertId(layer=expert.layer, index=expert.index),
            worker_ids=["doomed", "fine"],
        )
    dispatcher.set_routing(routing)
    layer, left = Layer(dispatcher, 0, 0, NUM_TOKENS), []
    for seed in range(600):
        if seed == 200:
            workers[0].process.send_signal(how)
            if how == signal.SIGKILL:
                workers[0].process.wait()  # a zombie counts as alive
        step = random_step(NUM_TOKENS, seed=seed)
        dispatcher.begin_step(1)
        left.append(layer.leave(*step))
        torch.testing.assert_close(layer.come_back(), expected(0, *step))
    assert dispatcher.void_rows() == {}
    peers = dispatcher.peers
    noted = peers.take_lost() if how == signal.SIGKILL else peers.take_late()
    assert {one.worker_id for one in noted} == {"doomed"}
    assert all(left[:200])
    assert all(left[-200:])
    for worker in workers:
        worker.kill()
    dispatcher.close()
    transport.close()
