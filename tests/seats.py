"""Layers that have seats, as a GPU's graphs have them, on the stand-in for the driver."""

from __future__ import annotations

import ctypes

import torch

from gateway.dispatch import Dispatcher, Placed
from mesh.replay import ReplayDevice
from mesh.transport.base import Transport
from tests.rig import HIDDEN_SIZE, NUM_EXPERTS, make_dispatcher
from tests.stand_in import Graph, Knobs, Placing


def seated_dispatcher(transport: Transport, driver: str, grouped: bool = False) -> Dispatcher:
    """A gateway's dispatcher for the rig's model whose layers can have seats."""
    knobs = Knobs(driver)
    for name, value in {"launched": 0, "ran": 0, "allowed": 1 << 30}.items():
        knobs[name] = value
    dispatcher = make_dispatcher(transport, grouped=grouped)
    dispatcher.ask_by(ReplayDevice(0, driver))
    return dispatcher


class Layer:
    """A layer of a micro-batch, as it is captured: its tensors stay where they are."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        layer: int,
        micro_batch: int,
        num_tokens: int,
        k: int = 2,
        shards: int = 1,
    ) -> None:
        self.dispatcher = dispatcher
        self.x_TD = torch.zeros(num_tokens, HIDDEN_SIZE)
        self.ids_TK = torch.zeros(num_tokens, k, dtype=torch.int64)
        self.weights_TK = torch.zeros(num_tokens, k)
        asks = dispatcher._asks
        assert asks is not None
        units, rows_per_token = NUM_EXPERTS * shards, k * shards
        seat = asks.seat(micro_batch, layer, units, num_tokens * rows_per_token)
        assert seat is not None
        rows_TK = seat.rows_TK(torch.Size((num_tokens, rows_per_token)))
        self.placed = Placed(
            layer, micro_batch, self.x_TD, self.ids_TK, self.weights_TK, rows_TK, seat, dispatcher
        )
        self.placing = Placing(
            x=self.x_TD.data_ptr(),
            ids=self.ids_TK.data_ptr(),
            tables=seat.tables.words.data_ptr(),
            send=dispatcher.arenas[0].data_ptr(),
            rows=rows_TK.data_ptr(),
            counts=seat.counts_E.data_ptr(),
            num_rows=rows_TK.numel(),
            rows_per_token=rows_per_token,
            num_shards=shards,
            num_experts=units,
            width=HIDDEN_SIZE,
        )
        self.graph = Graph(places=ctypes.pointer(self.placing))

    def raw_cuda_graph_exec(self) -> int:
        return ctypes.addressof(self.graph)

    def replay(self) -> None:
        raise AssertionError("a layer with a seat is launched by compiled code")

    def leave(self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> bool:
        """Whether its rows have left by its seat."""
        self._fill(x_TD, ids_TK, weights_TK)
        self.dispatcher.leave(self.placed, self)
        return self.placed.pending is None

    def launch(self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> int:
        """Before it leaves: by which plan."""
        self._fill(x_TD, ids_TK, weights_TK)
        assert self.dispatcher._asks is not None
        plan = self.dispatcher.plan_of(self.placed)
        asking = self.dispatcher._asks._asking
        asking.leave(None, [self.raw_cuda_graph_exec()])  # type: ignore[arg-type]
        return plan

    def _fill(self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        self.x_TD.copy_(x_TD)
        self.ids_TK.copy_(ids_TK)
        self.weights_TK.copy_(weights_TK)

    def come_back(self) -> torch.Tensor:
        self.dispatcher.come_back(self.placed)
        return self._combined()

    def turn(self, then: Layer, *step: torch.Tensor) -> torch.Tensor:
        """Comes back, and another one leaves, of another micro-batch: these have other frames."""
        then._fill(*step)
        self.dispatcher.turn(self.placed, then.placed, then)
        return self._combined()

    def _combined(self) -> torch.Tensor:
        return self.dispatcher.layout.combine(
            self.dispatcher.arenas[1], self.placed.rows_TK, self.weights_TK
        )
