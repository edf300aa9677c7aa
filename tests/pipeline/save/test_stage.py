# SPDX-License-Identifier: Apache-2.0
"""Staging: the engine finds each item's bytes at the given address, wherever the tensor was."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast.errors import CheckpointError
from ckpt_fast.format.types import ObjectShard, Shard, TensorRequest, TensorShard
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors
from ckpt_fast.pipeline.memory.copies import needs_copy, slot_nbytes
from ckpt_fast.pipeline.memory.host_buffer import HostBufferPool
from ckpt_fast.pipeline.save import stage as stage_module
from ckpt_fast.pipeline.save.plan import is_plain, plan_save
from ckpt_fast.pipeline.save.stage import Staged, copy_to_host, stage
from tests.pipeline.layouts import PLAIN_DTYPES, random_tensor, raw_bytes, same, whole
from tests.saves import save


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> HostBufferPool:
    """Return a fresh pool."""
    fresh = HostBufferPool()
    monkeypatch.setattr(stage_module, "host_buffers", fresh)
    return fresh


class Wrapper(torch.Tensor):
    """A tensor that wraps another one, as quantized weights do."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = [arg.inner if isinstance(arg, Wrapper) else arg for arg in args]
        return cls(function(*unwrapped, **(kwargs or {})))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Wrapper, (self.inner,)


def odd_tensors() -> dict[str, torch.Tensor]:
    """Return tensors whose values are not simply their memory from first to last."""
    wave = torch.complex(torch.randn(4, 5), torch.randn(4, 5))
    odd = {
        "transposed": torch.randn(6, 10).t(),
        "strided": torch.randn(9, 9)[::2, 1::3],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "conjugate": wave.conj(),
        "negative": wave.conj().imag,
        "reversed order": torch.randn(2, 3, 4).permute(2, 0, 1),
    }
    return odd | {f"strided {dtype}": random_tensor((5, 6), dtype).t() for dtype in PLAIN_DTYPES}


def simple_tensors() -> dict[str, torch.Tensor]:
    simple = {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(3, 0),
        "view": torch.arange(100)[10:20],
        "parameter": torch.nn.Parameter(torch.randn(4, 4)),
        "large": random_tensor((400_000,), torch.float32),
    }
    return simple | {str(dtype): random_tensor((5, 7), dtype) for dtype in PLAIN_DTYPES}


def staged_bytes(staged: Staged, shards: Sequence[Shard], items: Sequence[Any]) -> dict[str, bytes]:
    assert len(staged.addresses) == len(items)
    return {
        item.shard.fqn: ctypes.string_at(address, item.raw_nbytes) if item.raw_nbytes else b""
        for item, address in zip(items, staged.addresses, strict=True)
    }


def stage_all(tensors: dict[str, torch.Tensor], **options: Any) -> tuple[Staged, dict[str, bytes]]:
    shards: list[Shard] = [whole(name, tensor) for name, tensor in tensors.items()]
    (file,) = plan_save([ObjectShard("object", b"ready"), *shards], "__0_", 1)
    staged = stage([file], **options)
    content = staged_bytes(staged, shards, file.items)
    assert content.pop("object") == b""
    return staged, content


@pytest.mark.usefixtures("native_impl")
@pytest.mark.parametrize("snapshot", [False, True])
def test_bytes_of_every_kind_of_tensor(snapshot: bool) -> None:
    tensors = {**simple_tensors(), **odd_tensors()}
    staged, content = stage_all(tensors, snapshot=snapshot)
    wrong = [name for name, tensor in tensors.items() if content[name] != raw_bytes(tensor.detach())]
    assert wrong == []
    staged.release()


@pytest.mark.usefixtures("native_impl")
@pytest.mark.parametrize("dtype", PLAIN_DTYPES, ids=str)
def test_a_transposed_tensor_of_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """torch itself copies no strided tensor of some of them."""
    values = random_tensor((70, 90), dtype)
    save([whole("t", values.t())], str(tmp_path))
    loaded = torch.zeros_like(values.view(torch.uint8)).view(dtype)
    load_tensors(CheckpointIndex(str(tmp_path)), [TensorRequest("t", loaded.t(), (0, 0))])
    assert same(loaded, values)


@pytest.mark.usefixtures("native_impl")
def test_a_negative_view_of_bytes(tmp_path: Path) -> None:
    """torch gives no other view of it."""
    values = torch.arange(-6, 6, dtype=torch.int8).reshape(3, 4)
    save([whole("t", torch._neg_view(values))], str(tmp_path))
    loaded = torch.zeros_like(values)
    load_tensors(CheckpointIndex(str(tmp_path)), [TensorRequest("t", loaded, (0, 0))])
    assert torch.equal(loaded, -values)


@pytest.mark.usefixtures("native_impl")
@pytest.mark.parametrize("snapshot", [False, True])
def test_long_runs_are_read_where_they_are(tmp_path: Path, snapshot: bool) -> None:
    memory = torch.arange(6 * 2 * 3 * 200, dtype=torch.int32).reshape(6, 2, 3, 200)
    tensors = {"gate": memory[:, 0], "up": memory[:, 1], "both": memory.transpose(0, 1), "plain": memory}
    sizes = {"gate": (18, 200), "up": (18, 200), "both": (1, 36, 200), "plain": (6, 2, 3, 200)}
    shards = [
        TensorShard(name, tensor, (0,) * len(sizes[name]), sizes[name], sizes[name])
        for name, tensor in tensors.items()
    ]
    report = save(shards, str(tmp_path), snapshot=snapshot)
    assert report.host_memory_allocated == (3 * memory.nbytes if snapshot else 0)
    index = CheckpointIndex(str(tmp_path))
    for name, tensor in tensors.items():
        loaded = torch.zeros(sizes[name], dtype=torch.int32)
        load_tensors(index, [TensorRequest(name, loaded, (0,) * len(sizes[name]))])
        assert torch.equal(loaded, tensor.reshape(sizes[name])), name


