"""The key-value cache's memory: blocks of equal size, who holds them, and which prefixes lie in them already.

Policy only; the tensors are in `kraken/engine/model/attention.py`. A full block is known by a digest of every token
up to its
end, so that a prompt that begins as an earlier one did takes over its blocks instead of computing them. A block that
nobody holds keeps its content until it is needed for something else, the one longest free first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class BlockTable:
    """Where one sequence's tokens lie."""

    blocks: "array[int]" = field(default_factory=lambda: array("i"))
    """int32: block of tokens i * tokens_per_block onwards."""
    digests: list[bytes] = field(default_factory=list)
    """Of the full blocks that are published, from the first on."""


class BlockPool:
    """Owns every block. Each is free, or held by one or more tables.

    Args:
        reuse: publish full blocks and find them again.
    """

    def __init__(self, num_blocks: int, tokens_per_block: int, reuse: bool = True):
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self._reuse = reuse
        self._num_holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # longest free first
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be had, those with reusable content included."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tokens_per_block)

    def find(self, token_ids: Sequence[int]) -> BlockTable:
        """The published blocks that a sequence could begin with; at least its last token is left to compute.

        Nothing is held yet: `take` does that.
        """
        found = BlockTable()
        if not self._reuse:
            return found
        for digest in self._digests(b"", token_ids[:-1]):
            block = self._block_of.get(digest)
            if block is None:
                break
            found.blocks.append(block)
            found.digests.append(digest)
        return found

    def num_needed(self, found: BlockTable, num_tokens: int) -> int:
        """Free blocks that `take` would use up."""
        return self.blocks_for(num_tokens) - sum(self._num_holders[block] > 0 for block in found.blocks)

    def take(self, found: BlockTable, num_tokens: int, num_expected: int) -> BlockTable:
        """Hold what `find` found and as many more blocks as `num_tokens` need.

        Args:
            num_expected: tokens that the sequence may grow to. Room for them is kept next to it while there is other
                room: attention reads neighbouring blocks in place and has to gather others.
        """
        table = BlockTable(found.blocks[:], found.digests[:])
        for block in table.blocks:
            self._free.pop(block, None)
            self._num_holders[block] += 1
        self.extend(table, num_tokens)
        first = table.blocks[-1] + 1
        last = first + self.blocks_for(num_expected) - len(table.blocks)
        for block in range(first, min(last, self.num_blocks)):
            if block not in self._free:
                break
            self._free.move_to_end(block)
        return table

    def extend(self, table: BlockTable, num_tokens: int) -> None:
        """Hold more blocks until `num_tokens` fit; the caller has made sure that there are as many."""
        free, blocks = self._free, table.blocks
        block = blocks[-1] if blocks else -2
        for _ in range(self.blocks_for(num_tokens) - len(blocks)):
            block += 1  # its neighbour, where that is free
            if block not in free:
                block = next(iter(free))
            del free[block]
            if self._reuse:
                self._invalidate(block)
            self._num_holders[block] = 1
            blocks.append(block)

    def publish(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Let others find the full blocks among the first `num_computed` tokens."""
        num_published, num_full = len(table.digests), num_computed // self.tokens_per_block
        if not self._reuse or num_published == num_full:
            return
        previous = table.digests[-1] if table.digests else b""
        added = token_ids[num_published * self.tokens_per_block : num_computed]
        for block, digest in zip(table.blocks[num_published:num_full], self._digests(previous, added), strict=True):
            table.digests.append(digest)
            if digest not in self._block_of:
                self._block_of[digest] = block
                self._digest_of[block] = digest

    def release(self, table: BlockTable, invalidate: bool = False) -> None:
        """Give a sequence's blocks back.

        Args:
            forget: their content is not to be trusted.
        """
        for block in table.blocks:
            self._num_holders[block] -= 1
            if invalidate:
                self._invalidate(block)
            if self._num_holders[block] == 0:
                self._free[block] = None
        del table.blocks[:]
        table.digests.clear()

    def _invalidate(self, block: int) -> None:
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def _digests(self, previous: bytes, token_ids: Sequence[int]) -> Iterator[bytes]:
        """Of every full block, chained to the digest before the first."""
        values = array("i", token_ids).tobytes()
        size = self.tokens_per_block * array("i").itemsize
        for start in range(0, len(values) - size + 1, size):
            # of a cryptographic kind: a collision would show one user's text to another
            previous = hashlib.blake2b(previous + values[start : start + size]).digest()
            yield previous
