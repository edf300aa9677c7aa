# SPDX-License-Identifier: Apache-2.0
"""``dcp.async_save`` after ``install``, as frameworks call it, and what its futures mean."""

from __future__ import annotations

import gc
import inspect
import multiprocessing
import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import staging, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

import ckpt_fast
from ckpt_fast.doors.dcp import snapshot as dcp_snapshot
from ckpt_fast.pipeline.save import stage as stage_module
from ckpt_fast.pipeline.save import waves
from tests.doors.dcp.ranks import FSDP2_ON_CPU, Trained, wrong
from tests.doors.dcp.states import blank, differences, training_state
from tests.doors.dcp.test_async import scramble
from tests.doors.installing.test_torch_dcp import is_ours
from tests.helpers import run_ranks
from tests.pipeline.memory import simulated_gpu
from tests.pipeline.save.test_waves import HeldDisk, WatchedPool

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.skipif(
        "async_stager" not in inspect.signature(dcp.async_save).parameters, reason="torch takes no stager"
    ),
]


class CopyingStager(staging.BlockingAsyncStager):
    """A stager of the caller's."""

    staged = 0

    def stage(self, state_dict: dict[str, Any]) -> Any:
        type(self).staged += 1
        return super().stage(state_dict)


def options(way: str, path: str) -> dict[str, Any]:
    """Return the arguments of ``dcp.async_save``, as one of its callers has them."""
    chosen: dict[str, Any] = {"checkpoint_id": path}
    if "process" in way:
        chosen["async_checkpointer_type"] = state_dict_saver.AsyncCheckpointerType.PROCESS
    if "writer" in way:
        chosen = {**chosen, "storage_writer": dcp.FileSystemWriter(path, thread_count=2)}
    if "their stager" in way:
        chosen["async_stager"] = CopyingStager()
    if "pinned" in way:
        chosen["async_stager"] = staging.DefaultStager()
    return chosen


def uploaded(response: Any) -> Future[Any]:
    """Return the future of the save; torch returns two where staging may go on."""
    return response if isinstance(response, Future) else response.upload_completion


WAYS = ["thread", "thread, writer", "thread, their stager", "thread, pinned", "process", "process, pinned"]


@pytest.mark.parametrize("way", WAYS)
def test_one_rank(way: str, tmp_path: Path) -> None:
    expected, state = training_state(), training_state()
    children = multiprocessing.active_children()
    CopyingStager.staged = 0
    with ckpt_fast.install(megatron=False):
        response = dcp.async_save(state, **options(way, str(tmp_path)))
        scramble(state["model"])
        metadata = uploaded(response).result(timeout=60)
    assert is_ours(tmp_path) and multiprocessing.active_children() == children
    assert CopyingStager.staged == ("their stager" in way)
    assert metadata.state_dict_metadata == dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    found = blank(expected)
    dcp.load(found, checkpoint_id=tmp_path)
    assert differences(expected, found) == []


