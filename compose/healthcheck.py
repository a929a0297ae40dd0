"""Exits 0 when this container's process may serve. A socket and no more: every container of
a mesh runs this every few seconds."""

import os
import socket
import sys

port = int(os.environ["EXPERT_MESH_HTTP_PORT"])
with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
    connection.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
    status = connection.recv(64)
sys.exit(b" 200 " not in status)
