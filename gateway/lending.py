"""Rows that stay where they are: a worker on this host reads and answers them in our own arenas.

What a gateway lends to a worker's device saves the copies of a message, and the rendezvous around
them. The worker writes there at its own time, so a *permit* goes along, which it looks at when it
writes: taken back, nothing of what that worker still computes lands in rows that are others' then.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

import structlog
import torch

from gateway.peers import Peer
from mesh import native, wire
from mesh.errors import Unavailable
from mesh.replay import ReplayDevice
from mesh.transport.base import Buffer, Request, Transport

log = structlog.get_logger()

_MAX_PERMITS = 1 << 12
_ARENAS = int(wire.Kind.ARENAS)


@dataclass(frozen=True)
class _Offer:
    """What a peer was told, until the transport is done with it."""

    buffer: Buffer
    request: Request


class Lending:
    """What is lent to whom. One thread owns it.

    Raises Unavailable where the device's memory cannot be lent.
    """

    def __init__(self, transport: Transport, replays: ReplayDevice, device: torch.device) -> None:
        self._transport = transport
        self._replays = replays
        self._device = device
        self._permits_P = torch.zeros(_MAX_PERMITS, dtype=torch.int64, device=device)
        replays.share(self._permits_P)
        self._free = list(range(_MAX_PERMITS))
        self._permit_of: dict[int, int] = {}
        self._version = 0
        self._lent: tuple[torch.Tensor, torch.Tensor] | None = None
        self._offers: list[_Offer] = []
        self._offered: set[int] = set()

    def lend(self, peers: Iterable[Peer], arenas: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Offer where rows leave from and come back to, to those who do not know it yet.

        ``peer.by_reference`` follows when each has answered. Arenas that were lent before stay as
        long as anything is away by reference.
        """
        if self._lent is None or self._lent[0] is not arenas[0]:
            self._lent = arenas
            self._offered.clear()
            self._version = (self._version + 1) % wire.MAX_SLOTS
        self._offers = [offer for offer in self._offers if not offer.request.completed]
        try:
            sends, replies = map(self._replays.share, arenas)
        except Unavailable as error:
            log.warning("arenas_not_lent", error=str(error))
            return
        for peer in peers:
            if peer.reply_session in self._offered:
                continue
            self._offered.add(peer.reply_session)
            peer.by_reference = False
            number = self._permit_of.get(peer.reply_session)
            if number is None:
                if not self._free:
                    continue
                number = self._permit_of[peer.reply_session] = self._free.pop()
            wanted = random.getrandbits(63) | 1
            self._permits_P[number] = wanted
            permit = self._replays.share(self._permits_P[number : number + 1])
            said = native.LentArenas(sends, replies, permit, len(arenas[0]), wanted)
            buffer = self._transport.wrap(torch.frombuffer(bytearray(said), dtype=torch.uint8))
            tag = wire.encode(_ARENAS, peer.session, self._version, 0, 0, 0)
            self._offers.append(_Offer(buffer, peer.endpoint.send(buffer, tag)))
        torch.cuda.current_stream(self._device).synchronize()

    def answered(self, peer: Peer, frame: wire.Frame) -> None:
        """A peer said whether it can reach what was lent."""
        if frame.slot == self._version:
            peer.by_reference = bool(frame.rows)

    def take_back(self, peer: Peer) -> None:
        """Nothing that this peer computes from here on is written to our arenas."""
        peer.by_reference = False
        self._offered.discard(peer.reply_session)
        number = self._permit_of.pop(peer.reply_session, None)
        if number is not None:
            self._permits_P[number] = 0
            torch.cuda.current_stream(self._device).synchronize()
            self._free.append(number)
