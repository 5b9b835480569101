"""The block pool against a plain dictionary model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deployments.engine.blocks import BlockPool, chain


def test_oldest_cached_block_is_reclaimed_first() -> None:
    pool = BlockPool(3, 4)
    blocks = [pool.allocate() for _ in range(3)]
    for block in blocks:
        pool.seal(block, bytes([block]))
    for block in (blocks[1], blocks[0], blocks[2]):
        pool.release(block)
    assert [pool.allocate() for _ in range(3)] == [blocks[1], blocks[0], blocks[2]]


def test_free_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(2, 4)
    block = pool.allocate()
    pool.seal(block, b"x")
    pool.release(block)
    assert pool.allocate() != block
    assert pool.match(b"x") == block


def test_reclaimed_block_is_forgotten() -> None:
    pool = BlockPool(1, 4)
    block = pool.allocate()
    pool.seal(block, b"x")
    pool.release(block)
    pool.allocate()
    assert pool.match(b"x") is None


def test_block_with_the_same_content_stays_private() -> None:
    pool = BlockPool(2, 4)
    first, second = pool.allocate(), pool.allocate()
    pool.seal(first, b"x")
    pool.seal(second, b"x")
    pool.release(second)
    assert (pool.num_cached, pool.num_free) == (0, 1)


def test_releasing_too_often_is_a_bug_of_ours() -> None:
    pool = BlockPool(1, 4)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(AssertionError):
        pool.release(block)


def test_integrity_check_finds_a_lost_block() -> None:
    pool = BlockPool(2, 4)
    pool._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        pool.check_integrity()


def test_chain_depends_on_everything_before() -> None:
    assert chain(chain(b"", [1, 2]), [3, 4]) != chain(chain(b"", [1, 9]), [3, 4])
    assert chain(b"tenant a", [1, 2]) != chain(b"tenant b", [1, 2])
    assert chain(b"", [1, 2]) == chain(b"", (1, 2))


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(5, 4)
        self.held: list[int] = []
        self.sealed: dict[bytes, int] = {}

    @precondition(lambda self: self.pool.num_available)
    @rule()
    def allocate(self) -> None:
        block = self.pool.allocate()
        assert block not in self.held
        self.sealed = {digest: other for digest, other in self.sealed.items() if other != block}
        self.held.append(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.held.remove(block)
        self.pool.release(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), digest=st.sampled_from([b"a", b"b", b"c"]))
    def seal(self, data: st.DataObject, digest: bytes) -> None:
        block = data.draw(st.sampled_from(self.held))
        if block not in self.sealed.values():
            self.pool.seal(block, digest)
            self.sealed.setdefault(digest, block)

    @rule(digest=st.sampled_from([b"a", b"b", b"c"]))
    def match(self, digest: bytes) -> None:
        block = self.pool.match(digest)
        assert block == self.sealed.get(digest)
        if block is not None:
            self.held.append(block)

    @invariant()
    def sound(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_used == len(set(self.held))
        assert self.pool.num_used + self.pool.num_free + self.pool.num_cached == 5


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