def save_while_training(rank: int, root: str, way: str) -> list[list[str]]:
    """Save in the background, three times, while training uses the only process group that it knows of."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    differing = []
    with ckpt_fast.install(megatron=False):
        for step in range(3):
            run = Trained(seed=step)
            whole = run.whole()
            future = uploaded(dcp.async_save(run.state(), **options(way, f"{root}/{step}")))
            for parameter in run.model.parameters():
                parameter.data.to_local().fill_(-1)
            for _ in range(20):
                number = torch.ones(1)
                dist.all_reduce(number)
                assert number == dist.get_world_size()
            future.result(timeout=60)
            assert is_ours(f"{root}/{step}")
            if rank == 0:
                torch.save(whole, f"{root}/{step}.pt")
            dist.barrier()
    for step in range(3):
        run = Trained(seed=9)
        run.load(None, checkpoint_id=f"{root}/{step}")
        differing.append(wrong(run.whole(), f"{root}/{step}.pt"))
    return differing


@pytest.mark.skipif(not FSDP2_ON_CPU, reason="FSDP2 of this torch needs a GPU")
@pytest.mark.parametrize("way", ["thread", "process", "process, pinned"])
def test_two_ranks(way: str, tmp_path: Path) -> None:
    assert run_ranks(save_while_training, 2, str(tmp_path), way) == [[[], [], []]] * 2


def save_alone(rank: int, root: str, way: str) -> bool:
    """Each rank saves in the background without the others, which do not take part in it."""
    state = {"rank": torch.full((5,), float(rank))}
    with ckpt_fast.install(megatron=False):
        if rank:
            response = dcp.async_save(state, no_dist=True, **options(way, f"{root}/1"))
            state["rank"].fill_(-1)
            uploaded(response).result(timeout=30)
        dist.barrier()
    found = {"rank": torch.zeros(5)}
    dcp.load(found, checkpoint_id=f"{root}/1", no_dist=True)
    return is_ours(f"{root}/1") and bool((found["rank"] == 1).all())


@pytest.mark.skipif(
    "no_dist" not in inspect.signature(dcp.async_save).parameters, reason="torch knows no no_dist"
)
@pytest.mark.parametrize("way", ["thread", "process", "process, pinned"])
def test_a_rank_saves_alone(way: str, tmp_path: Path) -> None:
    assert run_ranks(save_alone, 2, str(tmp_path), way, timeout_s=60) == [True, True]


def save_without_coordination(rank: int, root: str) -> bool:
    """Neither rank waits for the other: one begins when the other's save is over."""
    state = {"rank": torch.full((5,), float(rank))}
    with ckpt_fast.install(megatron=False):
        for turn in range(2):
            if turn == rank:
                future = dcp.async_save(state, checkpoint_id=root, use_collectives=False)
                uploaded(future).result(timeout=30)
            dist.barrier()
    found = {"rank": torch.zeros(5)}
    dcp.load(found, checkpoint_id=root)
    return bool((found["rank"] == rank).all())


@pytest.mark.skipif(
    "use_collectives" not in inspect.signature(dcp.async_save).parameters,
    reason="torch knows no use_collectives",
)
def test_without_collectives(tmp_path: Path) -> None:
    assert run_ranks(save_without_coordination, 2, str(tmp_path), timeout_s=60) == [True, True]


def fail_in_the_background(rank: int, root: str) -> list[str]:
    """The first save fails on one rank, and so on both; the next one, to the same directory, does not."""
    with ckpt_fast.install(megatron=False):
        state: dict[str, Any] = {"w": torch.ones(3), **({"lock": threading.Lock()} if rank else {})}
        future = dcp.async_save(state, checkpoint_id=root)
        with pytest.raises(CheckpointException) as raised:
            future.result(timeout=60)
        dcp.save({"w": torch.ones(3)}, checkpoint_id=root)
        dcp.async_save({"w": torch.ones(3)}, checkpoint_id=root).result(timeout=60)
    return [str(raised.value)]


def test_a_failure_on_one_rank_reaches_all(tmp_path: Path) -> None:
    for (message,) in run_ranks(fail_in_the_background, 2, str(tmp_path)):
        assert "lock" in message
    assert is_ours(tmp_path)


def fail_and_go_on(rank: int, root: str) -> bool:
    """A save fails while rank 1 writes, which rank 0 is not told; the next one is in the background."""
    with ckpt_fast.install(megatron=False):
        with pytest.MonkeyPatch.context() as patch:
            if rank:
                patch.setattr(waves, "write", no_room)
            with pytest.raises(CheckpointException, match="no room"):
                dcp.save({"w": torch.ones(3), f"of {rank}": torch.ones(3)}, checkpoint_id=root)
        dcp.async_save({"w": torch.ones(3)}, checkpoint_id=root).result(timeout=60)
    return is_ours(root)


def no_room(*_: Any) -> None:
    raise OSError("no room")


def test_a_failure_on_one_rank_does_not_hold_up_the_next(tmp_path: Path) -> None:
    assert run_ranks(fail_and_go_on, 2, str(tmp_path)) == [True, True]


