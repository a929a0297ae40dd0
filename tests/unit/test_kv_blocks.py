"""The block allocator, by small stories and against a brute-force model."""

from __future__ import annotations

from array import array
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.kv_blocks import BlockAllocator, BlockTable, TokenIds

SIZE = 2


def tokens(*ids: int) -> TokenIds:
    return array("q", ids)


def held(allocator: BlockAllocator, token_ids: TokenIds) -> BlockTable:
    """A table whose tokens were all computed and published."""
    table = BlockTable()
    assert table.hold(allocator, token_ids) is not None
    table.publish(allocator, token_ids, len(token_ids))
    return table


def test_a_second_sequence_shares_the_full_blocks_of_a_common_prefix() -> None:
    allocator = BlockAllocator(8, SIZE)
    first = held(allocator, tokens(1, 2, 3, 4, 5))
    second = BlockTable()
    assert second.hold(allocator, tokens(1, 2, 3, 4, 9)) == 4
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2]
    assert allocator.num_free == 8 - 4


def test_the_whole_prompt_is_never_taken_from_the_cache() -> None:
    allocator = BlockAllocator(8, SIZE)
    held(allocator, tokens(1, 2, 3, 4))
    assert BlockTable().hold(allocator, tokens(1, 2, 3, 4)) == 2


def test_equal_tokens_behind_different_prefixes_are_different_blocks() -> None:
    allocator = BlockAllocator(8, SIZE)
    held(allocator, tokens(1, 2, 7, 7, 0))
    assert BlockTable().hold(allocator, tokens(3, 4, 7, 7, 0)) == 0


def test_what_is_not_published_is_not_found() -> None:
    allocator = BlockAllocator(8, SIZE)
    table = BlockTable()
    table.hold(allocator, tokens(1, 2, 3, 4, 5))
    table.publish(allocator, tokens(1, 2, 3, 4, 5), 3)
    assert BlockTable().hold(allocator, tokens(1, 2, 3, 4, 5)) == 2


def test_released_blocks_stay_findable_until_they_are_needed() -> None:
    allocator = BlockAllocator(4, SIZE)
    held(allocator, tokens(1, 2, 3, 4)).release(allocator)
    assert allocator.num_free == 4
    again = BlockTable()
    assert again.hold(allocator, tokens(1, 2, 3, 4, 5)) == 4
    again.release(allocator)
    BlockTable().hold(allocator, tokens(*range(10, 18)))
    assert BlockTable().hold(allocator, tokens(1, 2, 3)) is None
    assert allocator.match_prefix(again._digests) == []


def test_the_least_recently_released_goes_first_and_of_a_sequence_its_end() -> None:
    allocator = BlockAllocator(4, SIZE)
    old, new = held(allocator, tokens(1, 2, 3, 4)), held(allocator, tokens(5, 6, 7, 8))
    old.release(allocator)
    new.release(allocator)
    assert allocator.allocate(1) is not None
    assert len(allocator.match_prefix(old._digests)) == 1
    assert len(allocator.match_prefix(new._digests)) == 2


def test_too_few_free_blocks_change_nothing() -> None:
    allocator = BlockAllocator(3, SIZE)
    table = held(allocator, tokens(1, 2, 3, 4))
    assert not table.grow(allocator, 9)
    assert len(table.blocks) == 2
    other = BlockTable()
    assert other.hold(allocator, tokens(1, 2, 5, 6, 7, 8)) is None
    assert other.blocks == ()
    table.release(allocator)
    assert allocator.num_free == 3


def test_without_a_prefix_cache_nothing_is_shared() -> None:
    allocator = BlockAllocator(8, SIZE, prefix_cache=False)
    held(allocator, tokens(1, 2, 3, 4, 5))
    assert BlockTable().hold(allocator, tokens(1, 2, 3, 4, 5)) == 0


class AllocatorMachine(RuleBasedStateMachine):
    """Sequences come, grow, are published and go. The model remembers what was written where."""

    NUM_BLOCKS = 6

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(self.NUM_BLOCKS, SIZE)
        self.live: list[tuple[BlockTable, TokenIds]] = []
        self.written: dict[int, tuple[int, ...]] = {}

    def pick(self, data: st.DataObject) -> tuple[BlockTable, TokenIds]:
        return data.draw(st.sampled_from(self.live))

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def hold(self, ids: list[int]) -> None:
        table, token_ids = BlockTable(), tokens(*ids)
        free = self.allocator.num_free
        num_cached = table.hold(self.allocator, token_ids)
        if num_cached is None:
            assert self.allocator.num_free == free
            return
        assert num_cached < len(ids)
        for index, block in enumerate(table.blocks):
            if (index + 1) * SIZE <= num_cached:
                assert self.written[block] == tuple(ids[: (index + 1) * SIZE])
            else:
                self.written.pop(block, None)
        self.live.append((table, token_ids))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token_id=st.integers(0, 1))
    def grow(self, data: st.DataObject, token_id: int) -> None:
        table, token_ids = self.pick(data)
        before = table.blocks
        if table.grow(self.allocator, len(token_ids) + 1):
            token_ids.append(token_id)
            for block in table.blocks[len(before) :]:
                self.written.pop(block, None)
        else:
            assert table.blocks == before
            assert self.allocator.num_free == 0

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        table, token_ids = self.pick(data)
        num_computed = data.draw(st.integers(table._num_published * SIZE, len(token_ids)))
        for index in range(table._num_published, num_computed // SIZE):
            self.written[table.blocks[index]] = tuple(token_ids[: (index + 1) * SIZE])
        table.publish(self.allocator, token_ids, num_computed)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        entry = self.pick(data)
        self.live.remove(entry)
        entry[0].release(self.allocator)
        assert entry[0].blocks == ()

    @invariant()
    def references_are_what_the_tables_hold(self) -> None:
        references = Counter(block for table, _ in self.live for block in table.blocks)
        assert [references[b] for b in range(self.NUM_BLOCKS)] == self.allocator._references
        assert self.allocator.num_free == self.NUM_BLOCKS - len(references)
        for table, token_ids in self.live:
            assert len(table.blocks) == self.allocator.blocks_for(len(token_ids))
            assert len(set(table.blocks)) == len(table.blocks)


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40)
