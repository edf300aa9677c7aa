# SPDX-License-Identifier: Apache-2.0
"""Errors of the torch DCP door: inside torch's, of our kinds, in our words."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

from ckpt_fast import FastStorageReader, FastStorageWriter
from tests.doors.dcp import reads
from tests.helpers import run_ranks


class Emptying(DefaultLoadPlanner):
    """Loads into the meta device; torch's own planner makes real tensors of those it is given there."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return super().resolve_tensor(read_item).to("meta")


def failures_of(action: Callable[[], Any]) -> dict[int, tuple[str, str]]:
    """Return kind and text of what torch's exception says of each rank."""
    try:
        action()
    except CheckpointException as error:
        return {rank: (type(each).__name__, str(each)) for rank, (each, _) in error.failures.items()}
    return {}


def use_what_is_not_there(rank: int, root: str) -> list[dict[int, tuple[str, str]]]:
    def load(directory: str) -> dict[int, tuple[str, str]]:
        return failures_of(
            lambda: dcp.load({"w": torch.ones(4)}, storage_reader=FastStorageReader(directory))
        )

    directory = os.path.join(root, "x")
    found = [load(directory)]
    dcp.save({"w": torch.ones(4)}, storage_writer=FastStorageWriter(directory))
    refused = FastStorageWriter(directory, overwrite=False)
    found.append(failures_of(lambda: dcp.save({"w": torch.ones(4)}, storage_writer=refused)))
    if rank == 0:
        Path(directory, ".metadata").write_bytes(b"no metadata")
    if dist.is_initialized():
        dist.barrier()
    return [*found, load(directory)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_errors_arrive_inside_torchs(tmp_path: Path, world_size: int) -> None:
    for found in run_ranks(use_what_is_not_there, world_size, str(tmp_path)):
        missing, overwritten, damaged = found
        assert {kind for kind, _ in missing.values()} == {"CheckpointNotFoundError"}
        assert missing.keys() == damaged.keys() == set(range(world_size))
        assert overwritten[0][0] == "CheckpointWriteError"
        assert {kind for kind, _ in damaged.values()} == {"CheckpointCorruptError"}
        for texts in (missing, damaged):
            assert all("load an earlier iteration" in text for _, text in texts.values())
            assert not any("metadata is None" in text for _, text in texts.values())


def test_without_ranks(tmp_path: Path) -> None:
    missing, overwritten, damaged = use_what_is_not_there(0, str(tmp_path))
    assert [each[0][0] for each in (missing, overwritten, damaged)] == [
        "CheckpointNotFoundError",
        "CheckpointWriteError",
        "CheckpointCorruptError",
    ]


class Unknown:
    """Of no kind that is read."""


def test_a_refused_object_is_explained_in_our_words(tmp_path: Path) -> None:
    dcp.save({"share": Unknown()}, storage_writer=dcp.FileSystemWriter(tmp_path))
    with pytest.raises(CheckpointException) as raised:
        dcp.load({"share": 0}, storage_reader=FastStorageReader(tmp_path))
    (error, _) = raised.value.failures[0]
    assert "share in" in str(error) and "CKPT_FAST_ALLOW_PICKLE=1" in str(error)
    assert "test_refusals.Unknown" in str(error) and "allow_class" in str(error)
    for text in (str(error), str(raised.value)):
        assert "weights_only" not in text


def test_the_meta_device_is_refused_by_name(tmp_path: Path) -> None:
    empty = {"w": torch.empty(4, device="meta")}
    found = failures_of(lambda: dcp.save(empty, storage_writer=FastStorageWriter(tmp_path / "0")))
    assert "w is on the meta device and has no values to save" in found[0][1]
    dcp.save({"w": torch.ones(4)}, storage_writer=FastStorageWriter(tmp_path / "1"))
    reader = FastStorageReader(tmp_path / "1")
    found = failures_of(lambda: dcp.load({"w": torch.ones(4)}, storage_reader=reader, planner=Emptying()))
    assert "w cannot be loaded into a tensor on the meta device" in found[0][1]


def test_a_freed_storage_is_refused_by_name(tmp_path: Path) -> None:
    freed = {"w": torch.ones(4)}
    dcp.save(freed, storage_writer=FastStorageWriter(tmp_path / "0"))
    freed["w"].untyped_storage().resize_(0)
    found = failures_of(lambda: dcp.save(freed, storage_writer=FastStorageWriter(tmp_path / "1")))
    assert "w has 4 elements, but its storage has only 0 bytes" in found[0][1]


@pytest.mark.parametrize("by_id", [False, True])
def test_a_relative_path_keeps_its_meaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_id: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    moved = threading.Event()
    path, identity = ("other", "x") if by_id else ("x", None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        writer = FastStorageWriter(path)
        with monkeypatch.context() as patched:
            begun = FastStorageWriter.reset

            def reset(self: FastStorageWriter, checkpoint_id: Any = None) -> None:
                if threading.current_thread() is not threading.main_thread():
                    moved.wait()
                begun(self, checkpoint_id)

            patched.setattr(FastStorageWriter, "reset", reset)
            future = dcp.async_save({"w": torch.ones(4)}, checkpoint_id=identity, storage_writer=writer)
            monkeypatch.chdir(tmp_path / "elsewhere")
            moved.set()
        future.result()  # type: ignore[union-attr]
    finally:
        dist.destroy_process_group()
    assert (tmp_path / "x" / ".metadata").exists() and os.listdir() == []

    monkeypatch.chdir(tmp_path)
    reader = FastStorageReader("x")
    monkeypatch.chdir(tmp_path / "elsewhere")
    state = {"w": torch.zeros(4)}
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert state["w"].tolist() == [1.0] * 4


# --- a refused load has touched nothing --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("door", "wrong"),
    [
        *((door, wrong) for door in ("direct", "planned", "torch") for wrong in ("a shape", "a name")),
        # Between its plan and its reading, torch lets no rank tell the others.
        *((door, "a piece") for door in ("direct", "planned")),
    ],
)
def test_what_one_rank_cannot_load_changes_nothing_on_any(tmp_path: Path, door: str, wrong: str) -> None:
    run_ranks(reads.save_stock, 2, str(tmp_path))
    if wrong == "a piece":  # of which rank 1 wants all, and rank 0 nothing
        reads.edit(str(tmp_path), lambda metadata: reads.lose(metadata, "rows", 1))
    kind = "CheckpointCorruptError: rank 1" if wrong == "a piece" else "CheckpointMismatchError: rank 1"
    for error, changed in run_ranks(reads.load_what_one_rank_cannot, 2, str(tmp_path), door, wrong):
        assert changed == []
        assert error.startswith(kind if door != "torch" else "CheckpointException"), error
