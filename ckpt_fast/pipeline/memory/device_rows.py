# SPDX-License-Identifier: Apache-2.0
"""Strided memory of a GPU, to and from the host without a contiguous copy of it on either side."""

from __future__ import annotations

import torch

from ckpt_fast import native
from ckpt_fast.pipeline.memory import strided

# What a copy engine takes as the distance between two rows.
_PITCH_LIMIT = 1 << 31

# Series that are copied by a call each: the gate and the up rows of a gated linear unit.
_FEW = 2


def copy_across(destination: torch.Tensor, source: torch.Tensor, non_blocking: bool = True) -> None:
    """``destination.copy_(source)``. Between a GPU and page-locked memory without memory in between.

    torch makes a contiguous copy on the GPU first, if either side is not contiguous.

    Args:
        destination, source: of one shape.
        non_blocking: as of ``Tensor.copy_``; host memory that is not page-locked blocks anyway.
    """
    if destination.is_cuda != source.is_cuda and non_blocking and destination.dtype == source.dtype:
        device = (destination if destination.is_cuda else source).device
        pairs = _paired_rows(destination, source)
        cuda = native.cuda()
        if cuda is not None and pairs is not None:
            stream = torch.cuda.current_stream(device).cuda_stream
            for to, origin in pairs:
                cuda.copy_rows(
                    to.address,
                    to.pitch,
                    origin.address,
                    origin.pitch,
                    to.nbytes,
                    to.number,
                    device.index,
                    stream,
                )
            return
    if destination.dtype == source.dtype:
        destination, source = as_copied(destination), as_copied(source)
    destination.copy_(source, non_blocking=non_blocking)


def as_copied(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes, if each value has one: torch copies no strided tensor of some such types."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 and not tensor.is_neg() else tensor


def _paired_rows(
    destination: torch.Tensor, source: torch.Tensor
) -> list[tuple[strided.Rows, strided.Rows]] | None:
    """The same rows on both sides, where one side is contiguous and the other lies in few series of rows."""
    apart = source if destination.is_contiguous() else destination
    packed = destination if destination.is_contiguous() else source
    special = (tensor.is_conj() or tensor.is_neg() for tensor in (destination, source))
    if apart.is_contiguous() or not packed.is_contiguous() or any(special):
        return None
    series = strided.as_rows(apart)
    if len(series) > _FEW or any(rows.pitch >= _PITCH_LIMIT or rows.pitch < rows.nbytes for rows in series):
        return None
    pairs, address = [], packed.data_ptr()
    for rows in series:
        together = strided.Rows(address, rows.nbytes, rows.nbytes, rows.number)
        pairs.append((together, rows) if packed is destination else (rows, together))
        address += rows.nbytes * rows.number
    return pairs
