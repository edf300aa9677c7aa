# SPDX-License-Identifier: Apache-2.0
"""The table says what the pickle says, and contradictions in it are damage."""

from __future__ import annotations

import io
import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_fast import verify
from ckpt_fast.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError
from ckpt_fast.format import table as table_module
from ckpt_fast.format.columns.items import Items, items_of
from ckpt_fast.format.columns.lists import Lists
from ckpt_fast.format.manifest import Manifest, append_manifest, split_manifest
from ckpt_fast.format.table import bound_to, decode_table, encode_table
from ckpt_fast.format.types import Extent, ItemRecord, ObjectShard, TensorRequest, TensorShard
from ckpt_fast.pipeline.load.decode import Contents
from ckpt_fast.pipeline.load.entries.kinds import ByPlace
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_objects, load_tensors
from tests.manifests import manifest_of
from tests.pipeline.layouts import random_tensor, same
from tests.saves import save

pytestmark = pytest.mark.usefixtures("native_impl", "no_fsync")

names = st.text(min_size=1, max_size=12).filter(lambda name: "\0" not in name)
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
if hasattr(torch, "complex32"):
    DTYPES.append(torch.complex32)  # stored by torch itself


@st.composite
def states(draw: st.DrawFn) -> list[Any]:
    """Return shards of tensors that are divided along one dimension, if at all, and objects."""
    shards: list[Any] = []
    for number, name in enumerate(draw(st.lists(names, unique=True, min_size=1, max_size=6))):
        if draw(st.integers(0, 3)) == 0:
            shards.append(ObjectShard(name, object_payload(number)))
            continue
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        tensor = torch.arange(torch.Size(shape).numel()).view(shape).to(draw(st.sampled_from(DTYPES)))
        count = draw(st.integers(1, 3)) if shape and shape[0] else 1
        rows = 0
        for piece in tensor.chunk(count) if count > 1 else [tensor]:
            offsets = (rows, *[0] * (len(shape) - 1)) if shape else ()
            shards.append(TensorShard(name, piece, offsets, shape))
            rows += piece.shape[0] if shape else 0
    return draw(st.permutations(shards))


def object_payload(number: int) -> bytes:
    """Return what ``torch.save`` makes of a list with a number."""

    buffer = io.BytesIO()
    torch.save([number], buffer)
    return buffer.getvalue()


def both(directory: Path) -> tuple[CheckpointIndex, CheckpointIndex]:
    """Return the index from the table, and from the pickle alone."""
    table = CheckpointIndex(str(directory))
    assert table.table is not None
    return table, CheckpointIndex(str(directory), Contents.of(table.metadata))


@settings(deadline=None, max_examples=60)
@given(states())
def test_the_table_says_what_the_pickle_says(tmp_path_factory: pytest.TempPathFactory, shards: Any) -> None:
    directory = tmp_path_factory.mktemp("saved")
    save(shards, str(directory))
    table, pickle = both(directory)
    assert list(table.names) == list(pickle.names)
    for name in pickle.names:
        assert table.shape(name) == pickle.shape(name)
        if pickle.shape(name) is None:
            assert table.object_extent(name) == pickle.object_extent(name)
            assert load_objects(table, [name]) == load_objects(pickle, [name])
            continue
        mine, other = table.tensor(name), pickle.tensor(name)
        assert mine._replace(pieces=[]) == other._replace(pieces=[])
        assert sorted(mine.pieces) == sorted(other.pieces)
        whole = [torch.zeros(mine.shape, dtype=mine.dtype) for _ in range(2)]
        for index, tensor in zip((table, pickle), whole, strict=True):
            report = load_tensors(index, [TensorRequest(name, tensor, (0,) * tensor.dim())])
            assert report.verified >= bool(tensor.numel())
        assert same(*whole)
        for shard in (each for each in shards if each.fqn == name):
            piece = torch.zeros(shard.shape, dtype=mine.dtype)
            load_tensors(table, [TensorRequest(name, piece, shard.offsets)])
            assert same(piece, shard.tensor)


def saved_pieces(directory: Path) -> dict[str, torch.Tensor]:
    """Save two tensors, one of them in two pieces, and an object; return the tensors."""
    a, b = random_tensor((6, 3), torch.float32, 1), random_tensor((200_000,), torch.float32, 2)
    shards = [
        TensorShard("a", a[:4], (0, 0), (6, 3)),
        TensorShard("a", a[4:], (4, 0), (6, 3)),
        TensorShard("b", b, (0,), (200_000,)),
        ObjectShard("o", object_payload(7)),
    ]
    save(shards, str(directory))
    return {"a": a, "b": b}


