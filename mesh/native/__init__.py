"""The compiled hot calls: posting to many peers at once, answering, the MLP of small experts.

Plain C behind ctypes, without Python's headers: built when the project is installed (setup.py).
``native.h`` says what each function does; the callers are :mod:`mesh.transport.ucx` and
those that docs/architecture.md lists.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import (
    POINTER,
    Structure,
    c_char,
    c_char_p,
    c_float,
    c_int32,
    c_int64,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any

import libucx

DONE = 0
IN_PROGRESS = 1
SHORT = -1000
"""Of an operation, beside UCX's own negative ones: a message of another length came."""
ANYWHERE = 0
"""Of a buffer: UCX is to find out where it is."""
RING = 4
SIZES = 14
STEPS = 16
STEPPED = 9
GRAPHS = RING * SIZES * STEPS
UNDER_WAY = 2
"""See ``device.c`` of native.h."""


class Postbox(Structure):
    """See ``postbox`` of native.h."""

    _fields_ = [
        ("worker", c_void_p),
        ("event_fd", c_int32),
        ("attention", c_int32),
        ("busy_since_us", c_int64),
        ("calm_us", c_int64),
        ("doubted_us", c_int64),
        ("num_operations", c_int32),
        ("num_free", c_int32),
        ("first_free", c_int32),
        ("status", POINTER(c_int32)),
        ("ended_us", POINTER(c_int64)),
        ("operations", c_void_p),
    ]


class Paged(Structure):
    """See ``paged`` of native.h."""

    _fields_ = [
        ("rows", c_void_p),
        ("block_size", c_int64),
        ("width", c_int64),
        ("num_kv_heads", c_int64),
        ("key_dim", c_int64),
        ("value_dim", c_int64),
        ("value_offset", c_int64),
        ("scale", c_float),
    ]


class RoundTrip(Structure):
    """See ``round_trip`` of native.h."""

    _fields_ = [
        ("endpoint", c_uint64),
        ("send_address", c_uint64),
        ("send_bytes", c_uint64),
        ("send_tag", c_uint64),
        ("receive_address", c_uint64),
        ("receive_bytes", c_uint64),
        ("receive_tag", c_uint64),
        ("send_where", c_uint64),
    ]


class Arrival(Structure):
    """See ``arrival`` of native.h."""

    _fields_ = [("tag", c_uint64), ("bytes", c_uint64), ("message", c_uint64)]


class Lent(Structure):
    """See ``lent`` of native.h."""

    _fields_ = [("handle", c_char * 64), ("offset", c_uint64), ("bytes", c_uint64)]


class LentArenas(Structure):
    """See ``lent_arenas`` of native.h."""

    _fields_ = [
        ("sends", Lent),
        ("replies", Lent),
        ("permit", Lent),
        ("rows", c_int64),
        ("wanted", c_uint64),
    ]


class Captured(Structure):
    """See ``captured`` of native.h."""

    _fields_ = [
        ("graph", c_void_p),
        ("brings", c_void_p),
        ("takes_away", c_void_p),
    ]


class Replays(Structure):
    """See ``replays`` of native.h."""

    _fields_ = [
        ("graphs", c_void_p * GRAPHS),
        ("expected_us", c_uint32 * (SIZES * STEPS)),
        ("untimed", c_uint8 * (SIZES * STEPS)),
        ("here", c_uint8 * (1 << 10)),
        ("doubled", c_void_p),
    ]


class Answerer(Structure):
    """See ``answerer`` of native.h."""

    _fields_ = [("computes", c_void_p), ("rows", c_uint64), ("microseconds", c_uint64)]


class Trail(Structure):
    """See ``trail`` of native.h."""

    _fields_ = [
        ("tag", c_uint64),
        ("found_us", c_int64),
        ("received_us", c_int64),
        ("done_us", c_int64),
        ("sent_us", c_int64),
        ("fetch_us", c_uint32),
        ("queued_us", c_uint32),
        ("compute_us", c_uint32),
        ("deliver_us", c_uint32),
    ]


