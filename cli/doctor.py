"""``expert-mesh doctor``: what this host really has, and what to do about what it has not."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import typer

from cli import mps

_LIBRARIES = ("expert-mesh", "torch", "ucxx-cu13", "grpcio", "protobuf")
_RDMA_TRANSPORTS = ("rc", "dc", "ud")
_SHM_TRANSPORTS = ("posix", "sysv", "xpmem")
_MIN_SHM_BYTES = 256 << 20
_MIN_OPEN_FILES = 4096

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@dataclass(frozen=True)
class Finding:
    """One line: what was found, and the remedy where it is not as it should be."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def doctor(as_json: AsJson = False) -> None:
    """Show the UCX transports, devices and limits of this host; exit 1 if it cannot serve."""
    findings = [finding for examine in EXAMINATIONS for finding in examine()]
    if as_json:
        typer.echo(json.dumps({"findings": [dataclasses.asdict(f) for f in findings]}))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("", "what", "found", "remedy", box=None)
        colors = {"ok": "green", "warn": "yellow", "fail": "red"}
        for f in findings:
            table.add_row(f"[{colors[f.status]}]{f.status}[/]", f.name, f.found, f.remedy)
        Console().print(table)
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)


def _versions() -> Iterator[Finding]:
    yield Finding("python", "ok", platform.python_version())
    for name in _LIBRARIES:
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding(name, "fail", "not installed", "pip install expert-mesh")


def _ucx() -> Iterator[Finding]:
    try:
        from mesh.transport.ucx import available_transports, ucx_version

        yield Finding("UCX", "ok", ucx_version())
        found = available_transports()
    except (ImportError, OSError, RuntimeError) as error:
        remedy = "pip install 'ucxx-cu13==0.52.*' 'libucx-cu13<1.22'"
        yield Finding("UCX", "fail", str(error), remedy)
        return
    yield from judge_transports(found, _rdma_nics(), len(_gpu_names()))


def judge_transports(
    transports: Sequence[str], rdma_nics: Sequence[str], num_gpus: int
) -> Iterator[Finding]:
    """What UCX can use (``transport/device``) against what the host has."""
    kinds = {transport.partition("/")[0].partition("_")[0] for transport in transports}
    yield Finding("UCX transports", "ok", " ".join(transports))
    if not kinds.intersection(_SHM_TRANSPORTS):
        yield Finding("shared memory", "warn", "UCX cannot use it", "mount /dev/shm; unset UCX_TLS")
    if "tcp" not in kinds:
        yield Finding("TCP", "warn", "UCX cannot use it", "unset UCX_TLS and UCX_NET_DEVICES")
    if not rdma_nics:
        yield Finding("RDMA", "ok", "no NIC for it: between hosts, rows ride on TCP")
    elif kinds.intersection(_RDMA_TRANSPORTS):
        yield Finding("RDMA", "ok", " ".join(rdma_nics))
    else:
        yield Finding(
            "RDMA",
            "warn",
            f"{' '.join(rdma_nics)}: this UCX is built without verbs",
            "install a UCX with verbs and set RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true",
        )
    if num_gpus and "cuda" not in kinds:
        yield Finding(
            "GPU transports",
            "warn",
            "UCX sees no CUDA",
            "check the driver; in a container, give it all GPUs of the mesh and shared IPC",
        )


def _limits() -> Iterator[Finding]:
    shm = os.statvfs("/dev/shm")
    yield judge_shm(shm.f_frsize * shm.f_blocks)
    yield judge_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield judge_locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], bool(_rdma_nics()))
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    yield Finding("cores", "ok", str(len(os.sched_getaffinity(0))))
    yield Finding("free memory", "ok", _gib(memory_bytes))


def judge_shm(size_bytes: int) -> Finding:
    """Every pair of processes on this host has buffers there."""
    if size_bytes >= _MIN_SHM_BYTES:
        return Finding("/dev/shm", "ok", _gib(size_bytes))
    remedy = "give the container shm_size: 1gb, or remount it larger"
    return Finding("/dev/shm", "warn", _gib(size_bytes), remedy)


def judge_open_files(limit: int) -> Finding:
    """A client takes one, a peer a few."""
    if limit == resource.RLIM_INFINITY:
        return Finding("open files", "ok", "unlimited")
    enough = limit >= _MIN_OPEN_FILES
    return Finding(
        "open files", "ok" if enough else "warn", str(limit), "" if enough else "ulimit -n 65536"
    )


def judge_locked_memory(limit: int, needed: bool) -> Finding:
    """RDMA registers memory by locking it."""
    if limit == resource.RLIM_INFINITY:
        return Finding("locked memory", "ok", "unlimited")
    if not needed:
        return Finding("locked memory", "ok", f"{_gib(limit)} (matters for RDMA alone)")
    return Finding("locked memory", "warn", _gib(limit), "ulimit -l unlimited")


def _gpus() -> Iterator[Finding]:
    names = _gpu_names()
    if not names:
        yield Finding("GPUs", "ok", "none: --device cpu")
        return
    for index, name in enumerate(names):
        yield Finding(f"cuda:{index}", "ok", name)
    if mps.running():
        yield Finding("MPS", "ok", "on")
    elif mps.installed():
        yield Finding("MPS", "ok", "off; `expert-mesh up` starts it where processes share a GPU")
    else:
        yield Finding(
            "MPS",
            "warn",
            "not installed: processes that share a GPU take turns on it",
            "install nvidia-cuda-mps-control (it comes with the driver), or a GPU for each process",
        )


def _gpu_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _rdma_nics() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 1 << 30 else f"{size_bytes >> 10} KiB"


EXAMINATIONS: tuple[Callable[[], Iterator[Finding]], ...] = (_versions, _ucx, _gpus, _limits)