@pytest.mark.usefixtures("native_impl")
def test_a_snapshot_outlives_changes() -> None:
    tensors = {name: tensor for name, tensor in simple_tensors().items() if tensor.is_floating_point()}
    before = {name: raw_bytes(tensor.detach()) for name, tensor in tensors.items()}
    shards: list[Shard] = [whole(name, tensor) for name, tensor in tensors.items()]
    (file,) = plan_save(shards, "__0_", 1)
    staged = stage([file], snapshot=True)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    assert staged_bytes(staged, shards, file.items) == before
    assert staged.owners == []


def test_no_copy_where_none_is_needed() -> None:
    tensors = simple_tensors()
    staged, _ = stage_all(tensors)
    assert staged.buffer is None
    in_place = {tensor.data_ptr() for tensor in tensors.values() if tensor.numel()}
    assert set(staged.addresses) == in_place | {0}
    assert {owner.data_ptr() for owner in staged.owners} == in_place, "memory must stay until it is written"


def test_a_snapshot_takes_its_bytes_and_not_more() -> None:
    tensors = simple_tensors()
    staged, _ = stage_all(tensors, snapshot=True)
    nbytes = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
    assert staged.buffer is not None
    assert nbytes <= staged.buffer.nbytes < nbytes + 64 * len(tensors)
    assert staged.buffer.nbytes == sum(map(slot_nbytes, tensors.values()))


def test_memory_is_allocated_once() -> None:
    tensors = simple_tensors()
    first, _ = stage_all(tensors, snapshot=True)
    assert first.buffer is not None and first.allocated_nbytes == first.buffer.nbytes
    addresses = first.addresses
    first.release()
    first.release()
    second, _ = stage_all(tensors, snapshot=True)
    assert second.addresses == addresses and second.allocated_nbytes == 0


def test_memory_is_given_back_after_an_error(pool: HostBufferPool) -> None:
    no_data = torch.empty(10, device="meta")
    with pytest.raises(NotImplementedError):
        stage_all({"w": torch.randn(5, 6).t(), "no data": no_data}, bound=1000)
    with pytest.raises(NotImplementedError):
        copy_to_host([torch.randn(5), no_data], bound=1000)
    assert pool.take(1000, bound=1000, wait_s=0)


def test_needs_copy() -> None:
    for name, tensor in simple_tensors().items():
        assert not needs_copy(tensor, snapshot=False), name
        assert needs_copy(tensor, snapshot=True), name
    for name, tensor in odd_tensors().items():
        assert needs_copy(tensor, snapshot=False), name
    assert needs_copy(torch.empty(3, device="meta"), snapshot=False)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_that_are_more_than_their_bytes_are_ready_made() -> None:
    special = {
        "sparse": torch.eye(3).to_sparse(),
        "sparse rows": torch.eye(3).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.randn(5), 0.1, 3, torch.qint8),
        "wrapper": Wrapper(torch.randn(5)),
    }
    for name, tensor in special.items():
        assert not is_plain(tensor), name
        (file,) = plan_save([whole(name, tensor)], "__0_", 1)
        (item,) = file.items
        assert item.archive is None and item.payload is not None
        loaded = torch.load(io.BytesIO(item.payload), weights_only=False)
        assert type(loaded) is type(tensor) and loaded.layout == tensor.layout
        staged = stage([file], snapshot=True)
        assert staged.addresses == [0] and staged.copied_nbytes == 0
    assert all(map(is_plain, (*simple_tensors().values(), *odd_tensors().values())))


@pytest.mark.usefixtures("native_impl")
def test_copies_have_storages_of_their_own() -> None:
    tensors = {**simple_tensors(), **odd_tensors()}
    buffer, copies = copy_to_host(list(tensors.values()))
    assert buffer is not None
    for (name, tensor), copy in zip(tensors.items(), copies, strict=True):
        assert same(copy, tensor.detach()), name
        assert copy.is_contiguous() and not copy.requires_grad
        assert copy.untyped_storage().nbytes() == copy.numel() * copy.dtype.itemsize


def test_nothing_to_copy() -> None:
    assert copy_to_host([]) == (None, [])
    buffer, (copy,) = copy_to_host([torch.empty(0, 4, dtype=torch.bfloat16)])
    assert buffer is None and same(copy, torch.empty(0, 4, dtype=torch.bfloat16))


def test_a_whole_snapshot_must_fit_the_bound() -> None:
    with pytest.raises(CheckpointError, match=r"snapshot of 4032 bytes exceeds the 4000.*synchronously"):
        copy_to_host([torch.zeros(1000)], bound=4000)
    buffer, _ = copy_to_host([torch.zeros(900)], bound=4000)
    assert buffer is not None and buffer.nbytes == 3648
    with pytest.raises(CheckpointError, match="other saves hold 3648"):
        copy_to_host([torch.zeros(900)], bound=4000)
