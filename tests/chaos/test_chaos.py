"""Two minutes of chaos. ``python -m tests.chaos --minutes 60`` is the same for longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import netns
from tests.chaos.events import CutHost, Shape
from tests.chaos.plan import make_plan
from tests.chaos.run import run_chaos

SEED = 4
needs_namespaces = pytest.mark.skipif(bool(netns.why_not()), reason=netns.why_not())


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_two_minutes_of_chaos(tmp_path: Path) -> None:
    shape = Shape(workers=12, gateways=2, experts_per_worker=2)
    events = make_plan(SEED, 120.0, shape)
    outcome = await run_chaos(SEED, 120.0, shape, events, rate=3.0, say=print, log_dir=tmp_path)
    assert outcome.violations == []
    assert outcome.answered > 100


@pytest.mark.slow
@pytest.mark.timeout(240)
@needs_namespaces
@pytest.mark.parametrize("for_s", [1.0, 10.0])
async def test_a_host_that_is_cut_off_comes_back_by_itself(tmp_path: Path, for_s: float) -> None:
    shape = Shape(workers=8, gateways=1, experts_per_worker=4, hosts=2)
    events = (CutHost(3.0, "host-0", for_s),)
    outcome = await run_chaos(
        SEED, for_s + 8.0, shape, events, rate=3.0, say=print, log_dir=tmp_path
    )
    assert outcome.violations == []
    assert outcome.answered > 5
