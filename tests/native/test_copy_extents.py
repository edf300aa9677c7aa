# SPDX-License-Identifier: Apache-2.0
"""copy_extents against the bytes it was given."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_fast import native
from tests.native.memory import Memory, column, noise

TASK = 4 << 20  # the engine cuts the work here


def copied(sizes: list[int], threads: int) -> None:
    sources = [Memory(noise(nbytes, seed=i), misalign=i % 9) for i, nbytes in enumerate(sizes)]
    targets = [Memory(bytes(nbytes), misalign=i % 7) for i, nbytes in enumerate(sizes)]
    to, at = (column(*(memory.address for memory in memories)) for memories in (targets, sources))
    native.copy_extents(to, at, column(*sizes), threads)
    assert [target.content() for target in targets] == [source.content() for source in sources]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(sizes=st.lists(st.integers(0, 5000), max_size=30), threads=st.integers(1, 4))
def test_small_rows(native_impl, sizes, threads) -> None:
    copied(sizes, threads)


@pytest.mark.parametrize(
    "sizes", [[TASK], [TASK - 1, 2], [1, TASK, 0, TASK], [3 * TASK + 5, 100], [1000] * 9000]
)
def test_rows_across_tasks(native_impl, sizes) -> None:
    copied(sizes, threads=3)


@pytest.mark.parametrize(
    ("columns", "threads", "message"),
    [
        ((column(0, 0), column(0, 0), column(0)), 1, "the columns of copy_extents differ in length"),
        ((column(0), column(0), column(0)), 0, "threads must be at least 1"),
        ((column(0, 0), column(0, 0), column(0, -1)), 1, "row 1 has a negative size"),
    ],
)
def test_bad_requests(native_impl, columns, threads, message) -> None:
    with pytest.raises(ValueError, match=message):
        native.copy_extents(*columns, threads)
