# SPDX-License-Identifier: Apache-2.0
"""Place: a box of a saved piece goes into a tensor, as runs of bytes that are contiguous on both sides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from ckpt_fast.pipeline.types import Extent

# Shorter runs cost more in bookkeeping than in bandwidth; the rows around them are read and cut in memory.
_MIN_RUN_NBYTES = 512


def is_addressable(tensor: torch.Tensor) -> bool:
    """Whether the engine may write into the tensor's memory: plain strided CPU memory."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


class Box:
    """A region of a row-major piece.

    Args:
        sizes: the piece's shape.
        start: where the region begins, per dimension.
        shape: the region's shape.
        itemsize: bytes of one element.
    """

    def __init__(
        self, sizes: Sequence[int], start: Sequence[int], shape: Sequence[int], itemsize: int
    ) -> None:
        self.sizes, self.start, self.shape, self.itemsize = tuple(sizes), tuple(start), tuple(shape), itemsize
        # Dimensions from `outer` on form one contiguous run of the piece.
        self.outer = len(self.shape)
        while self.outer > 0:
            self.outer -= 1
            if self.shape[self.outer] != self.sizes[self.outer]:
                break

    @property
    def is_whole(self) -> bool:
        return self.shape == self.sizes

    @property
    def run_nbytes(self) -> int:
        """Length of one contiguous run."""
        return math.prod(self.shape[self.outer :]) * self.itemsize

    @property
    def has_long_runs(self) -> bool:
        return self.is_whole or self.run_nbytes >= _MIN_RUN_NBYTES

    def run_offsets(self) -> Iterator[int]:
        """Byte offset in the piece of every run, in row-major order of the region."""
        strides = self._strides()
        start = sum(s * n for s, n in zip(self.start, strides, strict=True))
        for outer in self._outer_positions():
            yield (start + sum(p * n for p, n in zip(outer, strides, strict=False))) * self.itemsize

    def destination_offsets(self, destination: torch.Tensor) -> Iterator[int]:
        """Byte offset from the destination's first element of every run, in the same order."""
        strides = destination.stride()
        for outer in self._outer_positions():
            yield sum(p * s for p, s in zip(outer, strides, strict=False)) * self.itemsize

    def fits_runs(self, destination: torch.Tensor) -> bool:
        """Whether each run is contiguous in the destination too."""
        expected = 1
        for dimension in reversed(range(self.outer, len(self.shape))):
            if self.shape[dimension] != 1 and destination.stride(dimension) != expected:
                return False
            expected *= self.shape[dimension]
        return True

    def rows(self) -> tuple[int, Box]:
        """(byte offset, box) of the whole dimension-0 rows that the region touches, as a piece of its own."""
        if not self.sizes:
            return 0, self
        rows = (self.shape[0], *self.sizes[1:])
        offset = self.start[0] * self._strides()[0] * self.itemsize
        return offset, Box(rows, (0, *self.start[1:]), self.shape, self.itemsize)

    def _outer_positions(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*(range(n) for n in self.shape[: self.outer]))

    def _strides(self) -> list[int]:
        """Elements from one index to the next, per dimension of the piece."""
        return [math.prod(self.sizes[d + 1 :]) for d in range(len(self.sizes))]


def runs(box: Box, raw: Extent, destination: torch.Tensor) -> Iterator[tuple[Extent, int]]:
    """(extent of the file, address) of every run of ``box``.

    Args:
        box: the region, whose runs fit the destination.
        raw: where the piece's raw data lies.
        destination: addressable tensor of the region's shape and the piece's dtype.
    """
    if box.is_whole and destination.is_contiguous():
        yield raw, destination.data_ptr()
        return
    base, nbytes = destination.data_ptr(), box.run_nbytes
    for source, target in zip(box.run_offsets(), box.destination_offsets(destination), strict=True):
        yield Extent(raw.path, raw.offset + source, nbytes), base + target
