"""Pieces: which box of a whole tensor a process holds, so that what was cut for one mesh can be read on another."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kraken.config import ModelConfig
from kraken.model.architecture import own_shard, part_of
from kraken.model.ways import WayGroup

Slices = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a whole tensor.

    Args:
        whole: the whole tensor's shape.
        start: the box's first element, in the whole.
        shape: the box's shape; a box may be empty.
    """

    whole: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Elements in the box."""
        return int(np.prod(self.shape))

    def overlap(self, other: "Piece") -> tuple[Slices, Slices] | None:
        """What two boxes of one tensor have in common, as slices of this one and of the other; None: nothing."""
        firsts = [max(a, b) for a, b in zip(self.start, other.start, strict=True)]
        mine, theirs = ([a + n for a, n in zip(piece.start, piece.shape, strict=True)] for piece in (self, other))
        ends = [min(a, b) for a, b in zip(mine, theirs, strict=True)]
        if any(first >= end for first, end in zip(firsts, ends, strict=True)):
            return None

        def within(piece: Piece) -> Slices:
            return tuple(slice(f - s, e - s) for f, e, s in zip(firsts, ends, piece.start, strict=True))

        return within(self), within(other)


def whole_piece(shape: tuple[int, ...]) -> Piece:
    """All of a tensor."""
    return Piece(tuple(shape), (0,) * len(shape), tuple(shape))


def held_piece(name: str, tensor: Tensor, whole: torch.Size, config: ModelConfig, ways: WayGroup) -> Piece:
    """What this process holds of a parameter, or of a moment of its shape.

    Args:
        tensor: as this process holds it; a DTensor where FSDP shards it.
        whole: the whole parameter's shape.
    """
    # cut from a tensor without memory exactly as the values themselves are cut; a view remembers where it begins
    held = own_shard(tensor, part_of(name, torch.empty(whole, device="meta"), config, ways))
    if not held.numel():
        return Piece(tuple(whole), (0,) * len(whole), tuple(held.shape))
    start = np.unravel_index(int(held.storage_offset()), tuple(whole))
    return Piece(tuple(whole), tuple(int(index) for index in start), tuple(held.shape))
