"""Several hosts on one machine: network namespaces on a bridge, whose links can be cut and healed.

Needs root and ``ip`` (iproute2); :func:`why_not` says in words what is missing. A process enters a
namespace by being forked with this module's :func:`main` as its entry.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUTS = 0x04000000
_CLONE_NEWNET = 0x40000000
_MS_REC, _MS_SLAVE, _MNT_DETACH = 0x4000, 0x80000, 2
_LINK = "eth0"


@functools.cache
def why_not() -> str:
    """Why there can be no namespaces here; empty when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip`: apt-get install iproute2"
    try:
        with Network(["probe"]):
            return ""
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Network:
    """One namespace for each host, and one for the switch that they and this process hang on.

    The switch has a namespace of its own so that no firewall of this machine is in its way.
    Leaving the context takes everything away again.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        pid = os.getpid()
        self._name = f"em{pid}"
        self._subnet = f"10.{77 + pid % 64}.{pid // 64 % 256}"
        self._numbers = {host: number for number, host in enumerate(hosts, 1)}
        self._undo = ExitStack()

    def address(self, host: str) -> str:
        """By which everybody reaches it."""
        return f"{self._subnet}.{self._numbers[host]}"

    @property
    def gate(self) -> str:
        """The address of this process in it."""
        return f"{self._subnet}.254"

    def slow(self, host: str, rate: str) -> None:
        """Let no more come from a host than ``rate``, as tc(8) writes it."""
        shape = ("tbf", "rate", rate, "burst", "32kbit", "latency", "50ms")
        inside = ("ip", "netns", "exec", self.namespace(host))
        command = (*inside, "tc", "qdisc", "add", "dev", _LINK, "root", *shape)
        subprocess.run(command, check=True, capture_output=True, text=True)

    def namespace(self, host: str) -> str:
        """The name for :func:`main`."""
        return f"{self._name}-{host}"

    def cut(self, host: str) -> None:
        """As if the cable were pulled: what is sent is lost, and nobody is told."""
        _ip("-n", self._name, "link", "set", f"port{self._numbers[host]}", "down")

    def heal(self, host: str) -> None:
        """Plug the cable in again."""
        _ip("-n", self._name, "link", "set", f"port{self._numbers[host]}", "up")

    def __enter__(self) -> Network:
        with ExitStack() as undo:
            self._add_namespace(self._name, undo)
            _ip("-n", self._name, "link", "add", "switch", "type", "bridge")
            _ip("-n", self._name, "link", "set", "switch", "up")
            self._plug_in("port0", "name", self._name)
            undo.callback(_ip, "link", "del", self._name)
            _ip("addr", "add", f"{self.gate}/24", "dev", self._name)
            _ip("link", "set", self._name, "up")
            for host, number in self._numbers.items():
                inside = self.namespace(host)
                self._add_namespace(inside, undo)
                self._plug_in(f"port{number}", "name", _LINK, "netns", inside)
                _ip("-n", inside, "addr", "add", f"{self.address(host)}/24", "dev", _LINK)
                for link in ("lo", _LINK):
                    _ip("-n", inside, "link", "set", link, "up")
            self._undo = undo.pop_all()
        return self

    def _add_namespace(self, namespace: str, undo: ExitStack) -> None:
        _ip("netns", "add", namespace)
        undo.callback(_ip, "netns", "del", namespace)

    def _plug_in(self, port: str, *far_end: str) -> None:
        """A cable from a port of the switch to its far end."""
        _ip("link", "add", *far_end, "type", "veth", "peer", "name", port, "netns", self._name)
        _ip("-n", self._name, "link", "set", port, "master", "switch", "up")

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._undo.close()


def enter(namespace: str) -> None:
    """Move this process, which has one thread, into a namespace, and show it as a host."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{name}: {os.strerror(number)}")

    with open(f"/run/netns/{namespace}") as file:
        call("setns", file.fileno(), _CLONE_NEWNET)
    call("unshare", _CLONE_NEWNS | _CLONE_NEWUTS)
    # UCX finds the links of its namespace in /sys, which shows those of whoever mounted it.
    call("mount", b"", b"/", b"none", _MS_SLAVE | _MS_REC, None)
    call("umount2", b"/sys", _MNT_DETACH)
    call("mount", namespace.encode(), b"/sys", b"sysfs", 0, None)
    socket.sethostname(namespace)


def main(argv: list[str]) -> int:
    """``NAMESPACE COMMAND...``: expert-mesh inside a namespace, as between hosts: over TCP."""
    from cli.main import main as expert_mesh

    namespace, *command = argv
    enter(namespace)
    os.environ |= {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": _LINK}
    return expert_mesh(command)
