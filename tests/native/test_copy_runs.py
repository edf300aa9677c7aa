# SPDX-License-Identifier: Apache-2.0
"""copy_runs compared with its input bytes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_fast import native
from tests.native.memory import Memory, column, noise

TASK = 4 << 20  # the engine splits the work here


def copied(sizes: list[int], threads: int) -> None:
    sources = [Memory(noise(nbytes, seed=i), misalign=i % 9) for i, nbytes in enumerate(sizes)]
    targets = [Memory(bytes(nbytes), misalign=i % 7) for i, nbytes in enumerate(sizes)]
    to, at = (column(*(memory.address for memory in memories)) for memories in (targets, sources))
    ones, unused = column(*[1] * len(sizes)), column(*[0] * len(sizes))
    native.copy_runs(to, at, column(*sizes), ones, unused, threads)
    assert [target.content() for target in targets] == [source.content() for source in sources]


def gathered(nbytes: int, run_count: int, members: int, gap: int, threads: int) -> None:
    """Series whose runs alternate, as the rows of interleaved weights do, with a gap after each run."""
    pitch = members * (nbytes + gap)
    source = Memory(noise(run_count * pitch), misalign=nbytes % 9)
    targets = [Memory(bytes(nbytes * run_count), misalign=i) for i in range(members)]
    begins = [member * (nbytes + gap) for member in range(members)]
    # The last member first: the order of the series need not be that in memory.
    series = [
        (target.address, source.address + begin, nbytes, run_count, pitch)
        for target, begin in zip(targets, begins, strict=True)
    ][::-1]
    native.copy_runs(*(column(*values) for values in zip(*series, strict=True)), threads)
    content = source.content()
    for target, begin in zip(targets, begins, strict=True):
        starts = [begin + run * pitch for run in range(run_count)]
        assert target.content() == b"".join(content[start : start + nbytes] for start in starts)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(sizes=st.lists(st.integers(0, 5000), max_size=30), threads=st.integers(1, 4))
def test_small_copies(native_impl, sizes, threads) -> None:
    copied(sizes, threads)


@pytest.mark.parametrize(
    "sizes", [[TASK], [TASK - 1, 2], [1, TASK, 0, TASK], [3 * TASK + 5, 100], [1000] * 9000]
)
def test_copies_across_tasks(native_impl, sizes) -> None:
    copied(sizes, threads=3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    nbytes=st.integers(0, 3000),
    run_count=st.integers(0, 12),
    members=st.integers(1, 4),
    gap=st.integers(0, 5),
    threads=st.integers(1, 4),
)
def test_series_of_runs(native_impl, nbytes, run_count, members, gap, threads) -> None:
    gathered(nbytes, run_count, members, gap, threads)


@pytest.mark.parametrize(
    ("nbytes", "run_count", "members", "gap"),
    [(4096, 3000, 2, 0), (4097, 3000, 2, 3), (4999, 2600, 3, 0), (TASK + 1, 3, 2, 7), (5000, 4000, 1, 0)],
)
def test_series_across_tasks(native_impl, nbytes, run_count, members, gap) -> None:
    gathered(nbytes, run_count, members, gap, threads=3)


def test_a_pitch_of_zero_repeats_the_run(native_impl) -> None:
    source, target = Memory(noise(1000)), Memory(bytes(7000))
    native.copy_runs(
        column(target.address), column(source.address), column(1000), column(7), column(0), threads=2
    )
    assert target.content() == source.content() * 7


def test_series_that_only_look_alike(native_impl) -> None:
    """The same pitch and neighboring starts, but different lengths or counts."""
    source = Memory(noise(4000))
    wanted = [(0, 100, 5, 400), (150, 50, 5, 400), (250, 100, 4, 400), (60, 20, 5, 300)]
    targets = [Memory(bytes(nbytes * run_count)) for _, nbytes, run_count, _ in wanted]
    series = [
        (target.address, source.address + begin, *shape)
        for target, (begin, *shape) in zip(targets, wanted, strict=True)
    ]
    native.copy_runs(*(column(*values) for values in zip(*series, strict=True)), 2)
    content = source.content()
    for target, (begin, nbytes, run_count, pitch) in zip(targets, wanted, strict=True):
        expected = [content[begin + run * pitch : begin + run * pitch + nbytes] for run in range(run_count)]
        assert target.content() == b"".join(expected)


@pytest.mark.parametrize(
    ("columns", "threads", "message"),
    [
        ([[0, 0], [0, 0], [0], [1], [0]], 1, "the columns of copy_runs differ in length"),
        ([[0], [0], [0], [1], []], 1, "the columns of copy_runs differ in length"),
        ([[0], [0], [0], [1], [0]], 0, "threads must be at least 1"),
        ([[0, 0], [0, 0], [0, -1], [1, 1], [0, 0]], 1, "series 1 has a negative size"),
        ([[0, 0], [0, 0], [0, 0], [1, -1], [0, 0]], 1, "series 1 has a negative number of runs"),
    ],
)
def test_bad_requests(native_impl, columns, threads, message) -> None:
    with pytest.raises(ValueError, match=message):
        native.copy_runs(*(column(*values) for values in columns), threads)
