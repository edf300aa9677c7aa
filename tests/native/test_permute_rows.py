# SPDX-License-Identifier: Apache-2.0
"""permute_rows compared with slices joined in Python."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_fast import native
from tests.native.memory import Memory, column, noise


def interleaved(content: bytes, row_nbytes: int, block: int) -> bytes:
    half, run = len(content) // 2, block * row_nbytes
    w, v = content[:half], content[half:]
    return b"".join(w[at : at + run] + v[at : at + run] for at in range(0, half, run))


def permute(matrices: list[tuple[int, ...]], interleave: bool, threads: int) -> None:
    native.permute_rows(*(column(*values) for values in zip(*matrices, strict=True)), interleave, threads)


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
    permute([(there.address, source.address, rows, row_nbytes, block)], True, threads)
    assert there.content() == (interleaved(content, row_nbytes, block) if content else b"")
    permute([(back.address, there.address, rows, row_nbytes, block)], False, threads)
    assert back.content() == content


@pytest.mark.parametrize(("block", "row_nbytes"), [(1, 3000), (32, 8192), (64, 37)])
def test_larger_than_the_caches(native_impl, block, row_nbytes) -> None:
    rows = (12 << 20) // (2 * block * row_nbytes) * 2 * block
    content = noise(rows * row_nbytes)
    source, there = Memory(content), Memory(bytes(len(content)), 5)
    permute([(there.address, source.address, rows, row_nbytes, block)], True, 2)
    assert there.content() == interleaved(content, row_nbytes, block)


def test_many_matrices_at_once(native_impl) -> None:
    """Of different widths and block sizes, some empty, one larger than a task."""
    shapes = [(8, 5, 2), (0, 7, 3), (600, 4000, 1), (12, 0, 6), (64, 1000, 32)]
    contents = [noise(rows * row_nbytes, seed=rows) for rows, row_nbytes, _ in shapes]
    sources = [Memory(content, misalign=i) for i, content in enumerate(contents)]
    targets = [Memory(bytes(len(content)), misalign=2 * i) for i, content in enumerate(contents)]
    matrices = [(t.address, s.address, *shape) for t, s, shape in zip(targets, sources, shapes, strict=True)]
    permute(matrices, True, 3)
    for target, content, (_, row_nbytes, block) in zip(targets, contents, shapes, strict=True):
        assert target.content() == (interleaved(content, row_nbytes, block) if content else b"")


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
        permute([(0, 0, 4, 8, 2), (0, 0, rows, 8, block)], True, threads)


def test_columns_of_different_lengths(native_impl) -> None:
    with pytest.raises(ValueError, match="the columns of permute_rows differ in length"):
        native.permute_rows(column(0), column(0), column(4), column(8), column(), True, 1)