class Pace(Structure):
    """See ``pace`` of native.h."""

    _fields_ = [
        ("step_us", c_int64),
        ("period_us", c_int64),
        ("since_us", c_int64),
        ("layer_us", c_int64),
        ("came_us", c_int64),
        ("batch", c_uint64),
        ("layers", c_uint64),
        ("layers_before", c_uint64),
        ("layer", c_int32),
        ("waits", c_int32),
        ("begins", c_int32),
    ]


class Answering(Structure):
    """See ``answering`` of native.h."""

    _fields_ = [
        ("box", c_void_p),
        ("sessions", c_void_p),
        ("answerers", POINTER(Answerer)),
        ("works", c_void_p),
        ("scratch", c_void_p),
        ("scratch_floats", c_int64),
        ("row_bytes", c_int32),
        ("max_rows", c_int32),
        ("num_experts", c_int32),
        ("header_rows", c_int32),
        ("doubted", c_int32),
        ("in_hand", c_int32),
        ("computing", c_int32),
        ("failed", c_int32),
        ("last_progress_us", c_int64),
        ("device", c_void_p),
        ("trails", POINTER(Trail)),
        ("max_trails", c_int32),
        ("num_trails", c_int32),
    ]


class Ask(Structure):
    """See ``ask`` of native.h."""

    _fields_ = [
        ("endpoint", c_uint64),
        ("send_tag", c_uint64),
        ("reply_tag", c_uint64),
        ("rows", c_uint64),
        ("replies", c_uint64),
        ("first", c_int64),
        ("header_bytes", c_uint64),
        ("capacity", c_int32),
        ("by_reference", c_int32),
        ("several", c_int32),
        ("num_rows", c_int32),
        ("num_experts", c_int32),
        ("expert", c_int32),
        ("received", c_int32),
        ("sent", c_int32),
        ("ended_us", c_int64),
    ]


class Seat(Structure):
    """See ``seat`` of native.h."""

    _fields_ = [
        ("counts", c_void_p),
        ("groups", c_void_p),
        ("totals", c_void_p),
        ("asks", POINTER(Ask)),
        ("row_bytes", c_uint64),
        ("num_experts", c_int32),
        ("num_asks", c_int32),
        ("sent_us", c_int64),
        ("posted_ns", c_int64),
    ]


