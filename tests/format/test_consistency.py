# SPDX-License-Identifier: Apache-2.0
"""What metadata must not say, counted element by element; and that the index refuses it."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from ckpt_fast.errors import CheckpointCorruptError
from ckpt_fast.format.consistency import Region, UsedBytes, missing_region, require_apart
from ckpt_fast.format.types import TensorRequest
from ckpt_fast.pipeline.load.decode import Contents
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors
from tests.pipeline import layouts
from tests.pipeline.layouts import cuts, shapes


def counts(shape: tuple[int, ...], regions: list[Region]) -> torch.Tensor:
    """Return how many regions contain each element."""
    count = torch.zeros(shape, dtype=torch.int64)
    for region in regions:
        layouts.Region(*region).of(count).add_(1)
    return count


@st.composite
def regions_of(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Region]]:
    """Return a partition of a tensor with some regions lost, resized or added, all inside it."""
    shape = draw(shapes)
    regions = [Region(*region) for region in draw(cuts(shape))]
    for _ in range(draw(st.integers(0, 2))):
        number = draw(st.integers(0, len(regions) - 1)) if regions else 0
        change = draw(st.sampled_from(["lose", "add", "move"]))
        offsets = tuple(draw(st.integers(0, size)) for size in shape)
        sizes = tuple(draw(st.integers(0, n - a)) for a, n in zip(offsets, shape, strict=True))
        if change != "add" and regions:
            regions.pop(number)
        if change != "lose":
            regions.append(Region(offsets, sizes))
    return shape, list(dict.fromkeys(regions))


@given(regions_of())
def test_as_counted(case: tuple[tuple[int, ...], list[Region]]) -> None:
    shape, regions = case
    count = counts(shape, regions)
    if (count > 1).any():
        with pytest.raises(ValueError, match="overlap"):
            require_apart(shape, regions)
        return
    assert require_apart(shape, regions) is bool((count == 1).all())
    missing = missing_region(shape, regions)
    assert (missing is None) is bool((count == 1).all())
    if missing is not None:
        assert missing.numel and not layouts.Region(*missing).of(count).any()


@given(regions_of(), st.data())
def test_outside(case: tuple[tuple[int, ...], list[Region]], data: st.DataObject) -> None:
    shape, regions = case
    if not shape or not regions:
        return
    number = data.draw(st.integers(0, len(regions) - 1))
    offsets = list(regions[number].offsets)
    offsets[0] += shape[0] - regions[number].sizes[0] - offsets[0] + 1
    regions[number] = Region(tuple(offsets), regions[number].sizes)
    with pytest.raises(ValueError, match="not inside"):
        require_apart(shape, regions)


def test_a_grid_of_many_pieces_of_which_one_is_missing() -> None:
    """Neither search takes long."""
    regions = [Region((a, b), (1, 1)) for a in range(100) for b in range(100)]
    assert require_apart((100, 100), regions)
    assert not require_apart((100, 100), regions[:-1])
    assert missing_region((100, 100), regions[:3]) == Region((1, 0), (99, 100))
    missing_region((100, 100), regions[:-1])


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(0, 6)), max_size=8))
def test_bytes_used_twice(ranges: list[tuple[int, int, int]]) -> None:
    used, taken, twice = UsedBytes(), set(), False
    for file, offset, nbytes in ranges:
        used.add(str(file), offset, nbytes)
        places = {(file, at) for at in range(offset, offset + nbytes)}
        twice |= bool(places & taken)
        taken |= places
    assert (used.shared() is not None) is twice


# --- the index --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = {"a": torch.arange(6.0), "b": torch.arange(6.0) + 10, "n": torch.arange(6), "object": {"x": 1}}
    dcp.save(state, checkpoint_id=tmp_path)
    return tmp_path


def cut_in_two(metadata: Metadata, second: int) -> None:
    """Make ``a`` consist of 3-element pieces at 0 and at ``second``."""
    chunks = [ChunkStorageMetadata(torch.Size([at]), torch.Size([3])) for at in (0, second)]
    metadata.state_dict_metadata["a"].chunks = chunks
    info = metadata.storage_data.pop(next(index for index in metadata.storage_data if index.fqn == "a"))
    half = info.length // 2
    for number, at in enumerate((0, second)):
        metadata.storage_data[MetadataIndex("a", torch.Size([at]), number)] = dataclasses.replace(
            info, offset=info.offset + number * half, length=half
        )


def move(metadata: Metadata, fqn: str, **changes: Any) -> None:
    index = next(index for index in metadata.storage_data if index.fqn == fqn)
    metadata.storage_data[index] = dataclasses.replace(metadata.storage_data[index], **changes)


def take_place_of(metadata: Metadata, fqn: str, other: str) -> None:
    """Store the item of one name under another."""
    entries = {index.fqn: (index, info) for index, info in metadata.storage_data.items()}
    del metadata.storage_data[entries[fqn][0]]
    metadata.storage_data[entries[other][0]] = entries[fqn][1]


def rename_item(metadata: Metadata) -> None:
    index = next(index for index in metadata.storage_data if index.fqn == "b")
    metadata.storage_data[dataclasses.replace(index, fqn="c")] = metadata.storage_data.pop(index)


def lose_object(metadata: Metadata) -> None:
    for index in [index for index in metadata.storage_data if index.fqn == "object.x"]:
        del metadata.storage_data[index]


CONTRADICTIONS: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "outside": (lambda m: cut_in_two(m, 4), r"a: a piece of shape \(3,\) at \(4,\) is not inside \(6,\)"),
    "overlapping": (lambda m: cut_in_two(m, 2), r"a: the pieces of shape \(3,\) at \(0,\) and .* overlap"),
    "the bytes of another": (lambda m: move(m, "a", offset=_offset(m, "b")), r"a and b share bytes of __0_0"),
    "the name of another": (lambda m: take_place_of(m, "b", "a"), r"b has 0 items for 1 pieces"),
    "an item of no tensor": (rename_item, r"nothing is known of 'c'"),
    "no item for an object": (lose_object, r"object\.x has no item"),
}


def _offset(metadata: Metadata, fqn: str) -> int:
    return next(info.offset for index, info in metadata.storage_data.items() if index.fqn == fqn)


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictory_metadata_is_damage(name: str, saved: Path) -> None:
    change, message = CONTRADICTIONS[name]
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    change(metadata)
    with pytest.raises(CheckpointCorruptError, match=message):
        CheckpointIndex(str(saved), Contents.of(metadata)).tensor("a")


def test_a_piece_without_an_item_at_its_place(saved: Path) -> None:
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.state_dict_metadata["a"].chunks = [ChunkStorageMetadata(torch.Size([1]), torch.Size([5]))]
    with pytest.raises(CheckpointCorruptError, match=r"a has no item for its piece \(5,\) at \(1,\)"):
        CheckpointIndex(str(saved), Contents.of(metadata)).tensor("a")


@pytest.mark.usefixtures("native_impl")
def test_an_item_of_another_dtype(saved: Path) -> None:
    """With the same length, so that only the item itself shows it."""
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.state_dict_metadata["n"].properties.dtype = torch.float64
    index = CheckpointIndex(str(saved), Contents.of(metadata))
    with pytest.raises(CheckpointCorruptError, match=r"n in .* is not the torch\.float64 tensor"):
        load_tensors(index, [TensorRequest("n", torch.zeros(6, dtype=torch.float64), (0,))])
