# SPDX-License-Identifier: Apache-2.0
"""Place: a box of a saved piece goes into a tensor, as runs of bytes that are contiguous on both sides."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch

from ckpt_fast.format.types import Extent, Runs
from ckpt_fast.pipeline.memory import strided
from ckpt_fast.pipeline.memory.device_rows import copy_across

# A system call for each shorter run takes longer than to read the rows around them and cut them in memory.
_MIN_RUN_NBYTES = 256


def is_addressable(destination: Destination) -> bool:
    """Whether the engine may write into the destination's memory: plain strided CPU memory."""
    tensor = destination.tensor if isinstance(destination, Reshaped) else destination
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

    def span(self) -> tuple[int, int]:
        """The offsets in the piece at which its first byte starts and its last one ends."""
        if not all(self.shape):
            return 0, 0
        strides = self._strides()
        first = sum(index * stride for index, stride in zip(self.start, strides, strict=True))
        more = sum((size - 1) * stride for size, stride in zip(self.shape, strides, strict=True))
        return first * self.itemsize, (first + more + 1) * self.itemsize

    def run_offsets(self, base: int = 0) -> array[int]:
        """``base`` plus the byte offset in the piece of every run, in row-major order of the region."""
        strides = [stride * self.itemsize for stride in self._strides()]
        start = sum(index * stride for index, stride in zip(self.start, strides, strict=True))
        return strided.column(strided.positions(base + start, self.shape[: self.outer], strides))

    def destination_addresses(self, destination: torch.Tensor) -> array[int]:
        """The start of every run in the destination's memory, in the same order."""
        strides = [stride * self.itemsize for stride in destination.stride()]
        return strided.column(strided.positions(destination.data_ptr(), self.shape[: self.outer], strides))

    def fits_runs(self, destination: Destination) -> bool:
        """Whether each run is contiguous in the destination too."""
        if destination.is_contiguous():
            return True
        if isinstance(destination, Reshaped):
            return destination.has_whole_runs(self)
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


class Reshaped:
    """A strided tensor as a destination of another shape, or a region of that.

    Args:
        tensor: holds the elements in row-major order of ``sizes``.
        sizes: the shape it stands for, of which there may be no view.
        start, shape: the region; all of it by default.
    """

    def __init__(
        self,
        tensor: torch.Tensor,
        sizes: Sequence[int],
        start: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        self.tensor, self.sizes = tensor.detach(), tuple(sizes)
        self.start = tuple(start) if start is not None else (0,) * len(self.sizes)
        self.shape = tuple(shape) if shape is not None else self.sizes

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def is_cuda(self) -> bool:
        return self.tensor.is_cuda

    def is_contiguous(self) -> bool:
        return False

    def narrow(self, dimension: int, start: int, size: int) -> Reshaped:
        """Like a tensor's."""
        starts, shape = list(self.start), list(self.shape)
        starts[dimension] += start
        shape[dimension] = size
        return Reshaped(self.tensor, self.sizes, starts, shape)

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> None:
        """Like a tensor's, but for a part of the elements all of them are moved."""
        if self.shape == self.sizes:
            copy_across(self.tensor, source.reshape(self.tensor.shape), non_blocking)
            return
        whole = self.tensor.clone(memory_format=torch.contiguous_format).view(self.sizes)
        region = whole
        for dimension, (start, size) in enumerate(zip(self.start, self.shape, strict=True)):
            region = region.narrow(dimension, start, size)
        region.copy_(source, non_blocking=non_blocking)
        self.tensor.copy_(whole.view(self.tensor.shape))

    def has_whole_runs(self, box: Box) -> bool:
        """Whether the box's runs come apart in memory into pieces that are long enough, if at all."""
        if self.shape[box.outer + 1 :] != self.sizes[box.outer + 1 :]:
            return False
        return self._run_elements(box, self._begins(box)) * box.itemsize >= _MIN_RUN_NBYTES

    def runs(self, box: Box, raw: Extent) -> Runs:
        """As ``runs``, in pieces that are contiguous in the file and in memory."""
        begins, own = self._begins(box), strided.run_nbytes(self.tensor) // box.itemsize
        length = self._run_elements(box, begins)
        steps = torch.arange(0, box.run_nbytes // box.itemsize, length)
        begins = (begins.unsqueeze(1) + steps).flatten()
        offsets = torch.tensor(box.run_offsets(raw.offset)).unsqueeze(1) + steps * box.itemsize
        addresses = strided.run_addresses(self.tensor)[begins // own] + begins % own * box.itemsize
        return Runs(strided.column(offsets.flatten()), strided.column(addresses), length * box.itemsize)

    def _begins(self, box: Box) -> torch.Tensor:
        """The element, in row-major order of ``sizes``, with which each of the box's runs begins."""
        strides = [math.prod(self.sizes[d + 1 :]) for d in range(len(self.sizes))]
        first = sum(index * stride for index, stride in zip(self.start, strides, strict=True))
        return strided.positions(first, self.shape[: box.outer], strides)

    def _run_elements(self, box: Box, begins: torch.Tensor) -> int:
        """Into how long pieces all runs can be cut so that none crosses a gap in memory."""
        own = strided.run_nbytes(self.tensor) // box.itemsize
        return math.gcd(box.run_nbytes // box.itemsize, own, *set(begins.tolist()))


Destination = torch.Tensor | Reshaped


def runs(box: Box, raw: Extent, destination: Destination) -> Runs:
    """Every run of ``box``: where in the file, where in memory.

    Args:
        box: the region, whose runs fit the destination.
        raw: where the piece's raw data lies.
        destination: addressable, of the region's shape and the piece's dtype.
    """
    if isinstance(destination, Reshaped):
        return destination.runs(box, raw)
    return Runs(box.run_offsets(raw.offset), box.destination_addresses(destination), box.run_nbytes)
