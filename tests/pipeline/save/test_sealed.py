# SPDX-License-Identifier: Apache-2.0
"""A table of contents that is used again: for the same programs, with other lengths of objects."""

from __future__ import annotations

import pickle
from array import array

import pytest
import torch

from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.format.columns.records import WorldRecord, encode_record, join_records
from ckpt_fast.format.types import BlockDigests, Extent, ItemRecord, RankRecord
from ckpt_fast.pipeline.save.sealed import SealedMetadata, contents_of


def objects(lengths: list[int], offset: int = 64, rank: int = 0) -> RankRecord:
    """Return what a rank says of objects that it has written."""
    path = f"__{rank}_0.distcp"
    items = [
        ItemRecord(f"o{rank}{n}", Extent(path, offset, 1), None, (), (), ()) for n, _ in enumerate(lengths)
    ]
    count = len(lengths)
    digests = BlockDigests(
        [path], array("I", [0] * count), array("q", [offset] * count), array("q", lengths), b""
    )
    return RankRecord(items, [], [digests], [], "program")


def joined(*records: RankRecord) -> WorldRecord:
    return join_records([encode_record(record) for record in records])


def known(record: RankRecord) -> RankRecord:
    """Return what the rank says if the coordinator knows its items."""
    return RankRecord(
        [], record.files, record.digests, [], record.program, True, list(range(len(record.items)))
    )


@pytest.mark.parametrize("offset", [0x5A000000, 0x5A000001, 7, 70_000])
def test_lengths_of_objects_take_the_place_of_others(offset: int) -> None:
    """Whatever other numbers there are: an offset may well be the length of an object."""
    first = joined(objects([5, 0x5A000000], offset), objects([7], offset, rank=1))
    assert first.items is not None
    sealed = SealedMetadata(first.items, first.programs, None)
    lengths = ([7, 70_000], [1 << 40])
    again = joined(*(known(objects(each, offset, rank)) for rank, each in enumerate(lengths)))
    assert again.items is None and sealed.fits(again.programs, None)
    contents = sealed.encode(again)
    stored = {index.fqn: info for index, info in pickle.loads(contents.pickled).storage_data.items()}
    assert {name: info.length for name, info in stored.items()} == {"o00": 7, "o01": 70_000, "o10": 1 << 40}
    assert {info.offset for info in stored.values()} == {offset}
    assert contents.digests.nbytes.tolist() == [7, 70_000, 1 << 40]
    anew = joined(*(objects(each, offset, rank) for rank, each in enumerate(lengths)))
    assert anew.items is not None
    assert SealedMetadata(anew.items, anew.programs, None).encode(anew) == contents


def test_a_rank_that_keeps_its_items_to_itself_leaves_none() -> None:
    assert joined(known(objects([5])), objects([6], rank=1)).items is None


def test_lengths_are_those_of_the_payloads() -> None:
    """The items may be those of an earlier save of the program, whose objects were shorter."""
    (info,) = pickle.loads(contents_of([objects([900])]).pickled).storage_data.values()
    assert info.length == 900


def test_what_was_allowed_to_leave_out_parts_does_not_pass_for_a_save_that_is_not() -> None:
    extent = Extent("__0_0.distcp", 0, 8)
    half = joined(RankRecord([ItemRecord("w", extent, torch.float32, (0,), (2,), (4,))], [], program="token"))
    assert half.items is not None
    sealed = SealedMetadata(half.items, half.programs, None, partial=True)
    assert sealed.fits(half.programs, None, partial=True) and not sealed.fits(half.programs, None)
    with pytest.raises(CheckpointMismatchError, match="2 of the 4 elements"):
        SealedMetadata(half.items, half.programs, None)


def test_records_of_another_version_are_refused() -> None:
    record = encode_record(objects([5]))
    with pytest.raises(ValueError, match="rank 1 of the group sent a record of version 2 instead of 1"):
        join_records([record, record[:4] + b"\2\0" + record[6:]])
