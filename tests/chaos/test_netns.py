"""A link that is cut loses what is sent and tells nobody; healed, it goes on where it was."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests import netns

needs_namespaces = pytest.mark.skipif(bool(netns.why_not()), reason=netns.why_not())
ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    client, _ = server.accept()
    while data := client.recv(100):
        client.sendall(data)
"""


@needs_namespaces
def test_a_cut_link_is_silent_and_a_healed_one_goes_on() -> None:
    with netns.Network(["a", "b"]) as network:
        inside = ["ip", "netns", "exec", network.namespace("a")]
        command = [*inside, sys.executable, "-c", ECHO, network.address("a")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as echo:
            assert echo.stdout is not None
            port = int(echo.stdout.readline())
            with socket.create_connection((network.address("a"), port)) as client:
                client.sendall(b"1")
                assert client.recv(100) == b"1"
                network.cut("a")
                client.sendall(b"2")
                client.settimeout(0.5)
                with pytest.raises(TimeoutError):
                    client.recv(100)
                network.heal("a")
                client.settimeout(30.0)
                assert client.recv(100) == b"2"
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert network.namespace("a") not in left.stdout
