# SPDX-License-Identifier: Apache-2.0
"""The pickle in ``.metadata``: what it contains, what stock torch makes of it, what it refuses."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.format.types import Extent, ItemRecord
from ckpt_fast.pipeline.save.sealed import encode_metadata
from tests.pipeline.layouts import Region, cuts, shapes


def record(
    region: Region, shape: tuple[int, ...], fqn: str = "w", dtype: torch.dtype = torch.float32, rank: int = 0
) -> ItemRecord:
    return ItemRecord(fqn, Extent(f"__{rank}_0.distcp", 64, 500), dtype, *region, shape)


def object_record(fqn: str, rank: int = 0) -> ItemRecord:
    return ItemRecord(fqn, Extent(f"__{rank}_0.distcp", 0, 10), None, (), (), ())


def globals_of(pickled: bytes) -> set[tuple[str, str]]:
    """Return (module, name) of everything that a pickle names."""
    named = set()

    class Recorder(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            named.add((module, name))
            return super().find_class(module, name)

    Recorder(io.BytesIO(pickled)).load()
    return named


@st.composite
def partitions(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Region]]:
    shape = draw(shapes)
    return shape, draw(cuts(shape))


@given(partitions())
def test_every_partition_is_accepted_and_kept(case: tuple[tuple[int, ...], list[Region]]) -> None:
    shape, regions = case
    encoded = encode_metadata(record(region, shape, rank=n) for n, region in enumerate(regions))
    metadata = pickle.loads(encoded)
    assert type(metadata) is Metadata
    entry = metadata.state_dict_metadata["w"]
    assert isinstance(entry, TensorStorageMetadata)
    assert entry.size == torch.Size(shape) and entry.properties.dtype == torch.float32
    assert [Region(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks] == regions
    stored = {tuple(index.offset): info for index, info in metadata.storage_data.items()}
    for rank, region in enumerate(regions):
        info = stored[region.offsets]
        assert (info.relative_path, info.offset, info.length) == (f"__{rank}_0.distcp", 64, 500)


@given(partitions(), st.data())
def test_a_missing_piece_is_noticed(case: tuple[tuple[int, ...], list[Region]], data: st.DataObject) -> None:
    shape, regions = case
    missing = data.draw(st.sampled_from(regions))
    left = [region for region in regions if region is not missing]
    if not left:
        return
    with pytest.raises(CheckpointMismatchError, match=r"of the .* elements of w"):
        encode_metadata(record(region, shape) for region in left)


@pytest.mark.parametrize(
    ("shape", "regions"),
    [
        ((8,), [Region((0,), (4,)), Region((2,), (4,))]),
        ((8,), [Region((0,), (4,)), Region((5,), (4,))]),
        ((6,), [Region((-2,), (6,))]),
        ((6,), [Region((1,), (6,))]),
    ],
    ids=["overlap", "beyond the end", "before the start", "moved"],
)
def test_pieces_of_the_right_volume_at_wrong_places(shape: tuple[int, ...], regions: list[Region]) -> None:
    with pytest.raises(CheckpointMismatchError, match="do not cover w"):
        encode_metadata(record(region, shape) for region in regions)


@given(partitions(), st.data())
def test_a_moved_piece_is_noticed(case: tuple[tuple[int, ...], list[Region]], data: st.DataObject) -> None:
    shape, regions = case
    if not shape:
        return
    number = data.draw(st.integers(0, len(regions) - 1))
    dimension = data.draw(st.integers(0, len(shape) - 1))
    offsets = list(regions[number].offsets)
    offsets[dimension] += data.draw(st.integers(-3, 3).filter(bool))
    moved = [*regions[:number], Region(tuple(offsets), regions[number].sizes), *regions[number + 1 :]]
    if 0 in regions[number].sizes:
        return
    with pytest.raises(CheckpointMismatchError, match=r"do not cover w|is written by two ranks"):
        encode_metadata(record(region, shape) for region in moved)


def test_pieces_that_overlap_in_two_dimensions() -> None:
    # Four quarters of a 4x4 tensor, one of them moved onto its neighbour by a row.
    moved = [Region((0, 0), (2, 2)), Region((0, 2), (2, 2)), Region((1, 0), (2, 2)), Region((2, 2), (2, 2))]
    with pytest.raises(CheckpointMismatchError, match="do not cover w"):
        encode_metadata(record(region, (4, 4)) for region in moved)


def test_the_same_piece_twice() -> None:
    whole = Region((0, 0), (2, 2))
    with pytest.raises(CheckpointMismatchError, match=r"w at \(0, 0\) is written by two ranks, in __0_0"):
        encode_metadata([record(whole, (2, 2), rank=0), record(whole, (2, 2), rank=1)])


def test_the_same_object_twice() -> None:
    with pytest.raises(CheckpointMismatchError, match="o at no offset is written by two ranks"):
        encode_metadata([object_record("o", 0), object_record("o", 1)])


@pytest.mark.parametrize("tensor_first", [True, False])
def test_a_tensor_and_an_object_of_one_name(tensor_first: bool) -> None:
    records = [record(Region((0,), (2,)), (2,), "x"), object_record("x", 1)]
    with pytest.raises(CheckpointMismatchError, match="x is a tensor on one rank and an object on another"):
        encode_metadata(records if tensor_first else records[::-1])


@pytest.mark.parametrize(
    ("shape", "dtype"), [((8,), torch.float32), ((4, 1), torch.float32), ((4,), torch.bfloat16)], ids=str
)
def test_ranks_that_disagree(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    first = record(Region((0,), (2,)), (4,))
    second = record(Region((2,) + (0,) * (len(shape) - 1), (2,) * len(shape)), shape, dtype=dtype, rank=1)
    with pytest.raises(CheckpointMismatchError, match=r"ranks disagree on w: .*__1_0.distcp"):
        encode_metadata([first, second])


@pytest.mark.parametrize("empty_first", [True, False])
def test_ranks_whose_piece_is_empty(empty_first: bool) -> None:
    """More ranks than rows: the surplus ranks' pieces have no rows and may share an offset."""
    records = [
        record(Region((0, 0), (2, 3)), (3, 3), rank=0),
        record(Region((2, 0), (1, 3)), (3, 3), rank=1),
        record(Region((2, 0), (0, 3)), (3, 3), rank=2),
        record(Region((3, 0), (0, 3)), (3, 3), rank=3),
        record(Region((3, 0), (0, 3)), (3, 3), rank=4),
    ]
    metadata = pickle.loads(encode_metadata(records[::-1] if empty_first else records))
    assert len(metadata.state_dict_metadata["w"].chunks) == 2
    paths = {tuple(index.offset): info.relative_path for index, info in metadata.storage_data.items()}
    assert paths == {(0, 0): "__0_0.distcp", (2, 0): "__1_0.distcp"}


