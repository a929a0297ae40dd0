"""What a row's way costs: from a file, else from what hosts say of their network, else assumed.

A cost is relative: 1 is a way inside a host that costs nothing to speak of, and a link adds to it
in proportion to the time it takes, so that one of 400 Gbit/s costs 2.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mesh.errors import ConfigError
from protos import placement_pb2 as pb

_GBIT_PER_S_OF_COST_ONE = 400.0
_INSIDE = 1.0
_INSIDE_WITHOUT_NVLINK = 1.5
_RDMA = 2.0
_OTHER = 8.0
_MOST = 64.0

_FORMAT = (
    'a topology file has [[link]] tables of hosts = ["a", "b"], or hosts = ["a"] for the way '
    "inside it, and [inside] and [between] for all others; each with gbit_per_s or cost"
)


def cost_of_speed(gbit_per_s: float) -> float:
    """Of a link of so many Gbit/s."""
    return min(1.0 + _GBIT_PER_S_OF_COST_ONE / gbit_per_s, _MOST)


@dataclass(frozen=True)
class Topology:
    """What is known of the links before any host speaks; nothing, unless a file says it."""

    links: Mapping[frozenset[str], float] = field(default_factory=dict)
    """Cost by the two hosts, or the one, that it joins."""
    inside: float | None = None
    between: float | None = None

    @classmethod
    def read(cls, path: Path) -> Topology:
        """From a TOML file. Raises ConfigError that says what is wrong with it."""
        try:
            table = tomllib.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"--topology {path}: {error}") from error
        try:
            return cls._of(table)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"--topology {path}: {error!s}; {_FORMAT}") from error

    @classmethod
    def _of(cls, table: dict[str, Any]) -> Topology:
        if unknown := table.keys() - {"link", "inside", "between"}:
            raise ValueError(f"nobody knows {', '.join(sorted(unknown))}")
        links = {}
        for link in table.get("link", []):
            hosts = frozenset(link["hosts"])
            if not isinstance(link["hosts"], list) or not 1 <= len(hosts) <= 2:
                raise ValueError(f"hosts = {link['hosts']!r} is not one host or two")
            links[hosts] = _cost_in(link)
        inside, between = (
            _cost_in(table[name]) if name in table else None for name in ("inside", "between")
        )
        return cls(links, inside, between)

    def link_cost(self, worker: pb.WorkerInfo, gateway_hosts: Collection[str]) -> float:
        """Mean over the gateways of the cost of the way to a worker."""
        if not gateway_hosts:
            return _INSIDE
        costs = [self._cost(worker, host) for host in gateway_hosts]
        return sum(costs) / len(costs)

    def _cost(self, worker: pb.WorkerInfo, gateway_host: str) -> float:
        said = self.links.get(frozenset({worker.host, gateway_host}))
        if worker.host == gateway_host:
            said = self.inside if said is None else said
        elif said is None:
            said = self.between
        return said if said is not None else _cost_by_facts(worker, gateway_host)


def _cost_in(table: dict[str, Any]) -> float:
    if ("cost" in table) == ("gbit_per_s" in table):
        raise ValueError(f"{table} must have gbit_per_s or cost")
    value = float(table["cost"] if "cost" in table else table["gbit_per_s"])
    if not 0 < value < float("inf"):
        raise ValueError(f"{table}: must be above 0")
    return value if "cost" in table else cost_of_speed(value)


def _cost_by_facts(worker: pb.WorkerInfo, gateway_host: str) -> float:
    if worker.host == gateway_host:
        return _INSIDE_WITHOUT_NVLINK if worker.gpu.nvlink == "none" else _INSIDE
    rdma = bool(worker.nics) or any(link.rdma for link in worker.links)
    speeds = [link.gbit_per_s for link in worker.links if link.rdma == rdma]
    if max(speeds, default=0.0) > 0:
        return cost_of_speed(max(speeds))
    return _RDMA if rdma else _OTHER
