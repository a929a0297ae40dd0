"""Which KV block belongs to which sequence. Pure bookkeeping: no tensor, no clock.

A block is *held* while at least one request refers to it. A held block whose tokens were
computed may be *published* under the digest of its tokens and of all tokens before them; it
stays findable after the last reference is gone, until it is the least recently freed one and
somebody needs a block.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

TokenIds: TypeAlias = "array[int]"
"""Token ids as ``array("q")``: compact, and the decoder's int64 without a copy."""


class BlockAllocator:
    """Hands out ``num_blocks`` blocks with reference counts and, if wanted, a prefix cache."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._references = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._reusable: OrderedDict[int, None] = OrderedDict()
        """Published blocks that nobody holds, least recently freed first."""
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that :meth:`allocate` can hand out."""
        return len(self._blank) + len(self._reusable)

    @property
    def usage(self) -> float:
        """Held blocks, 0 to 1."""
        return 1 - self.num_free / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` positions take."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, digests: Iterable[bytes]) -> list[int]:
        """The published blocks of the longest known prefix, in order, each now held once more."""
        blocks: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            if self._references[block] == 0:
                del self._reusable[block]
            self._references[block] += 1
            blocks.append(block)
        return blocks

    def allocate(self, count: int) -> list[int] | None:
        """``count`` blocks held once, contents unspecified; None, and no change, if too few."""
        if count > self.num_free:
            return None
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._reusable.popitem(last=False)
                del self._block_of[self._digest_of.pop(block)]
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Make a held block findable. Where an equal one is published already, that one stays."""
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def free(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each. The end of a sequence is reused before its start."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            if block in self._digest_of:
                self._reusable[block] = None
            else:
                self._blank.append(block)


@dataclass(eq=False)
class BlockTable:
    """The blocks that one sequence holds, in the order of its positions."""

    blocks: tuple[int, ...] = ()
    """The same object for as long as the table holds the same blocks."""
    num_positions: int = 0
    """What they have room for."""
    _digests: list[bytes] = field(default_factory=list)
    """Of the leading full blocks, as far as they were needed; kept when the blocks are not."""
    _num_published: int = 0

    def hold(self, allocator: BlockAllocator, token_ids: TokenIds) -> int | None:
        """Hold blocks for all of ``token_ids``; the number of leading tokens that are computed.

        Never all of them: the last token's logits choose the next one. None, and no change, if
        too few blocks are free. The table must be empty.
        """
        matched: list[int] = []
        if allocator.prefix_cache:
            num_full = (len(token_ids) - 1) // allocator.block_size
            self._extend_digests(token_ids, num_full, allocator.block_size)
            matched = allocator.match_prefix(self._digests[:num_full])
        fresh = allocator.allocate(allocator.blocks_for(len(token_ids)) - len(matched))
        if fresh is None:
            allocator.free(matched)
            return None
        self._set((*matched, *fresh), allocator)
        self._num_published = len(matched)
        return len(matched) * allocator.block_size

    def grow(self, allocator: BlockAllocator, num_tokens: int) -> bool:
        """Hold blocks for ``num_tokens`` positions; False, and no change, if too few are free."""
        missing = allocator.blocks_for(num_tokens) - len(self.blocks)
        if missing > 0:
            fresh = allocator.allocate(missing)
            if fresh is None:
                return False
            self._set((*self.blocks, *fresh), allocator)
        return True

    def publish(self, allocator: BlockAllocator, token_ids: TokenIds, num_computed: int) -> None:
        """Let others find the full blocks among the ``num_computed`` leading tokens."""
        num_full = num_computed // allocator.block_size
        if not allocator.prefix_cache or num_full == self._num_published:
            return
        self._extend_digests(token_ids, num_full, allocator.block_size)
        for index in range(self._num_published, num_full):
            allocator.publish(self.blocks[index], self._digests[index])
        self._num_published = num_full

    def release(self, allocator: BlockAllocator) -> None:
        """Give all blocks back."""
        allocator.free(self.blocks)
        self._set((), allocator)
        self._num_published = 0

    def _set(self, blocks: tuple[int, ...], allocator: BlockAllocator) -> None:
        self.blocks = blocks
        self.num_positions = len(blocks) * allocator.block_size

    def _extend_digests(self, token_ids: TokenIds, num_blocks: int, size: int) -> None:
        """Digest up to ``num_blocks`` full blocks, each with all tokens before it.

        SHA-256, so that no prompt can be made to find the blocks of another.
        """
        digests = self._digests
        for index in range(len(digests), num_blocks):
            parent = digests[-1] if digests else b""
            tokens = token_ids[index * size : (index + 1) * size]
            digests.append(hashlib.sha256(parent + tokens.tobytes()).digest())