def test_a_tensor_without_elements_keeps_one_piece() -> None:
    empty = Region((0, 0), (0, 3))
    metadata = pickle.loads(encode_metadata([record(empty, (0, 3), rank=0), record(empty, (0, 3), rank=1)]))
    assert len(metadata.state_dict_metadata["w"].chunks) == len(metadata.storage_data) == 1


def test_objects() -> None:
    metadata = pickle.loads(encode_metadata([object_record("o")]))
    assert isinstance(metadata.state_dict_metadata["o"], BytesStorageMetadata)
    ((index, info),) = metadata.storage_data.items()
    assert (index.fqn, index.offset, info.length) == ("o", None, 10)


def test_planner_data() -> None:
    assert pickle.loads(encode_metadata([])).planner_data is None
    mapping = {"model.w": ("model", "w")}
    assert pickle.loads(encode_metadata([], mapping)).planner_data == mapping


def test_names_data_classes_of_torch_only() -> None:
    records = [record(Region((0,), (4,)), (4,)), object_record("o")]
    named = globals_of(encode_metadata(records, {"w": ("w",)}))
    assert ("torch.distributed.checkpoint.metadata", "Metadata") in named
    modules = {module for module, _ in named}
    assert modules <= {
        "torch",
        "torch.serialization",
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.filesystem",
    }


def properties_state(encoded: bytes) -> Any:
    """Return what ``TensorProperties.__setstate__`` gets when the pickle is loaded."""
    seen = []

    class Recorder(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if name == "TensorProperties":
                return type("TensorProperties", (), {"__setstate__": lambda _, state: seen.append(state)})
            return super().find_class(module, name)

    Recorder(io.BytesIO(encoded)).load()
    (state,) = seen
    return state


def test_tensor_properties_are_five_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    five = properties_state(encode_metadata([record(Region((0,), (4,)), (4,))]))
    assert len(five) == 5 and five[0] == torch.float32

    # torch 2.15 appends the strides, which older versions cannot read.
    original = TensorProperties.__getstate__
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*original(self)[:5], (1,)))
    assert properties_state(encode_metadata([record(Region((0,), (4,)), (4,))])) == five


def test_equal_records_make_equal_bytes() -> None:
    records = [record(Region((n,), (1,)), (3,), rank=n) for n in range(3)]
    assert encode_metadata(records) == encode_metadata(records)
