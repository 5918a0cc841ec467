"""Simulates how torch's allocator for CUDA turns allocated bytes into reserved bytes.

Blocks of at most 1 MiB come from segments of 2 MiB. Larger ones come from segments of 20 MiB, or of their own size from
10 MiB on. With expandable segments, each of the two kinds has one segment, which grows. These are the rules of torch
2.13: https://github.com/pytorch/pytorch/blob/main/c10/cuda/CUDACachingAllocator.cpp
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from itertools import count

MIB = 2**20
BLOCK = 512  # bytes: sizes of blocks are multiples
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
LARGE, LARGE_SEGMENT, ROUNDED = 10 * MIB, 20 * MIB, 2 * MIB

# (number of a tensor, its bytes); (number, FREED) where the tensor is freed; (0, EMPTIED) at torch.cuda.empty_cache()
Event = tuple[int, int]
FREED, EMPTIED = -1, -2


@dataclass(eq=False)
class Block:
    size: int
    small: bool
    before: "Block | None" = None
    after: "Block | None" = None
    used: bool = False
    unmapped: int = 0  # bytes that an expandable segment gave back
    number: int = field(default_factory=count().__next__)


class OutOfMemory(Exception):
    pass


class Allocator:
    """`limit` is the number of bytes that it may reserve. Raises OutOfMemory from `allocate`."""

    def __init__(self, expandable: bool, limit: int | None = None) -> None:
        self.expandable, self.limit = expandable, limit
        self.reserved = self.peak = 0
        self.free_blocks: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}  # sorted by size
        self.ends: dict[bool, Block] = {}  # the last block of each expandable segment

    def allocate(self, size: int) -> Block:
        size = max(BLOCK, rounded(size, BLOCK))
        small = size <= SMALL
        blocks = self.free_blocks[small]
        at = bisect_left(blocks, (size, -1))
        block = blocks[at][2] if at < len(blocks) else self.grown(size, small)
        self.forget(block)
        block.used = True  # so that `reserve` gives no page of the block back
        mapped = min(block.unmapped, max(0, rounded(size - block.size + block.unmapped, page(small))))
        self.reserve(mapped)
        rest = block.size - size
        if rest >= BLOCK if small or self.expandable else rest > SMALL:
            self.split(block, size, block.unmapped - mapped)
        block.unmapped = 0
        return block

    def free(self, block: Block) -> None:
        block.used = False
        for near in (block.before, block.after):
            if near and not near.used:
                self.forget(near)
                block = self.joined(*((near, block) if near is block.before else (block, near)))
        self.remember(block)

    def grown(self, size: int, small: bool) -> Block:
        """A free block of at least `size` bytes that was not reserved before."""
        if not self.expandable:
            needed = SMALL_SEGMENT if small else LARGE_SEGMENT if size < LARGE else rounded(size, ROUNDED)
            self.reserve(needed)
            block = Block(needed, small)
        else:
            end = self.ends.get(small)
            there = end.size if end and not end.used else 0
            needed = rounded(size - there, page(small))
            self.reserve(needed)
            if end and there:
                self.forget(end)
                end.size += needed
                block = end
            else:
                block = Block(needed, small, before=end)
                if end:
                    end.after = block
                self.ends[small] = block
        self.remember(block)
        return block

    def reserve(self, size: int) -> None:
        if self.limit is not None and self.reserved + size > self.limit:
            self.give_back()
            if self.reserved + size > self.limit:
                raise OutOfMemory
        self.reserved += size
        self.peak = max(self.peak, self.reserved)

    def give_back(self) -> None:
        """Give unused memory back to the GPU: complete segments, or complete pages of expandable segments."""
        for blocks in self.free_blocks.values():
            for _, _, block in list(blocks):
                if self.expandable:
                    size = page(block.small)
                    pages = max(0, block.size // size * size - block.unmapped)
                    block.unmapped += pages
                    self.reserved -= pages
                elif block.before is block.after is None:
                    self.forget(block)
                    self.reserved -= block.size

    def split(self, block: Block, size: int, unmapped: int) -> None:
        rest = Block(block.size - size, block.small, block, block.after, unmapped=unmapped)
        if block.after:
            block.after.before = rest
        block.size, block.after = size, rest
        if self.ends.get(block.small) is block:
            self.ends[block.small] = rest
        self.remember(rest)

    def joined(self, first: Block, second: Block) -> Block:
        first.size, first.after = first.size + second.size, second.after
        first.unmapped += second.unmapped
        if second.after:
            second.after.before = first
        if self.ends.get(first.small) is second:
            self.ends[first.small] = first
        return first

    def remember(self, block: Block) -> None:
        insort(self.free_blocks[block.small], (block.size, block.number, block))

    def forget(self, block: Block) -> None:
        blocks = self.free_blocks[block.small]
        at = bisect_left(blocks, (block.size, block.number))
        if at < len(blocks) and blocks[at][2] is block:
            del blocks[at]


def page(small: bool) -> int:
    """The bytes by which an expandable segment grows."""
    return SMALL_SEGMENT if small else LARGE_SEGMENT


def rounded(size: int, to: int) -> int:
    return -(-size // to) * to


def reserved(events: list[Event], expandable: bool, limit: int | None = None) -> int:
    """The bytes that the allocator reserves at most after the last EMPTIED.

    Raises:
        OutOfMemory: `limit` bytes are not enough.
    """
    allocator = Allocator(expandable, limit)
    blocks: dict[int, Block] = {}
    for tensor, size in events:
        if size == FREED:
            allocator.free(blocks.pop(tensor))
        elif size == EMPTIED:
            allocator.give_back()
            allocator.peak = allocator.reserved
        else:
            blocks[tensor] = allocator.allocate(size)
    return allocator.peak
