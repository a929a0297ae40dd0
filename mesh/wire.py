"""The frame header: 64 bits that ride in the UCX tag, so that a payload is rows alone.

====== ==== =========================================================================
field  bits meaning
====== ==== =========================================================================
kind      4 a :class:`Kind`
session  16 chosen by the receiver of the message when gateway and worker connected
slot      8 which of a gateway's outstanding dispatches to this worker
layer    10 decoder layer
expert   10 expert of the layer; :data:`SEVERAL` says that counts lead the payload
rows     16 rows that follow (of a refusal: the :class:`Refusal`)
====== ==== =========================================================================

With ``SEVERAL`` the payload starts with one int32 count for every expert of the layer, in
ascending order of index and padded to whole rows. All of them, not only those that the worker
holds: the two sides need not agree on residency to agree on whose row is whose. Where experts
are cut into slices, all of this counts slices.

A REFERENCE is a dispatch whose rows stay where they are, the counts of SEVERAL right ahead of
them: its payload is an int64, the first of the rows in the arena that the gateway lent (ARENAS,
whose payload is what :class:`mesh.native.LentArenas` says; the worker's answer has 1 in rows if it
can reach that). Its REPLY has no payload: the answers lie in the same rows of the gateway's other
arena.

Weights that go from worker to worker are asked for and sent in chunks. Their header has the
length in bytes (28 bits) and the number (16 bits) of the chunk in place of slot to rows.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

HEALTH_NAME = "rows"
"""What a worker's gRPC health calls its data plane: whether rows that are there get answers. It
says so also while the worker drains, when it may not be sent to any more and serves what comes."""

MAX_LAYERS = 1 << 10
SEVERAL = (1 << 10) - 1
MAX_EXPERTS = SEVERAL
MAX_SLOTS = 1 << 8
MAX_SESSIONS = 1 << 16
MAX_ROWS = (1 << 16) - 1
MAX_CHUNK_BYTES = (1 << 28) - 1
MAX_CHUNKS = 1 << 16


class Kind(IntEnum):
    """What a message is. Zero is none, so that an empty tag is never valid."""

    DISPATCH = 1
    REPLY = 2
    REFUSE = 3
    FETCH = 4
    WEIGHTS = 5
    REFERENCE = 6
    ARENAS = 7


class Refusal(IntEnum):
    """Why a dispatch was not served; rides in the rows field of a refuse frame. MALFORMED is what
    is no dispatch, or one of no rows."""

    UNKNOWN_SESSION = 1
    UNKNOWN_EXPERT = 2
    WRONG_LENGTH = 3
    TOO_MANY_ROWS = 4
    BAD_COUNTS = 5
    DRAINING = 6
    FAILED = 7
    MALFORMED = 8
    OUT_OF_MEMORY = 9


class Frame(NamedTuple):
    """One decoded tag."""

    kind: int
    session: int
    slot: int
    layer: int
    expert: int
    rows: int


def encode(kind: int, session: int, slot: int, layer: int, expert: int, rows: int) -> int:
    """Pack a header into 64 bits. Fields must fit their widths: the caller checked them."""
    return kind << 60 | session << 44 | slot << 36 | layer << 26 | expert << 16 | rows


def decode(tag: int) -> Frame:
    """Unpack 64 bits. Total: any integer below 2**64 decodes, valid or not."""
    return Frame(
        tag >> 60,
        tag >> 44 & 0xFFFF,
        tag >> 36 & 0xFF,
        tag >> 26 & 0x3FF,
        tag >> 16 & 0x3FF,
        tag & 0xFFFF,
    )


def expert_key(layer: int, index: int) -> int:
    """The layer and expert fields of a tag as one number."""
    return layer << 10 | index


class Chunk(NamedTuple):
    """One decoded tag of FETCH or WEIGHTS."""

    kind: int
    session: int
    nbytes: int
    chunk: int


def encode_chunk(kind: int, session: int, nbytes: int, chunk: int) -> int:
    """Pack a chunk's header. Fields must fit their widths: the caller checked them."""
    return kind << 60 | session << 44 | nbytes << 16 | chunk


def decode_chunk(tag: int) -> Chunk:
    """Unpack a chunk's header. Total, as :func:`decode` is."""
    return Chunk(tag >> 60, tag >> 44 & 0xFFFF, tag >> 16 & 0xFFFFFFF, tag & 0xFFFF)