def test_a_piece_wanted_twice_and_in_part(tmp_path: Path) -> None:
    """The same payload is read by its row, and once more by its parts."""
    b = saved_pieces(tmp_path)["b"]
    wanted = [torch.zeros_like(b), torch.zeros_like(b), torch.zeros(1000), torch.zeros_like(b).double()]
    offsets = [(0,), (0,), (70_000,), (0,)]
    report = load_tensors(
        CheckpointIndex(str(tmp_path)),
        [TensorRequest("b", tensor, at) for tensor, at in zip(wanted, offsets, strict=True)],
    )
    assert report.verified == 4
    assert same(wanted[0], b)
    assert same(wanted[1], b)
    assert same(wanted[2], b[70_000:71_000])
    assert same(wanted[3], b.double())


@pytest.mark.parametrize("block", [0, 1, 3])
def test_a_flipped_byte_is_named(tmp_path: Path, block: int) -> None:
    saved_pieces(tmp_path)
    index = CheckpointIndex(str(tmp_path))
    (piece,) = index.tensor("b").pieces
    raw = next(iter(index.locate([(torch.float32, piece)]).values()))
    assert raw is not None
    path = tmp_path / raw.extent.path
    content = bytearray(path.read_bytes())
    content[raw.extent.offset + block * (256 << 10) + 5] ^= 1
    path.write_bytes(content)
    begin = raw.extent.offset + block * (256 << 10)
    with pytest.raises(CheckpointCorruptError, match=rf"b in .*\(bytes {begin} to .* instead of"):
        load_tensors(index, [TensorRequest("b", torch.zeros(200_000), (0,))])


def test_the_pickle_is_not_read_where_there_is_a_table(tmp_path: Path, monkeypatch: Any) -> None:
    from ckpt_fast.pipeline.load import decode

    tensors = saved_pieces(tmp_path)
    monkeypatch.setattr(decode, "unpickle_metadata", lambda content: pytest.fail("unpickled"))
    index = CheckpointIndex(str(tmp_path))
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load_tensors(index, [TensorRequest(name, each, (0,) * each.dim()) for name, each in loaded.items()])
    assert all(same(loaded[name], tensors[name]) for name in tensors)
    assert load_objects(index, ["o"]) == {"o": [7]}


def test_a_table_of_another_pickle_is_left_out(tmp_path: Path) -> None:
    """A tool that replaces the pickle must not leave the old table behind."""
    saved_pieces(tmp_path)
    path = tmp_path / ".metadata"
    pickled, manifest = split_manifest(path.read_bytes())
    assert manifest is not None
    assert manifest.table is not None
    path.write_bytes(append_manifest(pickled + b" ", manifest))
    assert manifest_of(tmp_path).table is None


def rewritten(directory: Path, change: Any) -> None:
    """Let ``.metadata`` have another table, as somebody could write it who knows how."""
    path = directory / ".metadata"
    pickled, manifest = split_manifest(path.read_bytes())
    assert manifest is not None
    manifest.encoded_table = bound_to(change(manifest.encoded_table), pickled)
    path.write_bytes(append_manifest(pickled, manifest))


def record(fqn: str, sizes: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]) -> ItemRecord:
    return ItemRecord(fqn, Extent("", 0, 0), torch.float32, offsets, sizes, shape)


def raw_items(*records: ItemRecord) -> Items:
    """Return items whose payloads are inside them."""
    items = items_of(records)
    items.rows["payload"] = 1
    return items


def table_of(*records: ItemRecord, left_out: int = -1) -> bytes:
    return encode_table(raw_items(*records), np.arange(len(records)) == left_out)


A1, A2 = record("a", (4, 3), (0, 0), (6, 3)), record("a", (2, 3), (4, 0), (6, 3))
B = record("b", (200_000,), (0,), (200_000,))
OBJECT = ItemRecord("o", Extent("", 0, 0), None, (), (), ())


