# SPDX-License-Identifier: Apache-2.0
"""Boxes as runs of bytes, compared with numpy's slicing."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_fast.format.types import Extent
from ckpt_fast.pipeline.load.place import Box, Reshaped, is_addressable, runs
from tests.pipeline.layouts import Region, boxes, shapes


@st.composite
def regions_of_pieces(draw: st.DrawFn) -> tuple[tuple[int, ...], Region]:
    sizes = draw(shapes)
    return sizes, draw(boxes(sizes).filter(lambda region: 0 not in region.sizes))


def piece_of(sizes: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(sizes), dtype=np.int32).reshape(sizes)


@given(regions_of_pieces())
def test_runs_are_the_region_in_row_major_order(case: tuple[tuple[int, ...], Region]) -> None:
    sizes, region = case
    piece = piece_of(sizes)
    box = Box(sizes, region.offsets, region.sizes, 4)
    offsets = list(box.run_offsets())
    assert len(offsets) * box.run_nbytes == math.prod(region.sizes) * 4
    flat = piece.tobytes()
    joined = b"".join(flat[offset : offset + box.run_nbytes] for offset in offsets)
    assert joined == np.ascontiguousarray(piece[region_slices(region)]).tobytes()
    assert box.is_whole == (sizes == region.sizes)


@given(regions_of_pieces())
def test_runs_do_not_touch(case: tuple[tuple[int, ...], Region]) -> None:
    """Adjacent runs should have been one."""
    sizes, region = case
    box = Box(sizes, region.offsets, region.sizes, 4)
    starts = set(box.run_offsets())
    assert not starts & {start + box.run_nbytes for start in starts}


@given(regions_of_pieces())
def test_rows_hold_the_region_and_little_else(case: tuple[tuple[int, ...], Region]) -> None:
    sizes, region = case
    piece = piece_of(sizes)
    offset, rows = Box(sizes, region.offsets, region.sizes, 4).rows()
    nbytes = math.prod(rows.sizes) * 4
    read = np.frombuffer(piece.tobytes()[offset : offset + nbytes], np.int32).reshape(rows.sizes)
    inside = tuple(slice(a, a + n) for a, n in zip(rows.start, rows.shape, strict=True))
    np.testing.assert_array_equal(read[inside], piece[region_slices(region)])
    if sizes:
        assert rows.sizes[0] == region.sizes[0], "rows nobody asked for"


@given(regions_of_pieces(), st.integers(0, 3), st.booleans())
def test_copying_runs_fills_any_destination_they_fit(
    case: tuple[tuple[int, ...], Region], pad: int, swap: bool
) -> None:
    sizes, region = case
    piece = piece_of(sizes)
    padded = [n + pad for n in region.sizes]
    destination = torch.full(padded[::-1] if swap else padded, -1, dtype=torch.int32)
    if swap:
        destination = destination.permute(*reversed(range(len(sizes)))) if sizes else destination
    for dimension, size in enumerate(region.sizes):
        destination = destination.narrow(dimension, pad // 2, size)
    box = Box(sizes, region.offsets, region.sizes, 4)
    expected = piece[region_slices(region)]
    if not box.fits_runs(destination):
        assert not destination.is_contiguous()
        return
    source = piece.tobytes()
    offsets, addresses, nbytes = runs(box, Extent("file", 1000, len(source)), destination)
    for offset, address in zip(offsets, addresses, strict=True):
        ctypes.memmove(address, source[offset - 1000 : offset - 1000 + nbytes], nbytes)
    np.testing.assert_array_equal(destination.numpy(), expected)


def region_slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(region.offsets, region.sizes, strict=True))


@st.composite
def reshaped_regions(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[int, ...], Region, tuple[int, ...]]:
    """Return strided memory, the shape it represents, a region of that, and a piece's extents."""
    blocks, k, width = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 64, 100]))
    memory = torch.zeros(blocks, 2, k, width, dtype=torch.int32)
    view = draw(st.sampled_from([memory[:, 0], memory[:, 1], memory.transpose(0, 1)]))
    sizes = (1, view.numel() // width, width)
    region = draw(boxes(sizes).filter(lambda region: 0 not in region.sizes))
    piece = tuple(n + draw(st.integers(0, 3)) for n in region.sizes)
    return view, sizes, region, piece


@given(reshaped_regions())
def test_a_reshaped_destination_is_filled_by_runs_and_by_copies(
    case: tuple[torch.Tensor, tuple[int, ...], Region, tuple[int, ...]],
) -> None:
    view, sizes, region, piece_sizes = case
    expected = torch.zeros(sizes, dtype=torch.int32)
    source = torch.arange(1, 1 + math.prod(piece_sizes), dtype=torch.int32).reshape(piece_sizes)
    wanted = Region((0, 0, 0), region.sizes).of(source)
    region.of(expected).copy_(wanted)

    whole = Reshaped(view, sizes)
    destination = whole
    for dimension, (start, size) in enumerate(zip(region.offsets, region.sizes, strict=True)):
        destination = destination.narrow(dimension, start, size)
    destination.copy_(wanted)
    assert torch.equal(view.reshape(sizes), expected)

    box = Box(piece_sizes, (0, 0, 0), region.sizes, 4)
    if not box.fits_runs(destination):
        return
    view.zero_()
    content = source.numpy().tobytes()
    offsets, addresses, nbytes = runs(box, Extent("file", 1000, len(content)), destination)
    for offset, address in zip(offsets, addresses, strict=True):
        ctypes.memmove(address, content[offset - 1000 : offset - 1000 + nbytes], nbytes)
    assert torch.equal(view.reshape(sizes), expected)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(2, 3), True),
        (torch.zeros(2, 3).t(), True),
        (torch.zeros(2, dtype=torch.complex64).conj(), False),
        (torch.zeros(2, dtype=torch.complex64).conj().imag, False),
        (torch.zeros(2, 3).to_sparse(), False),
        (torch.zeros(2, device="meta"), False),
    ],
    ids=["plain", "transposed", "conj", "negative", "sparse", "meta"],
)
def test_addressable(tensor: torch.Tensor, expected: bool) -> None:
    assert is_addressable(tensor) is expected
