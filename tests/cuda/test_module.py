# SPDX-License-Identifier: Apache-2.0
"""The CUDA extension module by itself: what it refuses, and that it can be imported without a GPU."""

from __future__ import annotations

import subprocess
import sys
from array import array

import pytest

_cuda = pytest.importorskip("ckpt_fast.native._cuda", reason="the CUDA part is not built")


def test_import_shows_no_device_where_none_is_visible() -> None:
    code = "from ckpt_fast.native import _cuda; print(_cuda.device_count())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout == "0\n"


def columns_of(row: tuple[int, ...]) -> list[array[int]]:
    return [array("q", [value]) for value in row]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ((4096, 8192, 6, 4, 2), "6 rows are not a multiple of 2 \\* 2"),
        ((4096, 8192, 8, 4, 0), "block is 0"),
        ((4096, 8192, -8, 4, 2), "must not be negative"),
        ((4096, 8192, 8, -4, 2), "must not be negative"),
        ((4096, 4096 + 31, 8, 4, 2), "overlap"),
        ((4096, 4096, 8, 4, 4), "overlap"),
        ((4096, 8192, 1 << 40, 1 << 40, 1), "overflow"),
        ((4096, 8192, 8, 1, 1 << 62), "not a multiple"),
    ],
)
def test_refuses_before_it_enqueues(row: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _cuda.permute_rows(*columns_of(row), True, 0, 0)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ((4096, 15, 8192, 16, 16, 4), "destination pitch of 15"),
        ((4096, 16, 8192, 1 << 31, 16, 4), "source pitch of 2147483648"),
        ((4096, 16, 8192, 16, -1, 4), "must not be negative"),
        ((4096, 16, 8192, 16, 16, -4), "must not be negative"),
    ],
)
def test_copies_that_no_engine_takes(row: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _cuda.copy_rows(*row, 0, 0)


def test_columns_are_64_bit_and_of_one_length() -> None:
    column = array("q", [4096, 8192])
    with pytest.raises(TypeError, match="block is not a one-dimensional buffer of signed 64-bit"):
        _cuda.permute_rows(column, column, column, column, array("i", [1, 1]), True, 0, 0)
    with pytest.raises(ValueError, match="differ in length"):
        _cuda.permute_rows(column, column, column, column, array("q", [1]), True, 0, 0)


def test_failures_carry_the_call_and_its_text() -> None:
    absent = _cuda.device_count()
    with pytest.raises(RuntimeError, match=r"device.*: .+ \(cudaError\w+\)"):
        _cuda.permute_rows(*columns_of((4096, 8192, 8, 4, 2)), True, absent, 0)
