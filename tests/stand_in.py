"""The stand-in for a GPU's driver, ``stand_in_driver.c``: what it computes, it does on the host."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

FAILS_AT_LAUNCH, FAILS_LATER = 1, 2
ROW_COPIES = c_int64 * (32 * 8)
"""As many ``row_copy`` as a launch has."""
_SOURCE = Path(__file__).parent / "stand_in_driver.c"


class Placing(Structure):
    """As ``placing`` there."""

    _fields_ = [
        ("x", c_void_p),
        ("ids", c_void_p),
        ("tables", c_void_p),
        ("send", c_void_p),
        ("rows", c_void_p),
        ("counts", c_void_p),
        ("num_rows", c_int64),
        ("rows_per_token", c_int64),
        ("num_shards", c_int64),
        ("num_experts", c_int64),
        ("width", c_int64),
    ]


class Sharing(Structure):
    """As ``sharing`` there."""

    _fields_ = [
        ("counts", c_void_p),
        ("on_host", c_void_p),
        ("times", c_void_p),
        ("num_experts", c_int64),
        ("width", c_int64),
        ("parts", c_int64),
        ("step", c_int64),
        ("deliveries", c_void_p),
    ]


class Graph(Structure):
    """As ``graph`` there."""

    _fields_ = [
        ("rows", c_void_p),
        ("count", c_int64),
        ("times", c_float),
        ("fails", c_int32),
        ("places", POINTER(Placing)),
        ("shares", POINTER(Sharing)),
        ("brings", c_void_p),
        ("takes_away", c_void_p),
    ]


def compiled(folder: Path) -> str:
    """The path of the library, made in this folder."""
    library = folder / "libcuda.so.1"
    compiler = ["cc"] if shutil.which("cc") else [sys.executable, "-m", "ziglang", "cc"]
    subprocess.run([*compiler, "-shared", "-fPIC", "-o", library, _SOURCE], check=True)
    return str(library)


class Knobs:
    """What the loaded library counts, and what it may do."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)

    def __getitem__(self, name: str) -> int:
        return c_int32.in_dll(self._library, name).value

    def __setitem__(self, name: str, value: int) -> None:
        c_int32.in_dll(self._library, name).value = value
