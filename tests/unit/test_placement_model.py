"""On made-up clusters the planner is not beaten by random, round robin or first-fit."""

from __future__ import annotations

import pytest

from benchmarks.placement import CLUSTERS, Cluster, compare
from mesh.plan import ExpertId
from placement.planner import plan
from placement.rules import Rules


@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda cluster: cluster.name)
def test_ours_crosses_between_hosts_no_more_and_takes_no_longer(cluster: Cluster) -> None:
    ways = compare(cluster, seeds=2)
    for name, found in ways.items():
        for key, figure in found.items():
            assert ways["ours"][key] <= figure, (name, key)


def test_the_slow_link_gets_the_coldest_experts() -> None:
    cluster = Cluster("three hosts", (3600, 400, 100), workers_per_host=1, num_experts=3)
    traffic = {ExpertId(0, i): rate for i, rate in enumerate((1.0, 5.0, 2.0))}
    target = plan(Rules((0,), 3), cluster.workers(), traffic=traffic)
    hosts = [target.workers_by_expert[ExpertId(0, i)] for i in range(3)]
    assert hosts == [("host-2-0",), ("host-0-0",), ("host-1-0",)]
