# SPDX-License-Identifier: Apache-2.0
"""Several ranks: FSDP2, resharding, the division of the work, failing ranks, saves in the background."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_fast.doors.dcp.direct.division import Entry, divide
from ckpt_fast.errors import CheckpointMismatchError
from tests.doors.dcp.functions import ranks as functions_ranks
from tests.doors.dcp.ranks import FSDP2_ON_CPU
from tests.helpers import run_ranks
from tests.manifests import manifest_lies

needs_fsdp2 = pytest.mark.skipif(not FSDP2_ON_CPU, reason="FSDP2 of this torch needs a GPU")


@needs_fsdp2
@pytest.mark.parametrize(("saving", "loading"), [(4, 2), (2, 4), (2, 1)])
def test_fsdp2_on_other_ranks(saving: int, loading: int, tmp_path: Path) -> None:
    run_ranks(functions_ranks.save_with_all, saving, str(tmp_path))
    pairs = [(writer, reader) for writer in functions_ranks.WRITERS for reader in functions_ranks.READERS]
    assert (
        run_ranks(functions_ranks.load_all, loading, str(tmp_path))
        == [{pair: [] for pair in pairs}] * loading
    )
    for name in ("ours", "again", "background"):
        assert manifest_lies(tmp_path / name) == []


@pytest.mark.parametrize(("saving", "loading"), [(4, 4), (4, 1), (1, 2)])
def test_dtensors_on_other_ranks(saving: int, loading: int, tmp_path: Path) -> None:
    run_ranks(functions_ranks.save_matrices, saving, str(tmp_path / "m"))
    assert run_ranks(functions_ranks.load_matrices, loading, str(tmp_path / "m")) == [[[], []]] * loading


def test_sharded_tensors(tmp_path: Path) -> None:
    assert run_ranks(functions_ranks.sharded_tensors, 2, str(tmp_path)) == [[], []]


def test_replicated_tensors_are_divided_by_bytes(tmp_path: Path) -> None:
    results = run_ranks(functions_ranks.replicated, 4, str(tmp_path))
    sizes = results[0][1]
    for number in range(2):
        written = [nbytes[number] for nbytes, _ in results]
        assert written == [nbytes[0] for nbytes, _ in results]
        assert max(written) < max(4 * max(sizes), 4 * sum(sizes) / 4) + 10_000
        assert min(written) > 4 * min(3000, max(sizes))


def test_owners_change(tmp_path: Path) -> None:
    assert run_ranks(functions_ranks.owners_change, 2, str(tmp_path)) == [[], []]


def test_a_rank_that_cannot_save_fails_all(tmp_path: Path) -> None:
    for texts in run_ranks(functions_ranks.failing_saves, 2, str(tmp_path)):
        *failures, before, after = texts
        for collect, pickling, disagreeing, writing in (failures[:4], failures[4:]):
            assert "rank 1: RuntimeError: no state dict on this rank" in collect
            assert "rank 1: r.pickle.1 (a tests." in pickling and "cannot be saved" in pickling
            assert "ranks disagree on m.plain" in disagreeing and "rank 1" in disagreeing
            assert "rank 1: " in writing and f"{tmp_path}/file1/below" in writing
        assert (before, after) == ("[]", "[]")


def test_a_rank_that_cannot_load_fails_all(tmp_path: Path) -> None:
    first, second = run_ranks(functions_ranks.failing_loads, 2, str(tmp_path))
    assert first == second
    expected = ["has no x", "v is a tensor of shape (6,)", "step is a tensor", "__1_0.distcp"]
    for text, part in zip(first, expected, strict=True):
        assert "rank 1: " in text and part in text


@pytest.mark.parametrize("world_size", [1, 2])
def test_background_saves_overlap(world_size: int, tmp_path: Path) -> None:
    assert run_ranks(functions_ranks.background_saves, world_size, str(tmp_path)) == [[]] * world_size


def test_process_groups(tmp_path: Path) -> None:
    assert run_ranks(functions_ranks.subgroups, 4, str(tmp_path)) == [[]] * 4


def test_ranks_alone(tmp_path: Path) -> None:
    for (text,) in run_ranks(functions_ranks.alone, 2, str(tmp_path)):
        assert "wrote 5 of the 10 elements of w" in text


def test_space_is_asked_for_once(tmp_path: Path) -> None:
    for (text,) in run_ranks(functions_ranks.without_room, 2, str(tmp_path)):
        assert "CheckpointWriteError" in text and "free" in text
    assert not (tmp_path / "large" / ".metadata").exists()


def test_ranks_that_see_another_save_are_named(tmp_path: Path) -> None:
    for (text,) in run_ranks(functions_ranks.other_saves_seen, 2, str(tmp_path)):
        assert "rank 1 sees another .metadata" in text


@given(
    st.lists(st.lists(st.integers(0, 12), unique=True, max_size=12), min_size=1, max_size=5),
    st.lists(st.integers(0, 1000), min_size=13, max_size=13),
)
@settings(max_examples=200, deadline=None)
def test_everything_is_saved_once_and_evenly(held: list[list[int]], sizes: list[int]) -> None:
    ranks = [[Entry(f"t{n}", ((sizes[n],), "x"), (0,), sizes[n]) for n in numbers] for numbers in held]
    divided = divide(ranks)
    assert divide(ranks) == divided
    saved = [ranks[rank][number].name for rank, numbers in enumerate(divided) for number in numbers]
    assert sorted(saved) == sorted({entry.name for entries in ranks for entry in entries})
    loads = [sum(ranks[rank][number].nbytes for number in numbers) for rank, numbers in enumerate(divided)]
    if all(sorted(numbers) == sorted(held[0]) for numbers in held):
        total, largest = sum(sizes[n] for n in held[0]), max((sizes[n] for n in held[0]), default=0)
        assert max(loads) <= total / len(ranks) + largest


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Entry("w", ((2,), "a"), (0,), 8), Entry("w", ((3,), "a"), (0,), 8)),
        (Entry("w", ((2,), "a"), (0,), 8), Entry("w", ((2,), "b"), (0,), 8)),
        (Entry("w", ((2,), "a"), (0,), 8), Entry("w", None, None, 1)),
    ],
)
def test_ranks_that_disagree(one: Entry, other: Entry) -> None:
    with pytest.raises(CheckpointMismatchError, match="ranks disagree on w"):
        divide([[one], [other]])