def test_the_table_that_the_cases_change(tmp_path: Path) -> None:
    saved_pieces(tmp_path)
    rewritten(tmp_path, lambda _: table_of(OBJECT, A1, A2, B))
    load_tensors(CheckpointIndex(str(tmp_path)), [TensorRequest("a", torch.zeros(6, 3), (0, 0))])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (table_of(OBJECT, A1, A2), "3 rows for 4 payloads"),
        (table_of(OBJECT, A1._replace(sizes=(5, 3)), A2, B), "a cannot have 48 bytes"),
        (table_of(OBJECT, A1, A2, B._replace(dtype=torch.float64)), "b cannot have 800000 bytes"),
        (table_of(OBJECT, A1, A2, B, left_out=3), "b has no item"),
        (table_of(OBJECT, A1, A2._replace(offsets=(2, 0)), B), "a: the pieces .* overlap"),
        (table_of(OBJECT, A1, A2._replace(offsets=(5, 0)), B), "a: a piece .* is not inside"),
        (table_of(OBJECT, A1, A2._replace(offsets=(4,)), B), "a piece of a has another number of dimensions"),
        (table_of(OBJECT, A1._replace(sizes=(1 << 30, 1 << 30)), A2, B), "no memory holds"),
        (table_of(OBJECT, A1, A2, B)[:-1], "cut short"),
        (table_of(OBJECT, A1, A2, B)[:40], ""),
        (table_of(OBJECT, A1, A2, B).replace(b"float32", b"cfloat4"), "the dtype cfloat4"),
        (table_of(OBJECT, A1, A2, B).replace(b"float32", b"storage"), "the dtype storage"),
        (table_of(OBJECT, A1, A2, B).replace(b"o\0a\0b", b"o\0a\0a"), "2 names instead of 3"),
        (table_of(OBJECT, A1, A2, B).replace(b"o\0a\0b", b"o\0a\0\xff"), "utf-8"),
    ],
)
def test_a_contradictory_table_is_damage(tmp_path: Path, table: bytes, message: str) -> None:
    saved_pieces(tmp_path)
    rewritten(tmp_path, lambda _: table)
    with pytest.raises(CheckpointCorruptError, match=message):
        load_tensors(CheckpointIndex(str(tmp_path)), [TensorRequest("a", torch.zeros(6, 3), (0, 0))])


def test_payloads_that_share_bytes_are_damage(tmp_path: Path) -> None:
    saved_pieces(tmp_path)
    path = tmp_path / ".metadata"
    pickled, manifest = split_manifest(path.read_bytes())
    assert manifest is not None
    offset = manifest.payloads.offset
    offset[1] = offset[2] - 1
    path.write_bytes(append_manifest(pickled, manifest))
    with pytest.raises(CheckpointCorruptError, match="a and a share bytes of __0_0"):
        CheckpointIndex(str(tmp_path))


def test_a_table_of_a_later_version_is_as_good_as_none(tmp_path: Path) -> None:
    a = saved_pieces(tmp_path)["a"]
    rewritten(tmp_path, lambda table: struct.pack("<I", 2) + table[4:])
    index = CheckpointIndex(str(tmp_path))
    assert index.table is None
    loaded = torch.zeros(6, 3)
    load_tensors(index, [TensorRequest("a", loaded, (0, 0))])
    assert same(loaded, a)


def test_any_table_is_right_or_damage(tmp_path: Path) -> None:
    """Whatever bytes a table has: right values, or an error that says so; never another kind of error."""
    tensors = saved_pieces(tmp_path)
    original = (tmp_path / ".metadata").read_bytes()
    manifest = manifest_of(tmp_path)
    table, chance, refused = manifest.encoded_table, random.Random(0), 0
    for _ in range(400):
        changed = bytearray(table)
        for _ in range(chance.randint(1, 3)):
            changed[chance.randrange(8, len(table))] = chance.choice((0, 1, 2, 3, 127, 128, 255))
        (tmp_path / ".metadata").write_bytes(original)
        rewritten(tmp_path, lambda _, changed=changed: bytes(changed))
        loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        try:
            load_tensors(
                CheckpointIndex(str(tmp_path)),
                [TensorRequest(name, each, (0,) * each.dim()) for name, each in loaded.items()],
            )
        except CheckpointError:
            refused += 1
    assert refused > 100


@given(st.lists(names, unique=True, max_size=5))
def test_names_come_back(chosen: list[str]) -> None:
    table = decode_table(table_of(*(record(name, (2,), (0,), (2,)) for name in chosen)))
    assert table is not None
    assert table.names == chosen


