# SPDX-License-Identifier: Apache-2.0
"""Strided memory as runs, and as rows for a copy engine, compared with torch's own order of elements."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_fast.pipeline.memory import strided
from ckpt_fast.pipeline.memory.device_rows import _paired_rows, copy_across
from tests.pipeline.layouts import raw_bytes


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    tensor = torch.arange(torch.Size(sizes).numel(), dtype=torch.int16).reshape(sizes)
    tensor = tensor.permute(draw(st.permutations(range(len(sizes)))))
    for dimension in range(len(sizes)):
        start = draw(st.integers(0, tensor.shape[dimension] - 1))
        tensor = tensor.narrow(dimension, start, draw(st.integers(1, tensor.shape[dimension] - start)))
    return tensor[:: draw(st.integers(1, 2))]


@given(views())
def test_runs_hold_the_elements_in_order(tensor: torch.Tensor) -> None:
    nbytes = strided.run_nbytes(tensor)
    runs = [ctypes.string_at(address, nbytes) for address in strided.column(strided.run_addresses(tensor))]
    assert b"".join(runs) == raw_bytes(tensor)
    assert tensor.is_contiguous() == (len(runs) == 1)


@given(views())
def test_rows_hold_the_elements_in_order(tensor: torch.Tensor) -> None:
    series = strided.as_rows(tensor)
    if series is None:
        return
    rows = [
        ctypes.string_at(each.address + number * each.pitch, each.nbytes)
        for each in series
        for number in range(each.number)
    ]
    assert b"".join(rows) == raw_bytes(tensor)


@pytest.mark.parametrize("part", ["gate", "up", "both"])
@pytest.mark.parametrize("inwards", [False, True])
def test_interleaved_rows_are_at_most_two_copies(part: str, inwards: bool) -> None:
    memory = torch.arange(6 * 2 * 3 * 5).reshape(6, 2, 3, 5)
    view = {"gate": memory[:, 0], "up": memory[:, 1], "both": memory.transpose(0, 1)}[part]
    packed = torch.zeros(view.shape, dtype=view.dtype)
    pairs = _paired_rows(view, packed) if inwards else _paired_rows(packed, view)
    assert pairs is not None and len(pairs) == (2 if part == "both" else 1)
    expected = raw_bytes(view)
    if inwards:
        packed.copy_(view)
        memory.zero_()
    for to, origin in pairs:
        for number in range(to.number):
            ctypes.memmove(to.address + number * to.pitch, origin.address + number * origin.pitch, to.nbytes)
    assert raw_bytes(view) == raw_bytes(packed) == expected


def test_what_has_no_rows_is_left_to_torch() -> None:
    cube = torch.arange(60).reshape(3, 4, 5)
    assert _paired_rows(torch.zeros(5, 4, 3, dtype=torch.int64), cube.permute(2, 1, 0)) is None
    assert _paired_rows(torch.zeros(3, 4, 5), cube) is None
    destination = torch.zeros(5, 4, 3, dtype=torch.int64)
    copy_across(destination, cube.permute(2, 1, 0))
    assert torch.equal(destination, cube.permute(2, 1, 0))
