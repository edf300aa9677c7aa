# SPDX-License-Identifier: Apache-2.0
"""Strided memory as runs: stretches in which a tensor's elements lie in row-major order without a gap."""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch

# Moving a run takes some bookkeeping; below this length, torch's own strided copy is faster.
_MIN_RUN_NBYTES = 1 << 10


def run_nbytes(tensor: torch.Tensor) -> int:
    """Length of the tensor's runs, all of which are equally long."""
    return math.prod(tensor.shape[_outer_dimensions(tensor) :]) * tensor.dtype.itemsize


def run_addresses(tensor: torch.Tensor) -> torch.Tensor:
    """The memory address at which each run begins, in row-major order of the tensor."""
    outer = _outer_dimensions(tensor)
    strides = [stride * tensor.dtype.itemsize for stride in tensor.stride()[:outer]]
    return positions(tensor.data_ptr(), tensor.shape[:outer], strides)


def has_storage(tensor: torch.Tensor) -> bool:
    """Whether the storage of a strided tensor has all its elements: it may have been freed, or cut short."""
    span = tensor.numel()
    if span and tensor.data_ptr() == 0:
        return False
    if not tensor.is_contiguous():
        span = (
            sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        )
    nbytes = (tensor.storage_offset() + span) * tensor.element_size()
    return not tensor.numel() or nbytes <= tensor.untyped_storage().nbytes()


def has_long_runs(tensor: torch.Tensor) -> bool:
    """Whether the memory of a strided tensor is worth moving run by run."""
    return tensor.layout == torch.strided and run_nbytes(tensor) >= _MIN_RUN_NBYTES


class Rows(NamedTuple):
    """Runs that begin ``pitch`` bytes apart."""

    address: int
    pitch: int
    nbytes: int
    number: int


def as_rows(tensor: torch.Tensor) -> list[Rows]:
    """The runs of a tensor, in row-major order of it, as series."""
    if tensor.is_contiguous():
        return [Rows(tensor.data_ptr(), tensor.nbytes, tensor.nbytes, 1)]
    outer = _outer_dimensions(tensor)
    nbytes = run_nbytes(tensor)
    strides = [stride * tensor.dtype.itemsize for stride in tensor.stride()[:outer]]
    starts = positions(tensor.data_ptr(), tensor.shape[: outer - 1], strides)
    return [Rows(start, strides[-1], nbytes, tensor.shape[outer - 1]) for start in starts.tolist()]


def positions(start: int, counts: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """``start`` plus every combination of a multiple of each stride, below the count; row-major.

    There can be millions, which is too much work for a loop in Python.
    """
    found = torch.tensor([start])
    for count, stride in zip(counts, strides, strict=False):
        found = (found.unsqueeze(1) + torch.arange(count) * stride).flatten()
    return found


def column(values: torch.Tensor) -> array[int]:
    """64-bit integers as the engine takes them."""
    values = values.contiguous()
    return array("q", ctypes.string_at(values.data_ptr(), values.nbytes) if values.numel() else b"")


def _outer_dimensions(tensor: torch.Tensor) -> int:
    """The number of leading dimensions outside the runs."""
    expected, outer = 1, tensor.dim()
    while outer > 0 and (tensor.shape[outer - 1] == 1 or tensor.stride(outer - 1) == expected):
        outer -= 1
        expected *= tensor.shape[outer]
    return outer