_SHORT: dict[str, tuple[Any, list[Any]]] = {
    "gated_mlp_new": (c_void_p, [c_void_p, c_void_p, c_int64, c_int64]),
    "gated_mlp_free": (None, [c_void_p]),
    "gated_mlp_scratch_floats": (c_int64, [c_void_p, c_int64]),
    "linear_new": (c_void_p, [c_void_p, c_int64, c_int64]),
    "linear_free": (None, [c_void_p]),
    "layout_scatter": (
        None,
        [c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_void_p],
    ),
    "layout_combine": (
        None,
        [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
    "rms_norm": (None, [c_void_p, c_int64, c_void_p, c_int64, c_int64, c_float, c_void_p]),
    "postbox_new": (POINTER(Postbox), [c_uint64]),
    "postbox_free": (None, [POINTER(Postbox)]),
    "postbox_send": (c_int32, [POINTER(Postbox), c_uint64, c_uint64, c_uint64, c_uint64, c_int32]),
    "postbox_receive": (c_int32, [POINTER(Postbox), c_uint64, c_uint64, c_uint64, c_uint64]),
    "postbox_take": (c_int32, [POINTER(Postbox), c_uint64, c_uint64, c_uint64, c_int32]),
    "postbox_exchange": (c_int32, [POINTER(Postbox), c_int32, c_void_p, c_void_p]),
    "postbox_cancel": (None, [POINTER(Postbox), c_int32]),
    "postbox_cancel_receives": (None, [POINTER(Postbox), c_uint64]),
    "postbox_abandon": (None, [POINTER(Postbox)]),
    "postbox_arm": (c_int32, [POINTER(Postbox)]),
    "postbox_release": (None, [POINTER(Postbox), c_int32]),
    "postbox_progress": (c_int32, [POINTER(Postbox)]),
    "postbox_probe": (c_int32, [POINTER(Postbox), c_int32, POINTER(Arrival)]),
    "status_text": (c_char_p, [c_int32]),
    "device_new": (c_void_p, [c_char_p, c_uint64]),
    "device_free": (None, [c_void_p]),
    "device_out": (c_uint64, [c_void_p]),
    "device_lend": (None, [c_void_p, c_int32, c_uint64, c_uint64, c_uint64]),
    "device_capture": (c_void_p, [c_void_p]),
    "device_share": (c_int32, [c_void_p, c_uint64, c_uint64, POINTER(Lent)]),
    "answering_new": (POINTER(Answering), [POINTER(Postbox), c_int32, c_int32, c_void_p]),
    "answering_next_failed": (c_uint64, [POINTER(Answering), POINTER(c_int32)]),
    "answering_free": (None, [POINTER(Answering)]),
    "answering_open": (None, [POINTER(Answering), c_int32, c_uint64, c_uint64]),
    "answering_close": (None, [POINTER(Answering), c_int32]),
    "company_came": (None, [POINTER(Pace), c_int32, c_int64]),
    "company_left": (None, [POINTER(Pace), c_uint64]),
    "company_until": (c_int64, [POINTER(Pace), c_void_p, c_int32, c_uint32, c_int64]),
    "answering_trace": (c_int32, [POINTER(Answering), c_int32]),
    "answering_borrow": (c_int32, [POINTER(Answering), c_int32, c_void_p]),
    "answering_fetch": (c_int32, [POINTER(Answering), c_int32, c_int64, c_int64, c_uint64]),
    "answering_deliver": (c_int32, [POINTER(Answering), c_int32, c_int64, c_int64, c_uint64]),
    "asking_new": (c_void_p, [POINTER(Postbox), c_void_p]),
    "asking_free": (None, [c_void_p]),
}
_POINTER_AND_SIZE: list[Any] = [c_void_p, c_int64]
_LONG: dict[str, tuple[Any, list[Any]]] = {
    "gated_mlp_run": (None, [c_void_p, c_void_p, c_void_p, c_int64, c_void_p]),
    "linear_run": (None, [c_void_p, c_void_p, c_void_p, c_void_p, c_int64]),
    "attend_pages": (
        None,
        [POINTER(Paged), *_POINTER_AND_SIZE * 2, *[c_void_p] * 3, *[c_int64] * 2, *[c_void_p] * 2],
    ),
    "postbox_wait": (None, [POINTER(Postbox), c_int32, c_void_p, c_int32, c_int32]),
    "answering_look": (None, [POINTER(Answering)]),
    "answering_strand": (None, [POINTER(Answering), c_int64]),
    "answering_run": (None, [POINTER(Answering), c_int32, c_int32]),
    "asking_leave": (c_int32, [c_void_p, POINTER(Seat), c_void_p, c_int32]),
    "asking_wait": (
        c_int32,
        [c_void_p, POINTER(Seat), c_int32, c_int32, POINTER(Seat), c_void_p, c_int32],
    ),
}


def _load() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    # Read when UCX is loaded: UCXX sets variables that this build of UCX does not know, and the
    # warnings would go to stdout.
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    libucx.load_library()
    here = Path(__file__).parent
    built = sorted(here.glob("libmesh*.so"))
    if not built:
        raise ImportError(
            f"there is no compiled library in {here}: install the project with "
            "`pip install -c constraints.txt -e .`, which builds it"
        )
    libraries = ctypes.PyDLL(str(built[0])), ctypes.CDLL(str(built[0]))
    for library, signatures in zip(libraries, (_SHORT, _LONG), strict=True):
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    return libraries


short, long = _load()
"""Functions that return at once, called with Python's lock held; and those that give it up."""
