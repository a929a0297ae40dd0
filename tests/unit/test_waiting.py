"""Waking a thread that waits, from other threads, at any moment."""

from __future__ import annotations

import threading

import pytest

from mesh.transport.loopback import LoopbackHub
from mesh.transport.waiting import Waiter


@pytest.mark.parametrize("wakers", [1, 3])
def test_wakes_that_come_at_any_moment_are_neither_lost_nor_too_many(wakers: int) -> None:
    waiter = Waiter(LoopbackHub().transport(), spin_s=0.0)
    asked, done = [0] * wakers, [0] * wakers
    turns = 20_000

    def wake(number: int) -> None:
        for _ in range(turns):
            asked[number] += 1
            waiter.wake()

    threads = [threading.Thread(target=wake, args=(number,)) for number in range(wakers)]
    for thread in threads:
        thread.start()
    while done != [turns] * wakers:
        waiter.wait()  # for ever, if a wake is lost: then the test's own time limit ends it
        done = list(asked)
    for thread in threads:
        thread.join()