def install_on_one(rank: int, root: str, way: str, first: int) -> list[str]:
    """One rank has ckpt_fast, and one has not; returns what each save has raised."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    group = dist.new_group(backend="gloo")
    raised = []
    with ckpt_fast.install(megatron=False, torch_dcp=rank == first):
        for step in range(2):
            with pytest.raises(CheckpointException) as error:
                state, path = {"w": torch.ones(3)}, f"{root}/{step}"
                if way == "now":
                    dcp.save(state, checkpoint_id=path, process_group=group)
                else:
                    future = dcp.async_save(state, process_group=group, **options(way, path))
                    uploaded(future).result(timeout=60)
            raised.append(str(error.value))
    return raised


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("way", ["now", "thread", "thread, writer"])
def test_a_mixture_of_ranks(way: str, first: int, tmp_path: Path) -> None:
    for messages in run_ranks(install_on_one, 2, str(tmp_path), way, first, fresh=True, timeout_s=60):
        for message in messages:
            assert "ckpt_fast.install() on every rank" in message
    assert not list(tmp_path.rglob(".metadata"))


def install_on_some_with_processes(rank: int, root: str, having: list[int]) -> list[str]:
    """The same with torch's process, twice; then all ranks have ckpt_fast. Returns what was raised."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    group = dist.new_group(backend="gloo")
    raised = []
    for step in range(3):
        with ckpt_fast.install(megatron=False, torch_dcp=step == 2 or rank in having):
            try:
                way = options("process", f"{root}/{step}")
                uploaded(dcp.async_save({"w": torch.ones(3)}, process_group=group, **way)).result(timeout=60)
            except CheckpointException as error:
                raised.append(str(error))
        dist.barrier()
    return raised


