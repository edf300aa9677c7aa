# SPDX-License-Identifier: Apache-2.0
"""permute_rows against slices joined in Python."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_fast import native
from tests.native.memory import Memory, noise


def interleaved(content: bytes, row_nbytes: int, block: int) -> bytes:
    half, run = len(content) // 2, block * row_nbytes
    w, v = content[:half], content[half:]
    return b"".join(w[at : at + run] + v[at : at + run] for at in range(0, half, run))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    pairs=st.integers(0, 9),
    block=st.integers(1, 5),
    row_nbytes=st.one_of(st.integers(1, 70), st.sampled_from([4096, 100_001])),
    threads=st.integers(1, 3),
)
def test_there_and_back(native_impl, pairs, block, row_nbytes, threads) -> None:
    rows = 2 * block * pairs
    content = noise(rows * row_nbytes)
    source, there, back = Memory(content), Memory(bytes(len(content)), 3), Memory(bytes(len(content)))
    native.permute_rows(there.address, source.address, rows, row_nbytes, block, True, threads)
    assert there.content() == (interleaved(content, row_nbytes, block) if content else b"")
    native.permute_rows(back.address, there.address, rows, row_nbytes, block, False, threads)
    assert back.content() == content


@pytest.mark.parametrize(("block", "row_nbytes"), [(1, 3000), (32, 8192), (64, 37)])
def test_larger_than_the_caches(native_impl, block, row_nbytes) -> None:
    rows = (12 << 20) // (2 * block * row_nbytes) * 2 * block
    content = noise(rows * row_nbytes)
    source, there = Memory(content), Memory(bytes(len(content)), 5)
    native.permute_rows(there.address, source.address, rows, row_nbytes, block, True, 2)
    assert there.content() == interleaved(content, row_nbytes, block)


@pytest.mark.parametrize(
    ("rows", "block", "threads", "message"),
    [
        (6, 2, 1, "6 rows do not divide into pairs of blocks of 2"),
        (4, 0, 1, "block is 0, not at least 1"),
        (4, 2, 0, "threads is 0, not at least 1"),
        (-4, 2, 1, "rows and row_nbytes must not be negative"),
    ],
)
def test_sizes_that_do_not_fit(native_impl, rows, block, threads, message) -> None:
    with pytest.raises(ValueError, match=message):
        native.permute_rows(0, 0, rows, 8, block, True, threads)
