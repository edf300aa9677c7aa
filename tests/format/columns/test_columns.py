# SPDX-License-Identifier: Apache-2.0
"""Columns say what torch DCP's objects say: the same metadata, and the same refusals."""

from __future__ import annotations

import pickle
from array import array
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.format.columns.complete import require_complete
from ckpt_fast.format.columns.lists import Lists
from ckpt_fast.format.columns.records import encode_record, join_records
from ckpt_fast.format.metadata_pickle import unpickle_metadata
from ckpt_fast.format.table import NOTHING, decode_table, encode_table
from ckpt_fast.format.types import BlockDigests, Extent, FileRecord, ItemRecord, RankRecord
from ckpt_fast.pipeline.save.sealed import SealedMetadata, encode_metadata
from tests.format.columns.reference import metadata_of
from tests.pipeline.layouts import Region, cuts, shapes

DTYPES = [torch.float32, torch.bfloat16, torch.int64]
names = st.text(st.characters(codec=None, exclude_characters="\0"), max_size=5) | st.sampled_from(
    ["layer." * 60, "\ud800", "\0"]
)
numbers = st.integers(0, 300) | st.integers(0, 1 << 40)


def item(fqn: str, rank: int, dtype: Any, region: Region, shape: tuple[int, ...], at: Any) -> ItemRecord:
    return ItemRecord(fqn, Extent(f"__{rank}_0.distcp", *at), dtype, *region, shape)


@st.composite
def worlds(draw: st.DrawFn) -> list[list[ItemRecord]]:
    """Return the items of a few ranks, in order: tensors in all kinds of pieces, and objects."""
    count = draw(st.integers(1, 4))
    ranks: list[list[ItemRecord]] = [[] for _ in range(count)]
    for name in draw(st.lists(names, unique=True, max_size=5)):
        if draw(st.integers(0, 3)) == 0:
            rank = draw(st.integers(0, count - 1))
            at = (draw(numbers), draw(numbers))
            ranks[rank].append(item(name, rank, None, Region((), ()), (), at))
            continue
        shape, dtype = draw(shapes), draw(st.sampled_from(DTYPES))
        for region in draw(cuts(shape)):
            rank = draw(st.integers(0, count - 1))
            at = (draw(numbers), draw(numbers))
            ranks[rank].append(item(name, rank, dtype, region, shape, at))
    return [list(draw(st.permutations(rank))) for rank in ranks]


@st.composite
def changed_worlds(draw: st.DrawFn) -> list[list[ItemRecord]]:
    """Return items of which some have been lost, repeated, moved or given another form."""
    ranks = draw(worlds())
    for _ in range(draw(st.integers(1, 2))):
        rank = draw(st.sampled_from(ranks))
        if not rank:
            continue
        at = draw(st.integers(0, len(rank) - 1))
        one = rank[at]
        kind = draw(st.integers(0, 4))
        if kind == 0:
            del rank[at]
        elif kind == 1:
            draw(st.sampled_from(ranks)).append(one)
        elif kind == 2:
            rank[at] = one._replace(dtype=draw(st.sampled_from([None, *DTYPES])))
        elif kind == 3 and one.offsets:
            dimension = draw(st.integers(0, len(one.offsets) - 1))
            moved = list(one.offsets)
            moved[dimension] += draw(st.integers(-2, 2))
            rank[at] = one._replace(offsets=tuple(moved))
        elif kind == 4 and one.sizes:
            rank[at] = one._replace(global_shape=(*one.global_shape[:-1], one.global_shape[-1] + 1))
    return ranks


def records_of(ranks: list[list[ItemRecord]]) -> list[bytes]:
    """Return what each rank sends: with checksums that begin inside the items, but for objects."""
    records = []
    for number, items in enumerate(ranks):
        path = f"__{number}_0.distcp"
        offset = array("q", [each.extent.offset + (each.dtype is not None) for each in items])
        nbytes = array("q", [each.extent.nbytes for each in items])
        digests = BlockDigests([path], array("I", [0] * len(items)), offset, nbytes, bytes([number] * 4))
        files = [FileRecord(path, 1 << 41, number)]
        records.append(encode_record(RankRecord(items, files, [digests])))
    return records


def require_same(found: Any, expected: Any) -> None:
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert list(found.state_dict_metadata) == list(expected.state_dict_metadata)
    assert found.storage_data == expected.storage_data
    # The number of a piece is not compared with an index.
    assert {(key, key.index) for key in found.storage_data} == {
        (key, key.index) for key in expected.storage_data
    }
    assert found.planner_data == expected.planner_data
    for entry in found.state_dict_metadata.values():
        for chunk in getattr(entry, "chunks", ()):
            assert type(chunk.offsets) is type(chunk.sizes) is torch.Size


