"""TLS with real certificates: members talk, strangers are refused, on every service."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc

import expert_worker.service
from gateway.service import read_tokens
from mesh.config import PlacementConfig, ServerConfig, WorkerConfig
from mesh.errors import ConfigError
from mesh.grpc_server import GrpcServer, TlsFiles, open_channel, open_sync_channel
from mesh.model_config import ModelConfig
from protos import placement_pb2 as pb
from protos import placement_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.control import Mesh, plan_where, running, running_placement
from tests.families import PLAIN, make_checkpoint


class Authority:
    """A certificate authority that signs for 127.0.0.1."""

    def __init__(self, name: str, directory: Path) -> None:
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._directory = directory
        certificate = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = self._write(f"{name}-ca.pem", certificate)

    def issue(self, name: str) -> TlsFiles:
        """A certificate and key for both ends of a link, to be trusted with this authority's."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        certificate = (
            self._builder(subject, key)
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        key_path = self._directory / f"{name}-key.pem"
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return TlsFiles(self._write(f"{name}.pem", certificate), key_path, self.pem)

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )

    def _write(self, name: str, certificate: x509.Certificate) -> Path:
        path = self._directory / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority("ours", tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def member(ours: Authority) -> TlsFiles:
    return ours.issue("member")


@pytest.fixture(scope="module")
def strangers(
    ours: Authority, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, TlsFiles | None]:
    """What somebody outside may come with, knowing everything that is public."""
    foreign = Authority("foreign", tmp_path_factory.mktemp("foreign")).issue("stranger")
    return {
        "plaintext": None,
        "no certificate": TlsFiles(ca=ours.pem),
        "another authority's certificate": replace(foreign, ca=ours.pem),
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(PLAIN, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(directory: Path) -> ModelConfig:
    return ModelConfig.from_hf(directory)


def options(tls: TlsFiles) -> dict[str, Path | None]:
    """As a process is configured with them."""
    return {"tls_cert": tls.cert, "tls_key": tls.key, "tls_ca": tls.ca}


@asynccontextmanager
async def secure_mesh(
    directory: Path, model: ModelConfig, tls: TlsFiles
) -> AsyncIterator[dict[str, str]]:
    """A placement and a worker that has registered with it; their addresses."""
    config = PlacementConfig(port=0, experts_per_worker=16, **options(tls))
    async with running_placement(model, config) as placement:
        worker_config = WorkerConfig(
            model=directory,
            placement=placement.address,
            memory_bytes=1 << 30,
            worker_id="w0",
            **options(tls),
        )
        async with running(
            worker_config, lambda config, stop: expert_worker.service.run(config, "w0", stop)
        ) as worker:
            yield {"placement": placement.address, "worker": worker.address}


def calls_of(channel: grpc.aio.Channel) -> dict[str, Callable[[], object]]:
    """One call of each service that the two processes have."""
    placement = placement_pb2_grpc.PlacementStub(channel)
    worker = worker_pb2_grpc.ExpertWorkerStub(channel)
    health = health_pb2_grpc.HealthStub(channel)
    return {
        "placement": lambda: placement.GetStatus(pb.GetStatusRequest()),
        "worker": lambda: worker.Info(worker_pb2.WorkerInfoRequest()),
        "health": lambda: health.Check(health_pb2.HealthCheckRequest()),
    }


async def assert_refused(call: object) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(20):
            await call
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_members_serve_together_and_strangers_are_refused_everywhere(
    directory: Path, model: ModelConfig, member: TlsFiles, strangers: dict[str, TlsFiles | None]
):
    async with secure_mesh(directory, model, member) as addresses:
        async with open_channel(addresses["placement"], member) as channel:
            plans = placement_pb2_grpc.PlacementStub(channel).WatchPlan(pb.WatchPlanRequest())
            plan = await plan_where(plans, lambda plan: plan.complete)
            assert plan.workers[0].grpc_address == addresses["worker"]
        for service, address in addresses.items():
            async with open_channel(address, member) as channel:
                calls = calls_of(channel)
                await calls[service]()
                await calls["health"]()
            for tls in strangers.values():
                async with open_channel(address, tls) as channel:
                    calls = calls_of(channel)
                    await assert_refused(calls[service]())
                    await assert_refused(calls["health"]())
                    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
                    await assert_refused(reflection.ServerReflectionInfo().read())


async def test_a_strange_worker_cannot_register(
    model: ModelConfig, member: TlsFiles, strangers: dict[str, TlsFiles | None]
):
    config = PlacementConfig(port=0, **options(member))
    async with running_placement(model, config) as placement:
        for tls in strangers.values():
            async with Mesh(placement.address, model, tls) as mesh:
                await assert_refused(mesh.start("intruder"))
        async with Mesh(placement.address, model, member) as mesh:
            assert not (await mesh.stub.GetStatus(pb.GetStatusRequest())).workers
            await mesh.start("w0")


async def test_a_client_does_not_talk_to_a_false_server(ours: Authority, tmp_path: Path):
    false = Authority("false", tmp_path).issue("server")
    async with GrpcServer(ServerConfig(**options(replace(false, ca=None))), [], []) as server:
        async with open_channel(server.address, TlsFiles(ca=ours.pem)) as channel:
            await assert_refused(calls_of(channel)["health"]())
        async with open_channel(server.address, TlsFiles(ca=false.ca)) as channel:
            await calls_of(channel)["health"]()


async def test_the_sync_channel_checks_the_same(member: TlsFiles):
    def check(address: str) -> int:
        with open_sync_channel(address, member) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            return stub.Check(health_pb2.HealthCheckRequest()).status

    async with GrpcServer(ServerConfig(**options(member)), [], []) as server:
        assert await asyncio.to_thread(check, server.address) == 1


async def test_files_that_do_not_fit_are_an_error_at_the_start(
    ours: Authority, member: TlsFiles, tmp_path: Path
):
    other_key = ours.issue("other").key
    with pytest.raises(ConfigError, match="TLS files"):
        await GrpcServer(ServerConfig(**options(replace(member, key=other_key))), [], []).start()
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("no certificate")
    with pytest.raises(ConfigError, match="TLS files"):
        await GrpcServer(ServerConfig(**options(replace(member, cert=rubbish))), [], []).start()
    with pytest.raises(ConfigError, match="both or neither"):
        ServerConfig(tls_cert=member.cert)
    with pytest.raises(ConfigError, match="needs tls_cert"):
        ServerConfig(tls_ca=member.ca)


@pytest.mark.parametrize(
    ("content", "complaint"), [(b" \n\n", "holds no API key"), (b"key\xff\n", "must be UTF-8")]
)
def test_a_file_of_keys_that_holds_none_is_an_error_at_the_start(
    tmp_path: Path, content: bytes, complaint: str
):
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        read_tokens(tmp_path / "keys")
