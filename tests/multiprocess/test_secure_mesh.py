"""A whole mesh behind mutual TLS and an API key: members are served, strangers are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from expert_mesh import Client
from mesh.errors import Unauthenticated, Unavailable
from tests.families import make_checkpoint
from tests.integration.test_security import Authority
from tests.running import running_mesh


@pytest.mark.timeout(200)
def test_members_with_a_key_are_served_and_nobody_else(tmp_path: Path) -> None:
    for name in ("ours", "foreign", "model"):
        (tmp_path / name).mkdir()
    ours = Authority("ours", tmp_path / "ours")
    member = ours.issue("member")
    stranger = Authority("foreign", tmp_path / "foreign").issue("stranger")
    (tmp_path / "keys").write_text("first-key\nsecond-key\n")
    flags = ["--model", make_checkpoint("mixtral", tmp_path / "model"), "--workers", "2"]
    flags += ["--experts-per-worker", "8", "--api-key-file", tmp_path / "keys"]
    tls = ["--tls-cert", str(member.cert), "--tls-key", str(member.key), "--tls-ca", str(ours.pem)]
    files = {"tls_cert": member.cert, "tls_key": member.key, "tls_ca": ours.pem}
    with running_mesh(*flags, *tls) as mesh:
        with Client(mesh.gateway, api_key="second-key", **files) as client:
            assert client.health()
            done = client.complete([5, 6, 7], max_tokens=3, temperature=0.0, ignore_eos=True)
            assert len(done.token_ids) == 3
        for key in (None, "third-key"):
            with Client(mesh.gateway, api_key=key, **files) as client:
                with pytest.raises(Unauthenticated):
                    client.complete([5], max_tokens=1)
                with pytest.raises(Unauthenticated):
                    client.server_info()
        foreign = {"tls_cert": stranger.cert, "tls_key": stranger.key, "tls_ca": ours.pem}
        for who in (foreign, {"tls_ca": ours.pem}, {}):
            with (
                Client(mesh.gateway, api_key="second-key", **who) as client,
                pytest.raises(Unavailable),
            ):
                client.complete([5], max_tokens=1, timeout_s=5)
        status = mesh.expert_mesh("status", "--target", mesh.placement, *tls)
        assert len(status["workers"]) == 2
        with pytest.raises(AssertionError):
            mesh.expert_mesh("status", "--target", mesh.placement)