@settings(deadline=None, max_examples=150)
@given(worlds(), st.none() | st.dictionaries(names, st.lists(names | st.integers(), max_size=3).map(tuple)))
def test_metadata_equals_that_of_objects(ranks: list[list[ItemRecord]], planner_data: Any) -> None:
    items = [each for rank in ranks for each in rank]
    expected, left_out = metadata_of(items, planner_data)
    world = join_records(records_of(ranks))
    assert world.items is not None
    contents = SealedMetadata(world.items, [], planner_data).encode(world)
    require_same(pickle.loads(contents.pickled), expected)
    # Our own reader follows the opcodes first, and its twin in Python as well.
    restricted, end = unpickle_metadata(contents.pickled)
    require_same(restricted, expected)
    assert end == len(contents.pickled)
    encoded = encode_table(world.items, np.array(left_out, bool))
    if any("\0" in each.fqn for each in items):
        assert not encoded
        return
    table = decode_table(encoded)
    assert table is not None
    for row, each in enumerate(items):
        assert table.names[table.name[row]] == each.fqn
        assert table.dtypes[table.name[row]] == each.dtype
        assert table.lists[table.shapes[table.name[row]]] == each.global_shape
        assert table.lists[table.offsets[row]] == each.offsets
        assert table.lists[table.sizes[row]] == each.sizes
        assert (table.kinds[row] == NOTHING) == left_out[row]
    digests = contents.digests
    assert [
        (digests.paths[file], offset, nbytes)
        for file, offset, nbytes in zip(digests.file, digests.offset, digests.nbytes, strict=True)
    ] == [
        (each.extent.path, each.extent.offset + (each.dtype is not None), each.extent.nbytes)
        for each in items
    ]
    assert digests.crcs == b"".join(bytes([number] * 4) for number in range(len(ranks)))


def test_a_piece_before_the_beginning_is_refused() -> None:
    before = ItemRecord("w", Extent("__0_0.distcp", 0, 4), torch.float32, (-1,), (1,), (2,))
    world = join_records(records_of([[before]]))
    assert world.items is not None
    for partial in (False, True):
        with pytest.raises(CheckpointMismatchError, match="w"):
            require_complete(world.items, partial=partial)


@settings(deadline=None, max_examples=300)
@given(changed_worlds(), st.booleans())
def test_refusals_equal_those_of_objects(ranks: list[list[ItemRecord]], partial: bool) -> None:
    items = [each for rank in ranks for each in rank]
    world = join_records(records_of(ranks))
    assert world.items is not None
    try:
        expected, left_out = metadata_of(items, partial=partial)
    except CheckpointMismatchError as error:
        with pytest.raises(CheckpointMismatchError) as refused:
            require_complete(world.items, partial=partial)
        assert str(refused.value) == str(error)
    except (IndexError, ValueError):  # of objects whose dimensions differ in number
        with pytest.raises(CheckpointMismatchError):
            require_complete(world.items, partial=partial)
    else:
        assert require_complete(world.items, partial=partial).is_left_out.tolist() == left_out
        require_same(pickle.loads(encode_metadata(items, partial=partial)), expected)


@given(st.lists(st.lists(st.integers(0, 3) | st.integers(0, 1 << 62), max_size=4), max_size=12))
def test_lists(given: list[list[int]]) -> None:
    lists = Lists.of(given)
    unique, same = lists.unique()
    assert [unique[number] for number in same] == [tuple(each) for each in given]
    assert len(unique) == len({tuple(each) for each in given})
    for number, each in enumerate(given):
        product = 1
        for factor in each:
            product *= factor
        assert lists.products[number] == min(product, 1 << 62)
        assert unique.find(each) in (same[number], None)
    small = Lists.of([each for each in given if max(each, default=0) < 4])
    kept, _ = small.unique()
    assert [kept.find(kept[number]) for number in range(len(kept))] == list(range(len(kept)))
    assert kept.find([9]) is None and kept.find([-1, 0]) is None


def test_a_record_is_no_longer_than_its_columns() -> None:
    """A rank of a large job sends a few dozen bytes for a shard, and its names compressed."""
    region, shape = Region((56, 0), (8, 16)), (4096, 16)
    items = [
        item(f"decoder.layers.{n}.mlp.linear_fc1.weight", 7, torch.float32, region, shape, (n, 9))
        for n in range(100)
    ]
    (record,) = records_of([items])
    assert len(record) < 80 * len(items)
    known = encode_record(
        RankRecord([], [FileRecord("__7_0.distcp", 1 << 40, 2)], program="a", is_known=True)
    )
    assert len(known) < 120
