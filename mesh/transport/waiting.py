"""Adaptive waiting: poll while work is in flight, sleep when there is none.

A sleeping process costs nothing and takes some 70 to 140 us to wake; a polling one answers
at once and takes a core. On a host with fewer cores than processes a poller steals the core
that its own answer needs, so there it yields and soon sleeps; a GPU's owner never sleeps.
"""

from __future__ import annotations

import os
import select
import threading
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress

from mesh.transport.base import Transport

SPIN_S = {"cuda": 1.0, "cpu": 0.0}
"""By device type. A GPU that had work lately polls for more; a CPU core has better to do."""

_NAP_AFTER_S = 0.1
_NAP_S = 0.001
REPLY_SPIN_S = {"cuda": 1.0, "cpu": 0.002}
"""How long a gateway polls for the replies of a layer, yielding its core to the workers that
make them. Asleep, it would be woken by each reply."""


class Waiter:
    """Waits for a transport, for other descriptors, or for :meth:`wake` from any thread.

    ``spin_s`` is how long to poll before sleeping.
    """

    def __init__(
        self, transport: Transport, *, spin_s: float, descriptors: Iterable[int] = ()
    ) -> None:
        self._transport = transport
        self._spin_s = spin_s
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._event)
        self._woken = threading.Event()
        self._poll = select.poll()
        for descriptor in (transport.fileno(), self._event, *descriptors):
            self._poll.register(descriptor, select.POLLIN)
        self._idle_since: float | None = None

    @property
    def descriptor(self) -> int:
        """Readable between a :meth:`wake` and the :meth:`wait` that it ends."""
        return self._event

    def wake(self) -> None:
        """Make a :meth:`wait` that sleeps return. Callable from any thread."""
        os.eventfd_write(self._event, 1)
        self._woken.set()

    def busy(self) -> None:
        """Something happened: start counting idleness anew."""
        self._idle_since = None

    def settle(self) -> None:
        """What woke us is being seen to."""
        if self._woken.is_set():
            self._woken.clear()
            with suppress(BlockingIOError):  # read with the wake before, of another thread
                os.eventfd_read(self._event)

    def wait(self, timeout_s: float | None = None) -> None:
        """Give way once: yield while spinning, else sleep until there is work or time is up."""
        if self._woken.is_set():
            self.settle()
            return
        now = time.monotonic()
        if self._idle_since is None:
            self._idle_since = now
        if now - self._idle_since < self._spin_s:
            os.sched_yield()
            return
        if self._transport.arm():
            self._poll.poll(None if timeout_s is None else timeout_s * 1000)
        elif now - self._idle_since > _NAP_AFTER_S:
            # A transport that cannot let go of a peer says for ever that it has work.
            time.sleep(_NAP_S)
