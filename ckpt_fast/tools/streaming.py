# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint, read window by window in bounded memory, however they are divided."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from ckpt_fast.errors import CheckpointCorruptError
from ckpt_fast.format.types import TensorRequest
from ckpt_fast.pipeline.load.entries.kinds import SavedTensor
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors

# Reads from 32 MiB on pass the page cache.
WINDOW_NBYTES = 36 << 20
_ALIGNMENT = 64

# Called with the bytes done, and those that there are.
Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """For those whom nobody watches."""


class Window(NamedTuple):
    """A box of a saved tensor: where it starts, and its extent in every dimension."""

    name: str
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in it."""
        return math.prod(self.shape)


def boxes(shape: Sequence[int], most: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(start, shape) of boxes of at most ``most`` elements that make up a tensor.

    The elements of each follow one another in the tensor's row-major order, and the boxes too.
    """
    if math.prod(shape) <= most:
        yield (0,) * len(shape), tuple(shape)
        return
    inner, cut = 1, len(shape)
    while inner * shape[cut - 1] <= most:
        cut -= 1
        inner *= shape[cut]
    cut -= 1
    rows = max(1, most // inner)
    rest = (0,) * (len(shape) - cut - 1)
    for outer in itertools.product(*map(range, shape[:cut])):
        for row in range(0, shape[cut], rows):
            extent = (*(1 for _ in outer), min(rows, shape[cut] - row), *shape[cut + 1 :])
            yield (*outer, row, *rest), extent


def windows_of(tensor: SavedTensor, nbytes: int, itemsize: int | None = None) -> Iterator[Window]:
    """Windows of at most ``nbytes`` bytes that make up a saved tensor, each in one of its pieces.

    Args:
        tensor: the tensor.
        nbytes: of the largest window; a single element may be larger.
        itemsize: bytes an element; None: the tensor's.

    Raises:
        CheckpointCorruptError: the checkpoint has not all of the tensor.
    """
    pieces = {(piece.offsets, piece.sizes) for piece in tensor.pieces if 0 not in piece.sizes}
    covered, whole = sum(math.prod(sizes) for _, sizes in pieces), math.prod(tensor.shape)
    if not whole:
        yield Window(tensor.fqn, (0,) * len(tensor.shape), tensor.shape)
    if covered != whole:
        raise CheckpointCorruptError(f"{tensor.fqn} has pieces for {covered} of its {whole} elements")
    most = max(1, nbytes // (itemsize or tensor.dtype.itemsize))
    for offsets, sizes in sorted(pieces):
        for start, extent in boxes(sizes, most):
            yield Window(tensor.fqn, tuple(map(sum, zip(offsets, start, strict=True))), extent)


def batches(
    windows: Iterable[Window], itemsize: Callable[[str], int], nbytes: int = WINDOW_NBYTES
) -> Iterator[list[Window]]:
    """Windows together, as many as a ``WindowBuffer`` of ``nbytes`` holds; a larger one alone."""
    batch: list[Window] = []
    used = 0
    for window in windows:
        size = _padded(window.numel * itemsize(window.name))
        if batch and used + size > nbytes:
            yield batch
            batch, used = [], 0
        batch.append(window)
        used += size
    if batch:
        yield batch


class WindowBuffer:
    """Host memory that windows are read into, again and again.

    Args:
        index: the checkpoint that they are of.
        nbytes: of the memory; it grows to what a larger batch needs.
    """

    def __init__(self, index: CheckpointIndex, nbytes: int = WINDOW_NBYTES) -> None:
        self._index = index
        self._memory = torch.empty(nbytes, dtype=torch.uint8)

    def read(self, batch: Sequence[Window]) -> list[torch.Tensor]:
        """The windows' elements, valid until the next call.

        What is read is compared with the manifest's checksums. Archives of other libraries have one for each
        whole item, and are not checked here.

        Raises:
            CheckpointError: see ``load_tensors``.
        """
        tensors, at = [], 0
        sizes = []
        for window in batch:
            dtype = self._index.tensor(window.name).dtype
            sizes.append((dtype, window.numel * dtype.itemsize))
        needed = sum(_padded(nbytes) for _, nbytes in sizes)
        if needed > len(self._memory):
            self._memory = torch.empty(needed, dtype=torch.uint8)
        for window, (dtype, nbytes) in zip(batch, sizes, strict=True):
            tensors.append(self._memory[at : at + nbytes].view(dtype).view(window.shape))
            at += _padded(nbytes)
        requests = [
            TensorRequest(window.name, tensor, window.start)
            for window, tensor in zip(batch, tensors, strict=True)
        ]
        load_tensors(self._index, requests, verify=None if self._index.manifest is not None else False)
        return tensors


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
