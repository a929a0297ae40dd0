"""What a worker tells placement of the machine it runs on."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pynvml
import torch

from protos.placement_pb2 import GpuFacts, NicFacts

UNKNOWN = "unknown"


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return platform.processor() or platform.machine()


def free_bytes(device: torch.device) -> int:
    """What is free on the device: of a CPU, what the machine and the control group still give."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    limit, used = (_read(Path(f"/sys/fs/cgroup/memory.{name}")) for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        available = min(available, max(int(limit) - int(used), 0))
    return available


def rdma_nics() -> list[str]:
    """Names of the RDMA devices."""
    return [nic.name for nic in nic_facts() if nic.rdma]


def nic_facts(sysfs: Path = Path("/sys/class")) -> list[NicFacts]:
    """Network devices that are up, RDMA first, then by name; not virtual ones, whose speed
    is made up."""
    rdma = [
        NicFacts(name=path.name, gbit_per_s=_rdma_speed(path), rdma=True)
        for path in sorted((sysfs / "infiniband").glob("*"))
    ]
    plain = [
        NicFacts(name=path.name, gbit_per_s=max(_number(_read(path / "speed")), 0.0) / 1000)
        for path in sorted((sysfs / "net").glob("*"))
        if (path / "device").exists() and _read(path / "operstate") == "up"
    ]
    return rdma + plain


def _rdma_speed(path: Path) -> float:
    """Of all ports together; the kernel says it as ``400 Gb/sec (4X NDR)``."""
    return sum(_number(_read(port / "rate")) for port in (path / "ports").glob("*"))


def _number(text: str) -> float:
    match = re.match(r"-?[0-9.]+", text)
    return float(match.group()) if match else 0.0


def gpu_facts(device: torch.device) -> GpuFacts | None:
    """What the driver says of a GPU and of NVLink to its neighbours; None for a CPU.

    What it does not say is :data:`UNKNOWN`.
    """
    if device.type != "cuda":
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    facts = GpuFacts(uuid=uuid, pci_bus_id=UNKNOWN, nvlink=UNKNOWN)
    try:
        pynvml.nvmlInit()
        try:
            _ask_driver(facts)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        pass  # a driver without NVML, or a container without the right to it
    return facts


def _ask_driver(facts: GpuFacts) -> None:
    ours = pynvml.nvmlDeviceGetHandleByUUID(facts.uuid)
    facts.pci_bus_id = pynvml.nvmlDeviceGetPciInfo(ours).busId
    others = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    uuids = {pynvml.nvmlDeviceGetUUID(other): other for other in others}
    uuids.pop(facts.uuid, None)
    facts.nvlink_peers.extend(
        uuid
        for uuid, other in sorted(uuids.items())
        if pynvml.nvmlDeviceGetP2PStatus(ours, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
        == pynvml.NVML_P2P_STATUS_OK
    )
    peers = len(facts.nvlink_peers)
    facts.nvlink = f"{peers} of {len(uuids)} GPUs" if peers else "none"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
