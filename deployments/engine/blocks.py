"""The KV cache's blocks: who holds which, and which hold a prefix that can be shared. No tensor lives here, only numbers.

A block is in exactly one of three states:

    free    nobody holds it, nothing in it is worth keeping
    used    held by one or more sequences (reference count > 0)
    cached  nobody holds it, but it still contains a known run of tokens; reclaimed oldest first

    allocate:  free -> used, else oldest cached -> used        seal:     used block gets the hash of the tokens in it
    match:     cached or used block with that hash -> used     release:  used -> cached if sealed, else free
                                                               unseal:   used block loses its hash

`used + free + cached = total` always; `check_integrity` says so at run time.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence as Items


def chain(previous: bytes, tokens: Items[int]) -> bytes:
    """Hash of a block of tokens after everything before it. `previous` of the first block is the tenant's salt.

    SHA-256, because a collision would show one prompt's cache to another (vLLM CVE-2025-25183 used a weak hash).
    """
    return hashlib.sha256(previous + array("q", tokens).tobytes()).digest()


class BlockPool:
    """Reference-counted blocks `0..num_blocks-1` of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._refs = [0] * num_blocks
        self._free = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out."""
        return self.num_free + self.num_cached

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_alone(self, blocks: Items[int]) -> int:
        """How many of these held blocks have one reference only, so that its release makes them available."""
        return sum(self._refs[block] == 1 for block in blocks)

    def allocate(self) -> int:
        """A block with one reference and no meaning. The caller has asked `num_available`."""
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._refs[block] = 1
        return block

    def match(self, digest: bytes) -> int | None:
        """The block that holds the tokens of `digest`, with one more reference; None when there is none."""
        block = self._block_of.get(digest)
        if block is not None:
            self._cached.pop(block, None)
            self._refs[block] += 1
        return block

    def seal(self, block: int, digest: bytes) -> None:
        """Say what a full block holds. When another block holds the same already, this one just stays private."""
        if digest not in self._block_of:
            self._hash_of[block] = digest
            self._block_of[digest] = block

    def unseal(self, block: int) -> None:
        """Nobody is to match this held block any more. Those who hold it go on."""
        if digest := self._hash_of.pop(block, None):
            del self._block_of[digest]

    def forget(self) -> None:
        """No cached block holds anything any more."""
        while self._cached:
            block, _ = self._cached.popitem()
            self.unseal(block)
            self._free.append(block)

    def release(self, block: int) -> None:
        """Give back one reference."""
        assert self._refs[block] > 0, f"block {block} released more often than held"
        self._refs[block] -= 1
        if self._refs[block] == 0:
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def check_integrity(self) -> None:
        """Raises AssertionError when a block is in two states, in none, or a hash points astray."""
        free, cached = set(self._free), set(self._cached)
        used = {block for block, refs in enumerate(self._refs) if refs > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free | cached | used) == len(free) + len(cached) + len(used), "a block is in two states"
        assert len(free) + len(cached) + len(used) == self.num_blocks, "a block is lost"
        assert all(refs >= 0 for refs in self._refs), "a reference count is negative"
        assert {digest: block for block, digest in self._hash_of.items()} == self._block_of, "hashes and blocks disagree"
        assert cached <= self._hash_of.keys(), "a cached block has no hash"
        assert not free & self._hash_of.keys(), "a free block has a hash"
