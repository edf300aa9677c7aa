# SPDX-License-Identifier: Apache-2.0
"""Plans: items do not overlap, raw data is aligned, files are balanced, equal input gives equal plans."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_fast.format.archive import ALIGNMENT, PAGE
from ckpt_fast.format.types import Extent, ObjectShard, Shard, TensorShard
from ckpt_fast.pipeline.save.plan import FilePlan, file_prefix, item_records, object_room, plan_save
from tests.pipeline.layouts import PLAIN_DTYPES, random_tensor, same, whole

PAGE_ALIGN_FROM = 64 * PAGE


def tensor_shard(number: int, numel: int, dtype: torch.dtype = torch.uint8) -> TensorShard:
    # One page of memory however large the tensor: a plan uses only shapes.
    return whole(f"t{number}", torch.empty(1, dtype=dtype).expand(numel))


@st.composite
def shard_lists(draw: st.DrawFn) -> list[Shard]:
    shards: list[Shard] = []
    for number in range(draw(st.integers(0, 12))):
        kind = draw(st.integers(0, 3))
        if kind == 0:
            shards.append(ObjectShard(f"o{number}", bytes(draw(st.integers(0, 3000)))))
        elif kind == 1:
            shards.append(
                tensor_shard(number, draw(st.integers(0, 5000)), draw(st.sampled_from(PLAIN_DTYPES)))
            )
        elif kind == 2:
            around = PAGE_ALIGN_FROM + draw(st.integers(-2, 2))
            shards.append(tensor_shard(number, around))
        else:
            shards.append(whole(f"t{number}", torch.zeros(draw(st.integers(0, 9)), dtype=torch.complex32)))
    return shards


def items_of(files: list[FilePlan]) -> list[tuple[str, int, int]]:
    return [(item.shard.fqn, item.offset, item.nbytes) for file in files for item in file.items]


@given(shard_lists(), st.integers(1, 9))
def test_layout(shards: list[Shard], writers: int) -> None:
    files = plan_save(shards, "__3_", writers)
    assert len(files) == min(writers, len(shards))
    assert [file.path for file in files] == [f"__3_{n}.distcp" for n in range(len(files))]
    assert sorted(name for name, _, _ in items_of(files)) == sorted(shard.fqn for shard in shards)
    for file in files:
        assert file.items, "an empty file"
        end = 0
        for item in file.items:
            assert item.offset >= end, "items overlap"
            alignment = PAGE if item.raw_nbytes >= PAGE_ALIGN_FROM else ALIGNMENT
            assert item.offset - end < 2 * alignment, "a gap larger than alignment needs"
            if item.archive is not None:
                assert (item.offset + len(item.archive.head)) % alignment == 0
                assert item.payload is None
            else:
                assert item.payload is not None and item.raw_nbytes == 0
            end = item.offset + item.nbytes
            if isinstance(item.shard, ObjectShard):
                assert object_room(item.nbytes) > item.nbytes, "no room to grow"
                end = item.offset + object_room(item.nbytes)
        assert file.nbytes == end


@given(shard_lists(), st.integers(1, 9))
def test_order_in_a_file(shards: list[Shard], writers: int) -> None:
    given_order = {shard.fqn: number for number, shard in enumerate(shards)}
    for file in plan_save(shards, "__0_", writers):
        keys = [(isinstance(item.shard, TensorShard), given_order[item.shard.fqn]) for item in file.items]
        assert keys == sorted(keys), "objects first, then the order given"


@given(shard_lists(), st.integers(1, 9))
def test_deterministic(shards: list[Shard], writers: int) -> None:
    assert items_of(plan_save(shards, "__0_", writers)) == items_of(plan_save(shards, "__0_", writers))


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=40), st.integers(1, 8))
def test_balance(sizes: list[int], writers: int) -> None:
    files = plan_save([tensor_shard(n, size) for n, size in enumerate(sizes)], "__0_", writers)
    loads = [sum(item.nbytes for item in file.items) for file in files]
    largest = max(item.nbytes for file in files for item in file.items)
    # What assigning the largest first to the emptiest file guarantees (Graham): at most 4/3 of the optimum.
    optimum = max(largest, math.ceil(sum(loads) / len(loads)))
    assert max(loads) <= optimum * 4 / 3 + 1 or max(loads) - min(loads) <= largest


def test_more_writers_than_items() -> None:
    files = plan_save([tensor_shard(0, 5), tensor_shard(1, 5)], "__0_", 16)
    assert [[item.shard.fqn for item in file.items] for file in files] == [["t0"], ["t1"]]


def test_nothing_to_save_is_no_file() -> None:
    assert plan_save([], file_prefix(7), 4) == []


@pytest.mark.parametrize("writers", [0, -1])
def test_no_writers(writers: int) -> None:
    with pytest.raises(ValueError, match=f"storage_writers_per_rank is {writers}; it must be at least 1"):
        plan_save([], "__0_", writers)


def test_complex32_becomes_a_ready_made_item() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex32)
    ((item,),) = [file.items for file in plan_save([whole("c", tensor)], "__0_", 1)]
    assert item.archive is None and item.payload is not None
    assert same(torch.load(io.BytesIO(item.payload), weights_only=True), tensor)


def test_quantized_tensor_becomes_a_ready_made_item() -> None:
    tensor = torch.quantize_per_tensor(torch.arange(6.0), 0.5, 3, torch.qint8)
    ((item,),) = [file.items for file in plan_save([whole("q", tensor)], "__0_", 1)]
    assert item.archive is None and item.payload is not None
    assert torch.equal(torch.load(io.BytesIO(item.payload)).int_repr(), tensor.int_repr())


def test_records_say_what_metadata_needs() -> None:
    piece = TensorShard("w", torch.zeros(2, 3, dtype=torch.int16), (4, 0), (8, 3))
    files = plan_save([ObjectShard("o", b"12345"), piece], file_prefix(2), 1)
    first, second = item_records(files)
    assert first == ("o", Extent("__2_0.distcp", 0, 5), None, (), (), ())
    assert second[0] == "w" and second[2:] == (torch.int16, (4, 0), (2, 3), (8, 3))
    assert second.extent == Extent("__2_0.distcp", files[0].items[1].offset, files[0].items[1].nbytes)


def test_plan_needs_no_data() -> None:
    on_meta = whole("w", torch.empty(1 << 20, 1 << 20, dtype=torch.bfloat16, device="meta"))
    (file,) = plan_save([on_meta], "__0_", 1)
    assert file.nbytes > 1 << 41


def test_same_shapes_share_head_and_tail() -> None:
    shards = [whole(f"w{n}", random_tensor((5, 7), torch.float32, n)) for n in range(50)]
    (file,) = plan_save(shards, "__0_", 1)
    assert len({id(item.archive) for item in file.items}) == 1
