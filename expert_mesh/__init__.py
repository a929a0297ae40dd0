"""The Python client of Expert Mesh.

>>> from expert_mesh import Client
>>> with Client("127.0.0.1:50051") as client:
...     for chunk in client.generate("In the beginning", max_tokens=32):
...         print(chunk.text, end="", flush=True)
"""

from expert_mesh.client import AsyncClient, Client
from expert_mesh.types import (
    Choice,
    Chunk,
    Completion,
    PositionLogprobs,
    Sampling,
    Timing,
    TokenLogprob,
    Usage,
)
from mesh.errors import MeshError

__all__ = [
    "AsyncClient",
    "Choice",
    "Chunk",
    "Client",
    "Completion",
    "MeshError",
    "PositionLogprobs",
    "Sampling",
    "Timing",
    "TokenLogprob",
    "Usage",
]