@pytest.mark.parametrize("having", [[0], [0, 2], [0, 1]])
def test_a_mixture_of_processes(having: list[int], tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed.checkpoint._async_process_executor")
    raised = run_ranks(install_on_some_with_processes, 3, str(tmp_path), having, fresh=True, timeout_s=100)
    for messages in raised:
        assert len(messages) == 2 and all("ckpt_fast.install() on every rank" in each for each in messages)
    assert is_ours(tmp_path / "2") and len(list(tmp_path.rglob(".metadata"))) == 1


def save_where_torch_coordinates(rank: int, root: str) -> str:
    """Rank 0 begins as torch does: then it could only wait for rank 1."""
    from torch.distributed.checkpoint._async_process_executor import _ProcessGroupInitInfo

    os.environ["MASTER_ADDR"] = "127.0.0.1"
    group = dist.new_group(backend="gloo")
    if rank == 0:
        _ProcessGroupInitInfo(group)
        return ""
    with ckpt_fast.install(megatron=False), pytest.raises(CheckpointException) as error:
        dcp.async_save({"w": torch.ones(3)}, process_group=group, **options("process", root))
    return str(error.value)


def test_a_process_of_torchs_coordinates(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed.checkpoint._async_process_executor")
    _, message = run_ranks(save_where_torch_coordinates, 2, str(tmp_path), fresh=True, timeout_s=60)
    assert "call ckpt_fast.install() on every rank" in message


def test_what_is_not_ours_is_left_to_torch(tmp_path: Path) -> None:
    class Derived(dcp.FileSystemWriter):
        pass

    state = {"w": torch.arange(9.0)}
    with ckpt_fast.install(megatron=False):
        dcp.async_save(state, storage_writer=Derived(tmp_path)).result(timeout=60)
    assert not is_ours(tmp_path)
    found = blank(state)
    dcp.load(found, checkpoint_id=tmp_path)
    assert torch.equal(found["w"], state["w"])


def test_a_relative_path_means_the_directory_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    disk = HeldDisk(monkeypatch)
    with ckpt_fast.install(megatron=False):
        future = dcp.async_save({"w": torch.ones(3)}, checkpoint_id="here")
        monkeypatch.chdir("/")
        disk.go.set()
        future.result(timeout=60)
    assert is_ours(tmp_path / "here")


def test_memory_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = WatchedPool()
    monkeypatch.setattr(stage_module, "host_buffers", pool)
    monkeypatch.setattr(dcp_snapshot, "host_buffers", pool)
    with ckpt_fast.install(megatron=False):
        for step in range(3):
            dcp.async_save({"w": torch.ones(1000)}, checkpoint_id=tmp_path / str(step)).result(timeout=60)
            report = ckpt_fast.last_report()
            assert report is not None and report.host_memory_allocated == (0 if step else 4032)
    gc.collect()
    assert pool.peak == 4032 and pool.in_use == 0


@pytest.mark.skipif(not hasattr(staging, "DefaultStager"), reason="torch has no such stager")
def test_staging_is_complete_when_torch_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies from the GPU go on after the call; the future is done when they are, and not before."""
    device = simulated_gpu.SimulatedGpu()
    simulated_gpu.install(monkeypatch, device)
    waiting = threading.Event()
    wait_for = device.wait_for

    def held(event: Any) -> None:
        assert waiting.wait(30)
        wait_for(event)

    monkeypatch.setattr(device, "wait_for", held)
    state = {"large": torch.full((1 << 17,), 1.0), "small": torch.full((10,), 1.0)}
    expected = {name: tensor.clone() for name, tensor in state.items()}
    with ckpt_fast.install(megatron=False):
        stager = staging.DefaultStager(staging.StagingOptions(True, True, True, True))
        response = dcp.async_save(state, checkpoint_id=tmp_path, async_stager=stager)
        assert isinstance(response, state_dict_saver.AsyncSaveResponse)
        assert not response.staging_completion.done() and not response.upload_completion.done()
        waiting.set()
        response.staging_completion.result(timeout=30)
        for tensor in state.values():
            tensor.fill_(2.0)
        response.upload_completion.result(timeout=60)
        stager.synchronize_staging()
        stager.close()
    device.finish()
    found = blank(expected)
    dcp.load(found, checkpoint_id=tmp_path)
    assert differences(expected, found) == []


@pytest.mark.skipif(not hasattr(staging, "DefaultStager"), reason="torch has no such stager")
def test_a_device_that_fails_while_staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = simulated_gpu.SimulatedGpu()
    simulated_gpu.install(monkeypatch, device)

    def failing(event: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(device, "wait_for", failing)
    with ckpt_fast.install(megatron=False):
        response = dcp.async_save(
            {"w": torch.ones(1 << 17)}, checkpoint_id=tmp_path, async_stager=staging.DefaultStager()
        )
        # (torch tells the other future nothing of an error that is there before it looks.)
        with pytest.raises(RuntimeError, match="the device is gone"):
            response.upload_completion.result(timeout=30)
    assert not (tmp_path / ".metadata").exists()


@pytest.mark.parametrize("way", ["thread", "process", "thread, pinned"])
def test_no_save_can_be_cancelled(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that waits for another: the other ranks could not know."""
    disk = HeldDisk(monkeypatch)
    state = {"w": torch.ones(3)}
    with ckpt_fast.install(megatron=False):
        futures = [uploaded(dcp.async_save(state, **options(way, f"{tmp_path}/{step}"))) for step in range(2)]
        assert [future.cancel() for future in futures] == [False, False]
        assert all(future.running() for future in futures)
        disk.go.set()
        for future in futures:
            future.result(timeout=60)
    assert is_ours(tmp_path / "0") and is_ours(tmp_path / "1")


@pytest.mark.skipif(not hasattr(staging, "DefaultStager"), reason="torch has no such stager")
def test_no_staging_can_be_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = simulated_gpu.SimulatedGpu()
    simulated_gpu.install(monkeypatch, device)
    go = threading.Event()
    wait_for = device.wait_for
    monkeypatch.setattr(device, "wait_for", lambda event: go.wait(30) and wait_for(event))
    with ckpt_fast.install(megatron=False):
        stager = staging.DefaultStager(staging.StagingOptions(True, True, True, True))
        future = stager.stage({"w": torch.ones(1 << 17)})
        assert isinstance(future, Future) and not future.cancel() and not future.done()
        go.set()
        assert torch.equal(future.result(timeout=30)["w"], torch.ones(1 << 17))
    device.finish()
