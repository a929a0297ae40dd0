"""Where the processes of one `up` are to listen, and how long it waits for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cli.mesh_spec import MeshSpec
from cli.options import to_argv
from mesh.errors import ConfigError
from tests.running import DEMO_MODEL


def spec(**values: Any) -> MeshSpec:
    return MeshSpec.of({"model": DEMO_MODEL, **values})


def test_the_usual_ports_are_wished_for_and_a_free_one_is_taken_for_the_rest() -> None:
    mesh = spec(gateways=2)
    everyone = [mesh.placement, *mesh.gateways, mesh.worker(0)]
    assert [(c.port, c.preferred_port) for c in everyone] == [
        (0, 50050),
        (0, 50051),
        (0, 0),
        (0, 0),
    ]
    assert "--preferred-port" in to_argv(mesh.placement)


@pytest.mark.parametrize("port", [0, 7000])
def test_a_port_that_was_asked_for_is_the_first_gateways(port: int) -> None:
    mesh = spec(gateways=2, port=port)
    assert [(c.port, c.preferred_port) for c in mesh.gateways] == [(port, 0), (0, 0)]
    assert mesh.placement.preferred_port == 50050


def test_without_certificates_strangers_reach_nothing_but_gateways() -> None:
    mesh = spec(host="0.0.0.0", advertise_host="host-a")
    inner = [mesh.placement, mesh.worker(0)]
    assert {(c.host, c.advertise_host) for c in inner} == {("127.0.0.1", None)}
    assert [(c.host, c.advertise_host) for c in mesh.gateways] == [("0.0.0.0", "host-a")]


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "localhost"])
def test_another_loopback_address_is_everybodys(host: str) -> None:
    mesh = spec(host=host)
    assert {c.host for c in (mesh.placement, mesh.worker(0), *mesh.gateways)} == {host}


def test_with_mutual_tls_everybody_listens_and_with_half_of_it_nobody(tmp_path: Path) -> None:
    tls: dict[str, Path] = {}
    for name in ("tls_cert", "tls_key", "tls_ca"):
        tls[name] = tmp_path / name
        tls[name].touch()
    mesh = spec(host="0.0.0.0", **tls)
    assert {c.host for c in (mesh.placement, mesh.worker(0), *mesh.gateways)} == {"0.0.0.0"}
    del tls["tls_ca"]
    with pytest.raises(ConfigError, match="give --tls-ca too"):
        spec(host="0.0.0.0", **tls)


def test_what_gateways_rehearse_is_beside_what_all_may_take_to_start() -> None:
    assert spec(timeout_s=10).ready_within_s == 10
    assert spec(timeout_s=10, rehearsal_s=5).ready_within_s == 15
