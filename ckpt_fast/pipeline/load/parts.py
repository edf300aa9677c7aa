# SPDX-License-Identifier: Apache-2.0
"""Parts: which regions of which saved pieces make up what a load wants."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ckpt_fast.errors import CheckpointCorruptError, CheckpointMismatchError
from ckpt_fast.format.consistency import Region, missing_message
from ckpt_fast.format.types import TensorRequest
from ckpt_fast.pipeline.load.entries.kinds import Piece, SavedTensor
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.place import Box, Destination, Reshaped, is_addressable
from ckpt_fast.pipeline.memory.forms import has_own_memory
from ckpt_fast.pipeline.memory.strided import has_storage


class Part(NamedTuple):
    """A region of one piece, wanted in ``destination`` (of the region's shape)."""

    tensor: SavedTensor
    piece: Piece
    box: Box
    destination: Destination


def require_memory(fqn: str, destination: torch.Tensor) -> None:
    """Raise if nothing can be loaded into a destination.

    Raises:
        CheckpointMismatchError: it is on the meta device, or its storage is too small.
    """
    if destination.is_meta:
        raise CheckpointMismatchError(
            f"{fqn} cannot be loaded into a tensor on the meta device, which has no memory. Give the model "
            "memory first, with module.to_empty(device=...)."
        )
    if has_own_memory(destination) and not has_storage(destination):
        raise CheckpointMismatchError(
            f"{fqn} cannot be loaded into a tensor of {destination.numel()} elements whose storage has "
            f"{destination.untyped_storage().nbytes()} bytes: it was freed, or is shared with something that "
            "resized it. Load while the tensor has its memory."
        )


def parts_of(index: CheckpointIndex, request: TensorRequest) -> list[Part]:
    """The parts that make up a requested region.

    Raises:
        CheckpointMismatchError: the name is missing or the region lies outside the saved tensor.
        CheckpointCorruptError: pieces of the region are missing.
    """
    destination = _destination(request)
    wanted = tuple(destination.shape)
    # A tensor may have thousands of pieces of which one is wanted.
    tensor, piece = index.tensor_within(request.fqn, request.offsets, wanted)
    if piece is not None:
        box = Box(piece.sizes, (0,) * len(wanted), wanted, tensor.dtype.itemsize)
        return [Part(tensor, piece, box, destination)]
    return _overlaps(tensor, wanted, request)


def _destination(request: TensorRequest) -> Destination:
    if request.sizes is None:
        return request.destination
    if request.destination.is_contiguous():
        return request.destination.view(request.sizes)
    return Reshaped(request.destination, request.sizes)


def _overlaps(tensor: SavedTensor, wanted: tuple[int, ...], request: TensorRequest) -> list[Part]:
    if len(wanted) != len(tensor.shape) or any(
        offset < 0 or offset + size > limit
        for offset, size, limit in zip(request.offsets, wanted, tensor.shape, strict=True)
    ):
        raise CheckpointMismatchError(
            f"{tensor.fqn} is saved with shape {tensor.shape}; a region of shape {wanted} at "
            f"{request.offsets} does not fit. The model differs from the one that was saved."
        )
    parts, found = [], []
    for piece in tensor.pieces:
        low = [max(a, b) for a, b in zip(request.offsets, piece.offsets, strict=True)]
        high = [
            min(a + n, b + m)
            for a, n, b, m in zip(request.offsets, wanted, piece.offsets, piece.sizes, strict=True)
        ]
        shape = tuple(b - a for a, b in zip(low, high, strict=True))
        if any(size <= 0 for size in shape):
            continue
        destination = _destination(request)
        for dimension, size in enumerate(shape):
            if size != wanted[dimension]:
                destination = destination.narrow(dimension, low[dimension] - request.offsets[dimension], size)
        start = [a - b for a, b in zip(low, piece.offsets, strict=True)]
        box = Box(piece.sizes, start, shape, tensor.dtype.itemsize)
        parts.append(Part(tensor, piece, box, destination))
        found.append(Region(tuple(a - b for a, b in zip(low, request.offsets, strict=True)), shape))
    # Pieces have no element in common.
    if sum(region.numel for region in found) != math.prod(wanted):
        raise CheckpointCorruptError(missing_message(tensor.fqn, request.offsets, wanted, found))
    return parts


def landing_nbytes(part: Part) -> int:
    """Host memory that a part needs besides its destination, which the engine cannot read it into."""
    if not part.box.has_long_runs:
        return math.prod(part.box.rows()[1].sizes) * part.box.itemsize
    if (
        is_addressable(part.destination)
        and part.destination.dtype == part.tensor.dtype
        and part.box.fits_runs(part.destination)
    ):
        return 0
    return math.prod(part.box.shape) * part.box.itemsize
