# SPDX-License-Identifier: Apache-2.0
"""Several ranks: FSDP2, resharding, the division of the work, failing ranks, saves in the background."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_fast.doors.dcp.direct.division import divide
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.format.columns.items import encode_items, join_items
from ckpt_fast.format.types import Extent, ItemRecord
from tests.doors.dcp.functions import ranks as functions_ranks
from tests.doors.dcp.ranks import FSDP2_ON_CPU
from tests.helpers import run_ranks
from tests.manifests import manifest_lies

needs_fsdp2 = pytest.mark.skipif(not FSDP2_ON_CPU, reason="FSDP2 of this torch needs a GPU")


@needs_fsdp2
@pytest.mark.parametrize(("saving", "loading"), [(4, 2), pytest.param(2, 4, marks=pytest.mark.long), (2, 1)])
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


def test_a_group_of_all_ranks_that_are_in_different_numbers_of_groups(tmp_path: Path) -> None:
    saved = run_ranks(functions_ranks.save_with_uneven_groups, 2, str(tmp_path), fresh=True)
    assert saved == [[1.0, 1.0, 1.0]] * 2


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


def shard(name: str, nbytes: int, *, shape: tuple[int, ...] = (8,), offset: int = 0) -> ItemRecord:
    return ItemRecord(name, Extent("", 0, nbytes), torch.float32, (offset,), (), shape)


def divided_among(ranks: list[list[ItemRecord]]) -> list[list[int]]:
    items = join_items([encode_items(each, ()) for each in ranks])
    return [numbers.tolist() for numbers in divide(items, list(map(len, ranks)))]


def one_by_one(ranks: list[list[ItemRecord]]) -> list[list[int]]:
    """Return the same, found entry by entry."""
    holders: dict[Any, dict[int, int]] = {}
    for rank, entries in enumerate(ranks):
        for number, entry in enumerate(entries):
            holders.setdefault((entry.fqn, entry.offsets), {}).setdefault(rank, number)
    loads = [0] * len(ranks)
    chosen: list[list[int]] = [[] for _ in ranks]

    def nbytes(held: dict[int, int]) -> int:
        rank, number = next(iter(held.items()))
        entry = ranks[rank][number]
        return 1 if entry.dtype is None else entry.extent.nbytes

    for held in sorted(holders.values(), key=lambda held: (len(held) > 1, -nbytes(held))):
        rank = min(held, key=loads.__getitem__)
        loads[rank] += nbytes(held)
        chosen[rank].append(held[rank])
    return [sorted(numbers) for numbers in chosen]


@given(
    st.lists(st.lists(st.integers(0, 12), unique=True, max_size=12), min_size=1, max_size=5),
    st.lists(st.integers(0, 1000), min_size=13, max_size=13),
)
@settings(max_examples=200, deadline=None)
def test_everything_is_saved_once_and_evenly(held: list[list[int]], sizes: list[int]) -> None:
    ranks = [[shard(f"t{n}", sizes[n]) for n in numbers] for numbers in held]
    divided = divided_among(ranks)
    saved = [ranks[rank][number].fqn for rank, numbers in enumerate(divided) for number in numbers]
    assert sorted(saved) == sorted({entry.fqn for entries in ranks for entry in entries})
    loads = [sum(ranks[rank][n].extent.nbytes for n in numbers) for rank, numbers in enumerate(divided)]
    if all(sorted(numbers) == sorted(held[0]) for numbers in held):
        total, largest = sum(sizes[n] for n in held[0]), max((sizes[n] for n in held[0]), default=0)
        assert max(loads) <= total / len(ranks) + largest


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=10), min_size=1, max_size=5),
    st.lists(st.integers(0, 5), min_size=6, max_size=6),
)
@settings(max_examples=200, deadline=None)
def test_columns_divide_as_entries_would(held: list[list[tuple[int, int]]], sizes: list[int]) -> None:
    """Of shards that some ranks have, and have more than once, and of objects."""
    objects = [ItemRecord(f"o{n}", Extent("", 0, 0), None, (), (), ()) for n in range(2)]
    ranks = [
        [objects[n] if n < 2 else shard(f"t{n}", sizes[n], offset=offset) for n, offset in each]
        for each in held
    ]
    assert divided_among(ranks) == one_by_one(ranks)


@pytest.mark.parametrize(
    "other",
    [
        shard("w", 8, shape=(3,)),
        shard("w", 8)._replace(dtype=torch.float64),
        shard("w", 8)._replace(dtype=None),
    ],
)
def test_ranks_that_disagree(other: ItemRecord) -> None:
    with pytest.raises(
        CheckpointMismatchError, match=r"ranks disagree on w: a tensor of torch.float32 .*rank 1"
    ):
        divided_among([[shard("w", 8)], [shard("v", 8), other]])
