# SPDX-License-Identifier: Apache-2.0
"""dcp.async_save through the torch DCP door: a checkpoint contains the values at the time of the call."""

from __future__ import annotations

import gc
import inspect
import io
import os
import threading
from collections import OrderedDict, namedtuple
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import AsyncStager

from ckpt_fast import FastStorageReader, FastStorageWriter
from ckpt_fast.doors.dcp import snapshot as dcp_snapshot
from ckpt_fast.doors.dcp.upload import Upload
from ckpt_fast.pipeline.save import stage as stage_module
from ckpt_fast.pipeline.save import waves as waves_module
from tests.doors.dcp.states import blank, differences, odd_tensors, training_state
from tests.helpers import run_ranks
from tests.manifests import manifest_lies
from tests.pipeline.layouts import random_tensor
from tests.pipeline.save.test_stage import Wrapper
from tests.pipeline.save.test_waves import HeldDisk, WatchedPool

pytestmark = [
    pytest.mark.filterwarnings("error::FutureWarning:torch.distributed"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

Pair = namedtuple("Pair", ["first", "second"])


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> WatchedPool:
    """Return a fresh pool."""
    fresh = WatchedPool()
    monkeypatch.setattr(stage_module, "host_buffers", fresh)
    monkeypatch.setattr(dcp_snapshot, "host_buffers", fresh)
    return fresh


def async_save(directory: Path, state: dict[str, Any], writer: Any = None, **options: Any) -> Future[Any]:
    writer = writer or FastStorageWriter(directory)
    future = dcp.async_save(state, checkpoint_id=directory, storage_writer=writer, **options)
    assert isinstance(future, Future)
    return future


def load(directory: Path, like: dict[str, Any]) -> dict[str, Any]:
    state = blank(like)
    dcp.load(state, storage_reader=FastStorageReader(directory))
    return state


def scramble(value: Any) -> None:
    """Change everything in place."""
    if isinstance(value, torch.Tensor):
        if value.stride() != (1, 0):  # expanded tensors cannot be written to
            value.detach().copy_(random_tensor(tuple(value.shape), value.dtype, seed=9))
    elif isinstance(value, dict):
        for child in value.values():
            scramble(child)
        value["more"] = 1
    elif isinstance(value, list):
        for child in value:
            scramble(child)
        value.append(1)
    elif isinstance(value, set):
        value.clear()


@pytest.mark.parametrize("make", [training_state, odd_tensors])
def test_later_changes_do_not_reach_the_checkpoint(make: Any, tmp_path: Path) -> None:
    expected, state = make(), make()
    future = async_save(tmp_path, state)
    scramble(state)
    future.result()
    assert differences(expected, load(tmp_path, expected)) == []
    assert manifest_lies(tmp_path) == []


def test_saves_in_flight_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: WatchedPool) -> None:
    """One writer, two directories, both saves between staging and writing."""
    disk = HeldDisk(monkeypatch)
    state = {"w": torch.zeros(2000), "step": [0]}
    writer = FastStorageWriter(tmp_path / "unused")
    futures = []
    for step in (1, 2):
        state["w"].fill_(step)
        state["step"][0] = step
        futures.append(async_save(tmp_path / str(step), state, writer))
    state["w"].fill_(3)
    assert writer.checkpoint_id in {str(tmp_path / "1"), str(tmp_path / "2")}
    disk.go.set()
    for step, future in zip((1, 2), futures, strict=True):
        metadata = future.result()
        assert metadata.storage_meta.checkpoint_id == str(tmp_path / str(step))
        found = load(tmp_path / str(step), state)
        assert torch.equal(found["w"], torch.full((2000,), step)) and found["step"] == [step]
    assert not (tmp_path / "unused").exists()
    assert pool.peak == 2 * 8000 and pool.in_use == 0


class Watching(FastStorageWriter):
    """Records where it stages to."""

    addresses: list[list[int]]

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        staged = super().stage(state_dict)
        addresses = [value.data_ptr() for value in staged.values() if isinstance(value, torch.Tensor)]
        self.__dict__.setdefault("addresses", []).append(addresses)
        return staged


def test_memory_is_used_again(tmp_path: Path, pool: WatchedPool) -> None:
    state = {name: torch.randn(100, 10) for name in "abc"}
    writer = Watching(tmp_path)
    for step in range(3):
        state = {name: tensor + 1 for name, tensor in state.items()}  # other tensors, with the same shapes
        async_save(tmp_path / str(step), state, writer).result()
        assert writer.report is not None
        assert writer.report.host_memory_allocated == (3 * 4032 if step == 0 else 0)
        assert differences(state, load(tmp_path / str(step), state)) == []
    first, *others = writer.addresses
    assert len(first) == 3 and others == [first, first]
    assert pool.peak == 3 * 4032 and pool.in_use == 0

    another = Watching(tmp_path / "another")
    async_save(tmp_path / "another", state, another).result()
    assert another.addresses == [first], "the memory is the process's, not the writer's"


def test_memory_of_a_save_in_flight_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = HeldDisk(monkeypatch)
    state, writer = {"w": torch.zeros(1000)}, Watching(tmp_path)
    slow = async_save(tmp_path / "1", state, writer)
    other = async_save(tmp_path / "2", state, writer)
    disk.go.set()
    slow.result()
    other.result()
    async_save(tmp_path / "3", state, writer).result()
    first, second, third = writer.addresses
    assert first != second and third in (first, second)


def test_another_structure(tmp_path: Path, pool: WatchedPool) -> None:
    writer = FastStorageWriter(tmp_path)
    for step, sizes in enumerate([(10, 20), (10, 20, 30), (5,), (20, 10)]):
        state = {f"w{number}": torch.randn(size, 64) for number, size in enumerate(sizes)}
        async_save(tmp_path / str(step), state, writer).result()
        assert differences(state, load(tmp_path / str(step), state)) == []
    assert pool.in_use == 0
    assert pool.take(1).nbytes == 60 * 256, "one buffer is left, of the largest state"


def test_memory_that_is_not_to_be_kept(tmp_path: Path, pool: WatchedPool) -> None:
    writer = FastStorageWriter(tmp_path, cache_staged_state_dict=False)
    for step in range(2):
        async_save(tmp_path / str(step), {"w": torch.zeros(1000)}, writer).result()
        assert writer.report is not None and writer.report.host_memory_allocated == 4032
    assert pool.take(1).is_new


def test_every_kind_of_value(tmp_path: Path) -> None:
    """Check directly what a snapshot makes of a state dict."""
    inner = torch.randn(4)
    state = {
        "ordered": OrderedDict(b=torch.ones(2), a=torch.zeros(2)),
        "pair": Pair(torch.ones(3), "x"),
        "tuple": (torch.ones(3), torch.Size([1, 2]), torch.float16),
        "bytes": io.BytesIO(b"abc"),
        "sparse": torch.eye(3).to_sparse(),
        "wrapper": Wrapper(inner.clone()),
        "meta": torch.empty(3, device="meta"),
        "same": inner,
        "same again": inner,
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    staged = FastStorageWriter(tmp_path).stage(state)
    for tensor in (state["ordered"]["b"], state["pair"].first, state["tuple"][0], inner):
        tensor.fill_(-1)
    state["sparse"].zero_()
    state["wrapper"].inner.zero_()
    state["bytes"].write(b"xyz")

    assert type(staged["ordered"]) is OrderedDict and list(staged["ordered"]) == ["b", "a"]
    assert staged["ordered"]["b"].tolist() == [1, 1]
    assert type(staged["pair"]) is Pair and staged["pair"].first.tolist() == [1, 1, 1]
    assert staged["tuple"][0].tolist() == [1, 1, 1]
    assert staged["tuple"][1:] == (torch.Size([1, 2]), torch.float16)
    assert staged["bytes"].getvalue() == b"abc"
    assert torch.equal(staged["sparse"].to_dense(), torch.eye(3))
    assert type(staged["wrapper"]) is Wrapper and staged["wrapper"].inner.abs().min() > 0
    assert staged["meta"].device.type == "meta"
    assert staged["same"] is staged["same again"] and staged["same"].abs().min() > 0
    assert not staged["parameter"].requires_grad


def test_values_that_torch_stores_whole_stay_small(tmp_path: Path) -> None:
    """torch.save stores a view's whole storage, which must not be the entire host buffer."""
    state = {"pair": (torch.ones(10), 1), "large": torch.zeros(1 << 20)}
    async_save(tmp_path, state).result()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < (4 << 20) + 20_000
    assert differences(state, load(tmp_path, state)) == []


def test_a_failed_save_gives_its_memory_back(tmp_path: Path, pool: WatchedPool) -> None:
    (tmp_path / "file").write_text("")
    future = async_save(tmp_path / "file" / "below", {"w": torch.zeros(1000)})
    with pytest.raises(CheckpointException, match="cannot prepare the checkpoint directory"):
        future.result()
    del future
    gc.collect()
    assert pool.in_use == 0
    async_save(tmp_path / "next", {"w": torch.ones(1000)}).result()
    assert torch.equal(load(tmp_path / "next", {"w": torch.ones(1000)})["w"], torch.ones(1000))


def test_a_failed_write_gives_its_memory_back_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: WatchedPool
) -> None:
    def failing(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(waves_module, "write", failing)
        future = async_save(tmp_path, {"w": torch.zeros(1000)})
        with pytest.raises(CheckpointException, match="No space left"):
            future.result()
    assert pool.in_use == 0


def test_a_staged_state_dict_nobody_saves(tmp_path: Path, pool: WatchedPool) -> None:
    staged = FastStorageWriter(tmp_path).stage({"w": torch.zeros(1000)})
    assert pool.in_use == 4032 and staged["w"].sum() == 0
    del staged
    assert pool.in_use == 0


def test_snapshot_beyond_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: WatchedPool
) -> None:
    state = {"w": torch.randn(3000), "t": torch.randn(300, 50).t(), "u": torch.randn(400, 50).t()}
    monkeypatch.setenv("CKPT_FAST_HOST_BUFFER", "100K")
    with pytest.raises(CheckpointException, match=r"(?s)snapshot of 152064 bytes exceeds the 102400.*synchr"):
        async_save(tmp_path, state).result()
    assert not (tmp_path / ".metadata").exists()
    dcp.save(state, storage_writer=FastStorageWriter(tmp_path, thread_count=2))
    assert differences(state, load(tmp_path, state)) == []
    assert 0 < pool.peak <= 102_400 and pool.in_use == 0
    assert len(list(tmp_path.glob("*.distcp"))) == 2


def test_what_cannot_be_copied_is_named(tmp_path: Path) -> None:
    future = async_save(tmp_path, {"lock": threading.Lock()})
    with pytest.raises(CheckpointException, match=r"could not be copied to host memory.*lock"):
        future.result()


@pytest.mark.skipif(
    "async_stager" not in inspect.signature(dcp.async_save).parameters, reason="torch takes no stager"
)
def test_as_the_stager_of_another_writer(tmp_path: Path, pool: WatchedPool) -> None:
    stager = FastStorageWriter(tmp_path)
    assert isinstance(stager, AsyncStager)
    for step in range(2):
        state = {"w": torch.full((1000,), step)}
        writer = dcp.FileSystemWriter(tmp_path / str(step))
        dcp.async_save(state, storage_writer=writer, async_stager=stager).result()
        assert torch.equal(load(tmp_path / str(step), state)["w"], state["w"])
    gc.collect()
    assert pool.in_use == 0


def save_in_a_process(rank: int, directory: str) -> list[str]:
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    assert dist.get_world_size() == 1
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # otherwise torch resolves this host's name
    expected, state = training_state(), training_state()
    writer = FastStorageWriter(directory, thread_count=2)
    future = async_save(Path(directory), state, writer, async_checkpointer_type=AsyncCheckpointerType.PROCESS)
    scramble(state["model"])
    future.result(timeout=100)
    return differences(expected, load(Path(directory), expected)) + manifest_lies(Path(directory))


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert run_ranks(save_in_a_process, 1, str(tmp_path), fresh=True) == [[]]


class HeldPlanner(DefaultSavePlanner):
    """Delivers its data once ``go`` is set: an arbitrarily long time between staging and writing."""

    def __init__(self, go: threading.Event) -> None:
        super().__init__()
        self.go = go

    def resolve_data(self, write_item: Any) -> Any:
        assert self.go.wait(30)
        return super().resolve_data(write_item)


@pytest.mark.parametrize("shared", [1, True, None, "bf16", 1001.5, ()])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_equal_values_do_not_link_saves(tmp_path: Path, shared: object, kind: str) -> None:
    """A save in flight keeps its memory when another ends that has an equal value beside its tensors."""
    go = threading.Event()
    first = {"w": torch.full((1000,), 1.0), "meta": shared}
    in_flight = async_save(tmp_path / "1", first, planner=HeldPlanner(go))
    second = {"w": torch.ones(4), "meta": shared}
    if kind == "sync":
        dcp.save(second, storage_writer=FastStorageWriter(tmp_path / "2"))
    else:
        async_save(tmp_path / "2", second).result()
    third = {"w": torch.full((1000,), 3.0), "meta": 7.25}
    async_save(tmp_path / "3", third).result()
    go.set()
    in_flight.result()
    for number, state in enumerate((first, second, third), start=1):
        assert differences(state, load(tmp_path / str(number), state)) == []


def test_a_snapshot_is_saved_once(tmp_path: Path, pool: WatchedPool) -> None:
    """Its memory is reused afterwards: saving it a second time is refused rather than wrong."""
    writer = FastStorageWriter(tmp_path)
    staged = writer.stage({"w": torch.zeros(1000)})
    dcp.save(staged, checkpoint_id=tmp_path / "1", storage_writer=writer)
    assert pool.in_use == 0
    with pytest.raises(CheckpointException, match="saved already"):
        dcp.save(staged, checkpoint_id=tmp_path / "2", storage_writer=writer)


def test_the_memory_stays_while_a_view_of_a_copy_does(tmp_path: Path, pool: WatchedPool) -> None:
    view = FastStorageWriter(tmp_path).stage({"a": {"w": torch.ones(1000)}})["a"]["w"][10:20]
    assert pool.in_use == 4032
    del view
    assert pool.in_use == 0


class HeldWriter(dcp.FileSystemWriter):
    """Writes once ``go`` is set."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.begun, self.go = threading.Event(), threading.Event()

    def write_data(self, plan: Any, planner: Any) -> Any:
        self.begun.set()
        assert self.go.wait(30)
        return super().write_data(plan, planner)


def test_an_upload_keeps_its_memory_until_it_is_written(tmp_path: Path, pool: WatchedPool) -> None:
    writer = HeldWriter(tmp_path / "1")
    state = {"w": torch.full((1000,), 1.0)}
    upload = Upload(state, writer, str(tmp_path / "1"))
    upload.stage()
    async_save(tmp_path / "2", {"w": torch.full((1000,), 2.0)}).result()
    writer.go.set()
    upload.write()
    upload.commit()
    assert torch.equal(load(tmp_path / "1", state)["w"], state["w"])
    assert pool.in_use == 0
