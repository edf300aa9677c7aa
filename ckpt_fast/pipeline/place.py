# SPDX-License-Identifier: Apache-2.0
"""Place: a box of a saved piece goes into a tensor, as runs of bytes that are contiguous on both sides."""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Sequence

import torch

from ckpt_fast.pipeline.types import Extent, Runs

# A system call for each shorter run takes longer than to read the rows around them and cut them in memory.
_MIN_RUN_NBYTES = 256


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

    def run_offsets(self, base: int = 0) -> array[int]:
        """``base`` plus the byte offset in the piece of every run, in row-major order of the region."""
        strides = [stride * self.itemsize for stride in self._strides()]
        start = sum(index * stride for index, stride in zip(self.start, strides, strict=True))
        return _positions(base + start, self.shape[: self.outer], strides)

    def destination_addresses(self, destination: torch.Tensor) -> array[int]:
        """Where in the destination's memory every run begins, in the same order."""
        strides = [stride * self.itemsize for stride in destination.stride()]
        return _positions(destination.data_ptr(), self.shape[: self.outer], strides)

    def fits_runs(self, destination: torch.Tensor) -> bool:
        """Whether each run is contiguous in the destination too."""
        if destination.is_contiguous():
            return True
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

    def _strides(self) -> list[int]:
        """Elements from one index to the next, per dimension of the piece."""
        return [math.prod(self.sizes[d + 1 :]) for d in range(len(self.sizes))]


def runs(box: Box, raw: Extent, destination: torch.Tensor) -> Runs:
    """Every run of ``box``: where in the file, where in memory.

    Args:
        box: the region, whose runs fit the destination.
        raw: where the piece's raw data lies.
        destination: addressable tensor of the region's shape and the piece's dtype.
    """
    return Runs(box.run_offsets(raw.offset), box.destination_addresses(destination), box.run_nbytes)


def _positions(start: int, counts: Sequence[int], strides: Sequence[int]) -> array[int]:
    """``start`` plus every combination of a multiple of each stride, below the count; row-major.

    There can be millions, which is too much work for a loop in Python.
    """
    positions = torch.tensor([start])
    for count, stride in zip(counts, strides, strict=False):
        positions = (positions.unsqueeze(1) + torch.arange(count) * stride).flatten()
    return array("q", ctypes.string_at(positions.data_ptr(), positions.nbytes))
