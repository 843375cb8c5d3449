"""The KV cache's memory: blocks of equal size, how many sequences hold each, and which prefixes they contain.

Called by the scheduler. Bookkeeping only; the tensors are in `kraken/engine/model/attention.py`. A full block is known
by a digest of all tokens up to its end, so that a prompt that begins like an earlier one reuses its blocks instead of
computing them. A block that no sequence holds keeps its content until it is allocated again, the one freed longest ago
first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence."""

    blocks: "array[int]" = field(default_factory=lambda: array("i"))
    """int32: entry i is the block of tokens i * tokens_per_block onwards."""
    digests: list[bytes] = field(default_factory=list)
    """Of the published blocks, from the first on."""


class BlockPool:
    """Owns every block. Each is free, or held by one or more block tables.

    Args:
        reuse: publish full blocks, so that prompts with an equal prefix can share them.
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
        """Blocks that can be allocated, including those whose content could be reused."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tokens_per_block)

    def find_prefix(self, token_ids: Sequence[int]) -> BlockTable:
        """The published blocks with which a sequence could begin. At least its last token is left to compute.

        The blocks are not held yet: `allocate` does that.
        """
        prefix = BlockTable()
        if not self._reuse:
            return prefix
        for digest in self._digests(b"", token_ids[:-1]):
            block = self._block_of.get(digest)
            if block is None:
                break
            prefix.blocks.append(block)
            prefix.digests.append(digest)
        return prefix

    def num_needed(self, prefix: BlockTable, num_tokens: int) -> int:
        """Free blocks that `allocate` would take."""
        return self.blocks_for(num_tokens) - sum(self._num_holders[block] > 0 for block in prefix.blocks)

    def allocate(self, prefix: BlockTable, num_tokens: int, max_length: int) -> BlockTable:
        """Hold the blocks that `find_prefix` returned and as many more as `num_tokens` need.

        Args:
            max_length: tokens that the sequence may grow to. The free blocks that follow its last one, as many as it
            may still need, go to the end of the free list, so that the sequence can grow into neighbours: torch's
            attention reads neighbouring blocks in place, and has to copy scattered ones together.
        """
        table = BlockTable(prefix.blocks[:], prefix.digests[:])
        for block in table.blocks:
            self._free.pop(block, None)
            self._num_holders[block] += 1
        self.extend(table, num_tokens)
        first = table.blocks[-1] + 1
        last = first + self.blocks_for(max_length) - len(table.blocks)
        for block in range(first, min(last, self.num_blocks)):
            if block not in self._free:
                break
            self._free.move_to_end(block)
        return table

    def extend(self, table: BlockTable, num_tokens: int) -> None:
        """Hold more blocks until `num_tokens` fit. The caller must have checked `num_free`."""
        free, blocks = self._free, table.blocks
        block = blocks[-1] if blocks else -2
        for _ in range(self.blocks_for(num_tokens) - len(blocks)):
            block += 1  # the neighbour, if it is free
            if block not in free:
                block = next(iter(free))
            del free[block]
            if self._reuse:
                self._invalidate(block)
            self._num_holders[block] = 1
            blocks.append(block)

    def publish(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Let `find_prefix` return the full blocks among the first `num_computed` tokens."""
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
        """Free a sequence's blocks and empty its table.

        Args:
            invalidate: the blocks may lack what they should hold; `find_prefix` must not return them any more.
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
        """The digest of every full block, chained to the digest of the block before."""
        values = array("i", token_ids).tobytes()
        size = self.tokens_per_block * array("i").itemsize
        for start in range(0, len(values) - size + 1, size):
            # a cryptographic hash: with a collision one user's prompt would read another user's keys and values
            previous = hashlib.blake2b(previous + values[start : start + size]).digest()
            yield previous