def test_a_name_that_cannot_be_stored(tmp_path: Path) -> None:
    save([TensorShard("a\0b", torch.ones(2), (0,), (2,))], str(tmp_path))
    manifest: Manifest = manifest_of(tmp_path)
    assert manifest.table is None
    loaded = torch.zeros(2)
    load_tensors(CheckpointIndex(str(tmp_path)), [TensorRequest("a\0b", loaded, (0,))])
    assert same(loaded, torch.ones(2))


def test_verify_compares_table_and_pickle(tmp_path: Path) -> None:
    saved_pieces(tmp_path)
    assert verify(tmp_path, deep=True).is_sound
    rewritten(
        tmp_path, lambda _: table_of(OBJECT, A1._replace(offsets=(2, 0)), A2._replace(offsets=(0, 0)), B)
    )
    report = verify(tmp_path, deep=True)
    assert report.damages == (f"{tmp_path}/.metadata contradicts itself: table and pickle disagree on a",)
    assert verify(tmp_path).is_sound


def test_a_damaged_table_is_a_line_of_the_report(tmp_path: Path) -> None:
    saved_pieces(tmp_path)
    rewritten(tmp_path, lambda _: table_of(OBJECT, A1, A2._replace(offsets=(5, 0)), B))
    assert "not inside" in verify(tmp_path, deep=True).damages[0]
    rewritten(tmp_path, lambda _: table_of(OBJECT, A1, A2))
    assert "3 rows for 4 payloads" in verify(tmp_path).damages[0]


def test_checksums_of_too_many_blocks_are_damage(tmp_path: Path) -> None:
    saved_pieces(tmp_path)
    pickled, manifest = split_manifest((tmp_path / ".metadata").read_bytes())
    assert manifest is not None
    payloads = manifest.payloads
    longer = Manifest(
        manifest.save_id,
        manifest.files.values(),
        [payloads._replace(crcs=payloads.crcs + bytes(4))],
        encoded_table=manifest.encoded_table,
    )
    (tmp_path / ".metadata").write_bytes(append_manifest(pickled, longer))
    with pytest.raises(CheckpointCorruptError, match="8 blocks have checksums, but there are 7"):
        CheckpointIndex(str(tmp_path))
    assert "8 blocks have checksums" in verify(tmp_path, deep=True).damages[0]


def encoded_with_lists(*lists: tuple[int, ...]) -> bytes:
    """Return the table of the cases with more lists, which no tensor uses."""
    items = raw_items(OBJECT, A1, A2, B)
    known = [items.lists[number] for number in range(len(items.lists))]
    return encode_table(items._replace(lists=Lists.of([*known, *lists])), np.zeros(4, bool))


def test_endless_shapes_take_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their product would have millions of digits."""
    saved_pieces(tmp_path)
    monkeypatch.setattr(table_module, "_MOST_DIMENSIONS", 1 << 20)
    encoded = encoded_with_lists(((1 << 62) + 3,) * 80_000)
    monkeypatch.undo()
    rewritten(tmp_path, lambda _: encoded)
    monkeypatch.setattr(math, "prod", bounded_product)
    with pytest.raises(CheckpointCorruptError, match="80000 dimensions"):
        CheckpointIndex(str(tmp_path))


def bounded_product(values: Any) -> int:
    result = 1
    for value in values:
        result *= value
        assert result.bit_length() < 10_000
    return result


def test_places_of_one_hash_take_no_time(tmp_path: Path) -> None:
    """Not compared with each other: n log n, where a dict would take n squared."""

    class Place(tuple):
        compared = 0

        def __hash__(self) -> int:
            return 0

        def __eq__(self, other: object) -> bool:
            Place.compared += 1
            return tuple.__eq__(self, other)

    count = 2000
    found = ByPlace((Place((number, 0)), 1, number) for number in range(count))
    assert [found.get(Place((number, 0))) for number in range(count)] == list(range(count))
    assert found.get(Place((count, 0))) is None
    assert Place.compared <= 40 * count


@pytest.mark.parametrize("nbytes", [0, 40])
def test_memory_that_is_not_there_is_refused(tmp_path: Path, nbytes: int) -> None:
    save([TensorShard("a", torch.ones(100), (0,), (100,))], str(tmp_path))
    for wanted in (torch.zeros(100), torch.nn.Parameter(torch.zeros(100)), torch.zeros(100).double()):
        wanted.untyped_storage().resize_(nbytes)
        with pytest.raises(CheckpointMismatchError, match=f"100 elements whose storage has {nbytes} bytes"):
            load_tensors(CheckpointIndex(str(tmp_path)), [TensorRequest("a", wanted, (0,))])
