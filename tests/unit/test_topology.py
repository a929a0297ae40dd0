"""What links cost: by a file, by facts, by guess; and where the facts come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expert_worker.host import gpu_facts, nic_facts
from mesh.errors import ConfigError
from placement.topology import Topology, cost_of_speed
from protos import placement_pb2 as pb


def worker(host: str, *links: pb.NicFacts, **fields: object) -> pb.WorkerInfo:
    return pb.WorkerInfo(host=host, links=links, **fields)


def nic(gbit_per_s: float, rdma: bool = False) -> pb.NicFacts:
    return pb.NicFacts(name="nic", gbit_per_s=gbit_per_s, rdma=rdma)


def test_without_facts_the_host_is_nearest_then_rdma_then_the_rest():
    known = Topology()
    assert known.link_cost(worker("a"), []) == known.link_cost(worker("a"), ["a"]) == 1.0
    rdma = known.link_cost(worker("a", nics=["mlx5_0"]), ["b"])
    assert 1.0 < rdma < known.link_cost(worker("a"), ["b"])
    halfway = known.link_cost(worker("a"), ["a", "b"])
    assert halfway == (1.0 + known.link_cost(worker("a"), ["b"])) / 2


def test_the_speed_of_the_nics_tells_the_cost():
    known = Topology()
    assert known.link_cost(worker("a", nic(400, rdma=True)), ["b"]) == 2.0
    assert known.link_cost(worker("a", nic(100)), ["b"]) == 5.0
    # Rows go over the RDMA device where there is one, the fastest of them.
    links = (nic(25), nic(200, rdma=True), nic(400, rdma=True))
    assert known.link_cost(worker("a", *links), ["b"]) == 2.0
    assert known.link_cost(worker("a", nic(0)), ["b"]) == known.link_cost(worker("a"), ["b"])
    assert known.link_cost(worker("a", nic(0.001)), ["b"]) == 64.0


def test_a_gpu_without_nvlink_costs_more_on_its_own_host():
    alone = worker("a", gpu=pb.GpuFacts(nvlink="none"))
    linked = worker("a", gpu=pb.GpuFacts(nvlink="7 of 7 GPUs"))
    unknown = worker("a", gpu=pb.GpuFacts(nvlink="unknown"))
    costs = [Topology().link_cost(w, ["a"]) for w in (linked, unknown, alone)]
    assert costs[0] == costs[1] < costs[2]


def test_a_file_says_better_than_facts_do(tmp_path: Path):
    path = tmp_path / "topology.toml"
    path.write_text(
        """
        between = { gbit_per_s = 400 }
        inside = { cost = 1.25 }

        [[link]]
        hosts = ["a", "c"]
        gbit_per_s = 100

        [[link]]
        hosts = ["c"]
        cost = 3
        """
    )
    known = Topology.read(path)
    fast = worker("a", nic(800, rdma=True))
    assert known.link_cost(fast, ["b"]) == 2.0
    assert known.link_cost(fast, ["c"]) == 5.0
    assert known.link_cost(worker("c"), ["a"]) == 5.0
    assert known.link_cost(worker("a"), ["a"]) == 1.25
    assert known.link_cost(worker("c"), ["c"]) == 3.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[link]]\nhosts = ['a', 'b', 'c']\ncost = 1", "not one host or two"),
        ("[[link]]\nhosts = 'ab'\ncost = 1", "not one host or two"),
        ("[[link]]\nhosts = ['a']", "must have gbit_per_s or cost"),
        ("[[link]]\nhosts = ['a']\ncost = 1\ngbit_per_s = 1", "must have gbit_per_s or cost"),
        ("[[link]]\ncost = 1", "hosts"),
        ("[inside]\ncost = 0", "above 0"),
        ("[inside]\ncost = 'much'", "much"),
        ("inside = 3", "topology file has"),
        ("link = 3", "topology file has"),
        ("[hosts]", "nobody knows hosts"),
        ("[[[", "--topology"),
    ],
)
def test_a_file_that_makes_no_sense_is_named_with_what_is_wrong(
    tmp_path: Path, text: str, words: str
):
    path = tmp_path / "topology.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"topology\.toml") as caught:
        Topology.read(path)
    assert words in str(caught.value)
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        Topology.read(tmp_path / "missing.toml")


def test_speeds_are_costs():
    assert [cost_of_speed(speed) for speed in (400, 100, 1)] == [2.0, 5.0, 64.0]


def device(sysfs: Path, kind: str, name: str, **files: str) -> None:
    directory = sysfs / kind / name
    (directory / "device").mkdir(parents=True)
    for file, text in files.items():
        path = directory / file.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_nics_are_read_from_sysfs_and_what_it_does_not_say_is_zero(tmp_path: Path):
    assert nic_facts(tmp_path) == []
    device(tmp_path, "net", "eth0", speed="25000", operstate="up")
    device(tmp_path, "net", "eth1", speed="-1", operstate="up")
    device(tmp_path, "net", "eth2", speed="25000", operstate="down")
    (tmp_path / "net" / "lo").mkdir()
    device(tmp_path, "infiniband", "mlx5_0", ports__1__rate="400 Gb/sec (4X NDR)")
    device(tmp_path, "infiniband", "mlx5_1")
    assert nic_facts(tmp_path) == [
        pb.NicFacts(name="mlx5_0", gbit_per_s=400, rdma=True),
        pb.NicFacts(name="mlx5_1", rdma=True),
        pb.NicFacts(name="eth0", gbit_per_s=25),
        pb.NicFacts(name="eth1"),
    ]


def test_a_cpu_has_no_gpu_facts():
    assert gpu_facts(torch.device("cpu")) is None
