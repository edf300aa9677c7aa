# SPDX-License-Identifier: Apache-2.0
"""What a framework may do after ``install`` that few do: groups, planners, URLs, forks, saves in flight."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ckpt_fast
from tests.doors.dcp.states import blank, differences, training_state
from tests.doors.dcp.test_async import scramble
from tests.doors.installing.test_background import options, uploaded
from tests.doors.installing.test_torch_dcp import is_ours
from tests.helpers import run_ranks
from tests.pipeline.save.test_waves import HeldDisk

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]
takes_stager = pytest.mark.skipif(
    "async_stager" not in inspect.signature(dcp.async_save).parameters, reason="torch takes no stager"
)
BACKGROUND = ["thread", "process"]


# --- Process groups ---------------------------------------------------------------------------------------


def save_in_groups_of_one(rank: int, root: str, way: str) -> bool:
    """Every rank saves with a process group that has no other rank; the last one does so once more."""
    groups = [dist.new_group([each]) for each in range(dist.get_world_size())]
    state = {"rank": torch.full((5,), float(rank))}
    with ckpt_fast.install(megatron=False):
        future = dcp.async_save(state, process_group=groups[rank], **options(way, f"{root}/{rank}"))
        uploaded(future).result(timeout=30)
        if rank == 1:
            future = dcp.async_save(state, process_group=groups[rank], **options(way, f"{root}/again"))
            uploaded(future).result(timeout=30)
    dist.barrier()
    found = {"rank": torch.zeros(5)}
    for path in (str(rank), "again") if rank else (str(rank),):
        dcp.load(found, checkpoint_id=f"{root}/{path}", no_dist=True)
        assert is_ours(f"{root}/{path}") and bool((found["rank"] == rank).all())
    return True


@takes_stager
@pytest.mark.parametrize("way", BACKGROUND)
def test_groups_of_one_rank(way: str, tmp_path: Path) -> None:
    assert run_ranks(save_in_groups_of_one, 2, str(tmp_path), way, timeout_s=60) == [True, True]


def save_in_part_of_the_ranks(rank: int, root: str) -> list[str]:
    """Ranks 1 and 2 of three save together, in the background and not; rank 0 has no part in it."""
    group = dist.new_group([1, 2])
    expected = {"both": torch.arange(7.0), f"of {rank}": torch.full((3,), float(rank))}
    problems = []
    if rank:
        with ckpt_fast.install(megatron=False):
            dcp.save(expected, checkpoint_id=f"{root}/now", process_group=group)
            state = copy.deepcopy(expected)
            future = dcp.async_save(state, checkpoint_id=f"{root}/later", process_group=group)
            scramble(state)
            uploaded(future).result(timeout=60)
        for path in ("now", "later"):
            found = blank(expected)
            dcp.load(found, checkpoint_id=f"{root}/{path}", process_group=group)
            problems += differences(expected, found) + ([] if is_ours(f"{root}/{path}") else [path])
    dist.barrier()
    return problems


def test_part_of_the_ranks(tmp_path: Path) -> None:
    assert run_ranks(save_in_part_of_the_ranks, 3, str(tmp_path)) == [[]] * 3


def save_with_another_coordinator(rank: int, root: str) -> list[str]:
    expected = {"both": torch.arange(7.0), f"of {rank}": torch.full((3,), float(rank)), "step": 3}
    with ckpt_fast.install(megatron=False):
        dcp.save_state_dict(expected, dcp.FileSystemWriter(root), coordinator_rank=1)
        found = blank(expected)
        dcp.load_state_dict(found, dcp.FileSystemReader(root), coordinator_rank=1)
    problems = differences(expected, found) + ([] if is_ours(root) else ["not ours"])
    found = blank(expected)
    dcp.load(found, checkpoint_id=root)
    return problems + differences(expected, found)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_another_coordinator(tmp_path: Path) -> None:
    assert run_ranks(save_with_another_coordinator, 2, str(tmp_path)) == [[], []]


# --- Planners ---------------------------------------------------------------------------------------------


class KeepsNoState(dcp.DefaultSavePlanner):
    """A planner that has something else under the name by which torch's planner has its state dict."""

    def set_up_planner(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        super().set_up_planner(state_dict, *args, **kwargs)
        self.tensors, self.state_dict = self.state_dict, None  # type: ignore[assignment]

    def create_local_plan(self) -> Any:
        self.state_dict = self.tensors
        plan = super().create_local_plan()
        self.state_dict = None  # type: ignore[assignment]
        return plan

    def lookup_object(self, index: Any) -> Any:
        return self.tensors[index.fqn]


def test_a_planner_that_keeps_no_state_dict(tmp_path: Path) -> None:
    expected = {"a": torch.arange(3.0), "b": torch.arange(4.0)}
    with ckpt_fast.install(megatron=False):
        dcp.save(expected, checkpoint_id=tmp_path, planner=KeepsNoState())
    assert is_ours(tmp_path)
    found = blank(expected)
    dcp.load(found, checkpoint_id=tmp_path)
    assert differences(expected, found) == []


def test_a_writer_that_is_told_later_not_to_overwrite(tmp_path: Path) -> None:
    with ckpt_fast.install(megatron=False):
        writer = dcp.FileSystemWriter(tmp_path)
        writer.overwrite = False
        dcp.save({"w": torch.ones(3)}, storage_writer=writer)
        with pytest.raises(CheckpointException, match="overwrite is False"):
            dcp.save({"w": torch.ones(3)}, storage_writer=writer)


# --- What stays torch's -----------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["file://{}", "memory://ckpt_fast-test{}"])
def test_urls_are_left_to_torch(url: str, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    expected, place = training_state(), url.format(tmp_path / "checkpoint")
    with ckpt_fast.install(megatron=False):
        dcp.save(expected, checkpoint_id=place)
        dcp.async_save(expected, checkpoint_id=place + "-later").result(timeout=60)
        for path in (place, place + "-later"):
            found = blank(expected)
            dcp.load(found, checkpoint_id=path)
            assert differences(expected, found) == []
    if url.startswith("file"):
        assert not is_ours(tmp_path / "checkpoint") and not is_ours(tmp_path / "checkpoint-later")
    assert not any("ckpt_fast-test" in name or ":" in name for name in os.listdir())


def test_a_path_that_torch_leaves_to_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch regards a path as its own only if it may write somewhere above it."""
    pytest.importorskip("fsspec")
    expected = training_state()
    with ckpt_fast.install(megatron=False):
        dcp.save(expected, checkpoint_id=tmp_path / "x")
        monkeypatch.setattr(os, "access", lambda *_, **__: False)
        for way in (
            {"checkpoint_id": str(tmp_path / "x")},
            {"storage_reader": dcp.FileSystemReader(tmp_path / "x")},
        ):
            found = blank(expected)
            dcp.load(found, **way)
            assert differences(expected, found) == []


def save_for_hugging_face(rank: int, root: str) -> list[bool]:
    """Save sharded tensors, which rank 0 consolidates, with ckpt_fast installed and without."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected = torch.arange(12.0).view(6, 2)
    loaded = []
    for installed in (False, True):
        place = f"{root}/{installed}"
        with ckpt_fast.install(megatron=False, torch_dcp=installed):
            writer = dcp.HuggingFaceStorageWriter(place, save_distributed=True, enable_consolidation=True)
            dcp.save({"w": distribute_tensor(expected, mesh, [Shard(0)])}, storage_writer=writer)
            dist.barrier()
            found = {"w": distribute_tensor(torch.zeros(6, 2), mesh, [Shard(0)])}
            dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(place))
        loaded.append(torch.equal(found["w"].full_tensor(), expected))
    return loaded


@pytest.mark.skipif(
    "enable_consolidation" not in inspect.signature(getattr(dcp, "HuggingFaceStorageWriter", id)).parameters,
    reason="torch does not consolidate",
)
def test_hugging_face_storage_is_left_to_torch(tmp_path: Path) -> None:
    """Its files are the same, but for the order of their notes, and so are those made by consolidation."""
    pytest.importorskip("safetensors")
    assert run_ranks(save_for_hugging_face, 2, str(tmp_path)) == [[True, True]] * 2
    stock, ours = (
        {str(path.relative_to(root)): parsed(path) for path in root.rglob("*.safetensors")}
        for root in (tmp_path / "False", tmp_path / "True")
    )
    assert len(stock) == 3 and stock == ours


def parsed(path: Path) -> tuple[Any, bytes]:
    """Return the header and the tensors of a file of safetensors."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


class Derived(dcp.FileSystemWriter):
    """A framework's own storage."""


def save_with_derived_storage(rank: int, root: str) -> list[str]:
    """Save with torch's own process, which gets a copy of ours of the state, several times."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    problems = []
    with ckpt_fast.install(megatron=False):
        for step in range(3):
            state = {
                "w": torch.full((1000,), float(step)),
                "rank": {str(rank): torch.full((9,), float(rank))},
            }
            expected = copy.deepcopy(state)
            way = options("process", f"{root}/{step}")
            future = dcp.async_save(state, **way, storage_writer=Derived(f"{root}/{step}"))
            scramble(state)
            uploaded(future).result(timeout=100)
            dist.barrier()
            found = blank(expected)
            dcp.load(found, checkpoint_id=f"{root}/{step}")
            problems += differences(expected, found) + (["ours"] if is_ours(f"{root}/{step}") else [])
        # The memory that torch's process got is its own: ours can be used for another save.
        expected = {"w": torch.full((1000,), 7.0)}
        dcp.async_save(copy.deepcopy(expected), checkpoint_id=f"{root}/ours").result(timeout=60)
        gc.collect()
    found = blank(expected)
    dcp.load(found, checkpoint_id=f"{root}/ours")
    return problems + differences(expected, found)


@takes_stager
def test_torchs_process_with_a_derived_class(tmp_path: Path) -> None:
    assert run_ranks(save_with_derived_storage, 2, str(tmp_path), fresh=True) == [[], []]


# --- Several saves at once, and saves in flight ------------------------------------------------------------


@takes_stager
@pytest.mark.parametrize("way", ["thread", "process", "process, pinned", "thread, writer"])
@pytest.mark.parametrize("directory", ["{}", "same"])
def test_saves_without_waiting(
    way: str, directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = HeldDisk(monkeypatch)
    state = {"w": torch.zeros(1000), "step": torch.tensor(0)}
    with ckpt_fast.install(megatron=False):
        futures = []
        for step in range(3):
            state["w"].fill_(step)
            state["step"].fill_(step)
            path = tmp_path / directory.format(step)
            futures.append(uploaded(dcp.async_save(state, **options(way, str(path)))))
        assert not any(future.done() for future in futures)
        disk.go.set()
        for future in futures:
            future.result(timeout=60)
    for step in range(3) if directory == "{}" else [2]:
        found = blank(state)
        dcp.load(found, checkpoint_id=tmp_path / directory.format(step))
        assert found["step"] == step and bool((found["w"] == step).all())


@takes_stager
def test_one_writer_and_one_stager_for_all_saves(tmp_path: Path) -> None:
    with ckpt_fast.install(megatron=False):
        writer, stager = dcp.FileSystemWriter(tmp_path / "first"), default_stager()
        futures = []
        for step in range(3):
            state = {"w": torch.full((1000,), float(step))}
            path = tmp_path / str(step)
            response = dcp.async_save(state, checkpoint_id=path, storage_writer=writer, async_stager=stager)
            futures.append(uploaded(response))
        for future in futures:
            future.result(timeout=60)
    for step in range(3):
        found = {"w": torch.zeros(1000)}
        dcp.load(found, checkpoint_id=tmp_path / str(step))
        assert is_ours(tmp_path / str(step)) and bool((found["w"] == step).all())


def default_stager() -> Any:
    from torch.distributed.checkpoint import staging

    return staging.DefaultStager()


@pytest.mark.parametrize("with_writer", [False, True])
def test_uninstalled_with_a_save_in_flight(
    with_writer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = HeldDisk(monkeypatch)
    expected = training_state()
    ckpt_fast.install(megatron=False)
    writer = {"storage_writer": dcp.FileSystemWriter(tmp_path / "1")} if with_writer else {}
    futures = [
        dcp.async_save(training_state(), checkpoint_id=tmp_path / str(number), **writer) for number in (1, 2)
    ]
    ckpt_fast.uninstall()
    dcp.save(expected, checkpoint_id=tmp_path / "stock")
    disk.go.set()
    for future in futures:
        future.result(timeout=60)
    assert [is_ours(tmp_path / name) for name in ("1", "2", "stock")] == [True, True, False]
    for name in ("1", "2"):
        found = blank(expected)
        dcp.load(found, checkpoint_id=tmp_path / name)
        assert differences(expected, found) == []


def test_a_child_process_saves_in_the_background(tmp_path: Path) -> None:
    """After a fork only the calling thread is there; the one that saved for the parent is not."""
    state = {"w": torch.arange(5.0)}
    with ckpt_fast.install(megatron=False):
        dcp.async_save(state, checkpoint_id=tmp_path / "parent").result(timeout=60)
        child = os.fork()
        if not child:
            code = 1
            try:
                dcp.async_save(state, checkpoint_id=tmp_path / "child").result(timeout=20)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0 and is_ours(tmp_path / "child")


# --- Errors -----------------------------------------------------------------------------------------------


class Failing:
    """A part of the state that cannot be read."""

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("no state today")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError


def test_a_state_dict_that_fails(tmp_path: Path) -> None:
    """The error is the caller's, at once; nothing is left of the save."""
    threads = threading.active_count()
    with ckpt_fast.install(megatron=False):
        for save in (dcp.save, dcp.async_save):
            with pytest.raises(RuntimeError, match="no state today"):
                save({"a": torch.ones(3), "b": Failing()}, checkpoint_id=tmp_path / "x")
        assert not (tmp_path / "x").exists() and threading.active_count() <= threads
        dcp.async_save({"a": torch.ones(3)}, checkpoint_id=tmp_path / "x").result(timeout=60)
    assert is_ours(tmp_path / "x")


def fail_everywhere(rank: int, root: str) -> bool:
    with ckpt_fast.install(megatron=False):
        with pytest.raises(RuntimeError, match="no state today"):
            dcp.async_save({"b": Failing()}, checkpoint_id=root)
        dcp.async_save({"a": torch.ones(3)}, checkpoint_id=root).result(timeout=60)
    return is_ours(root)


def test_a_state_dict_that_fails_on_all_ranks(tmp_path: Path) -> None:
    assert run_ranks(fail_everywhere, 2, str(tmp_path)) == [True, True]


def test_a_callback_that_fails_ends_no_other_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's error is no Exception, which is all that futures keep to themselves."""
    (tmp_path / "file").touch()
    disk, places = HeldDisk(monkeypatch), [tmp_path / "first", tmp_path / "file" / "in"]
    with ckpt_fast.install(megatron=False):
        first, failing = (uploaded(dcp.async_save({"w": torch.ones(3)}, checkpoint_id=at)) for at in places)
        failing.add_done_callback(lambda future: future.result())
        disk.go.set()
        first.result(timeout=60)
        uploaded(dcp.async_save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "run")).result(timeout=60)
    assert is_ours(tmp_path / "run")
