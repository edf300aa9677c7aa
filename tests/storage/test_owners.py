# SPDX-License-Identifier: Apache-2.0
"""A directory has one save at a time."""

from __future__ import annotations

import errno
import gc
import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ckpt_fast import FastStorageReader, FastStorageWriter, native
from ckpt_fast.errors import CheckpointError, CheckpointWriteError
from ckpt_fast.jobs.background import SaveHandle
from ckpt_fast.pipeline.save.save import Save
from ckpt_fast.storage import owners
from tests.pipeline.layouts import same, whole
from tests.pipeline.save.test_save import FILES, loaded
from tests.pipeline.save.test_waves import HeldDisk
from tests.saves import new_save, save

pytestmark = [
    pytest.mark.usefixtures("no_fsync"),
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
]


class Owner:
    over = False

    def is_over(self) -> bool:
        return self.over


def test_until_it_is_over(tmp_path: Path) -> None:
    first, second = Owner(), Owner()
    owners.occupy(str(tmp_path / "a"), first)
    owners.occupy(str(tmp_path / "a"), first)
    owners.occupy(str(tmp_path / "b"), second)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(CheckpointWriteError, match="is not over: this one would destroy it") as caught:
        owners.occupy(str(tmp_path / "link"), second, wait_s=0.1)
    assert caught.value.errno == errno.EBUSY
    threading.Timer(0.2, setattr, (first, "over", True)).start()
    owners.occupy(str(tmp_path / "a"), second, wait_s=20)


def test_what_nobody_holds_any_more_is_over(tmp_path: Path) -> None:
    owner = Owner()
    owners.occupy(str(tmp_path), owner)
    del owner
    owners.occupy(str(tmp_path), Owner())


def test_what_is_known_of_directories_is_bounded(tmp_path: Path) -> None:
    """A run saves to a new one each time."""
    at_work = Owner()
    owners.occupy(str(tmp_path / "at work"), at_work)
    for number in range(5000):
        owners.occupy(f"{tmp_path}/{number}", Owner())
    with owners.removing(str(tmp_path / "1")) as is_free:
        assert is_free
    assert max(len(owners._owners), len(owners._begun)) < 2000
    assert owners.is_occupied(str(tmp_path / "at work"))


def test_a_directory_that_is_saved_to_again_is_noticed(tmp_path: Path) -> None:
    """Even if other saves have let this process forget that it knew it."""
    before = owners.newest_save(str(tmp_path))
    owners.occupy(str(tmp_path), Owner())
    first = owners.newest_save(str(tmp_path))
    owners.occupy(str(tmp_path), Owner())
    second = owners.newest_save(str(tmp_path))
    for number in range(5000):
        owners.occupy(f"{tmp_path}/{number}", Owner())
    owners.occupy(str(tmp_path), Owner())
    assert len({before, first, second, owners.newest_save(str(tmp_path))}) == 4


def staged(directory: Path, value: float) -> Save:
    job = new_save([whole("w", torch.full((4, 8), value))], os.fspath(directory), snapshot=True, **FILES)
    job.stage()
    return job


def values(directory: Path) -> torch.Tensor:
    return loaded(directory, "w", torch.zeros(4, 8))


def test_a_save_that_is_not_committed_is_not_destroyed(tmp_path: Path) -> None:
    first = staged(tmp_path, 1.0)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="rank 0: another save of this process to"):
            staged(tmp_path, 2.0)
    first.write()
    first.commit()
    assert same(values(tmp_path), torch.full((4, 8), 1.0))
    save([whole("w", torch.full((4, 8), 3.0))], str(tmp_path), **FILES)
    assert same(values(tmp_path), torch.full((4, 8), 3.0))


@pytest.mark.parametrize("how", ["cancelled", "abandoned", "dropped", "failed"])
def test_a_save_that_will_not_be_committed_is_over(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = staged(tmp_path, 1.0)
    if how == "cancelled":
        first.cancel()
    elif how == "abandoned":
        handle = SaveHandle(first)
        handle.start()
        assert handle.abandon()
    elif how == "dropped":
        assert first.wait(20)
        del first
        gc.collect()
    else:
        first.write()
        monkeypatch.setattr(Save, "_require_all_present", lambda *_: 1 / 0)
        with pytest.raises(CheckpointError, match="ZeroDivisionError"):
            first.commit()
        monkeypatch.undo()
    save([whole("w", torch.full((4, 8), 2.0))], str(tmp_path), **FILES)
    assert same(values(tmp_path), torch.full((4, 8), 2.0))


def test_a_save_that_is_dropped_while_it_is_written_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a signal between two calls: nobody could commit it, so its thread must stop."""
    disk = HeldDisk(monkeypatch)
    first = staged(tmp_path, 1.0)
    thread = first._worker
    del first
    second = staged(tmp_path, 2.0)
    disk.go.set()
    assert thread.wait(20)
    second.write()
    second.commit()
    assert same(values(tmp_path), torch.full((4, 8), 2.0))
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.usefixtures("native_impl")
def test_a_rename_that_hangs_keeps_the_directory() -> None:
    """Whenever it returns, the file gets its name and would destroy a save started in the meantime."""
    hold = owners.Hold()
    hold.progress = progress = native.Progress()
    assert progress.begin_rename()
    progress.stop()
    hold.let_go()
    assert not hold.is_over()
    progress.end_rename()
    assert hold.is_over()


def test_saves_in_torchs_threads_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = HeldDisk(monkeypatch)
    futures = [
        dcp.async_save({"w": torch.full((50,), float(n))}, storage_writer=FastStorageWriter(tmp_path))
        for n in range(4)
    ]
    disk.go.set()
    found = [future.result(timeout=60).storage_meta.save_id for future in futures]
    assert len(set(found)) == 4
    into = {"w": torch.zeros(50)}
    dcp.load(into, storage_reader=FastStorageReader(tmp_path))
    assert into["w"].unique().numel() == 1
    dcp.save({"w": torch.full((50,), 9.0)}, storage_writer=FastStorageWriter(tmp_path))
    dcp.load(into, storage_reader=FastStorageReader(tmp_path))
    assert (into["w"] == 9).all()


def test_a_save_of_torchs_that_failed_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does not tell the writer that another rank failed; the thread's next save does."""
    monkeypatch.setenv("CKPT_FAST_TIMEOUT", "1")

    def fail(*_: object, **__: object) -> None:
        raise ValueError("on another rank")

    with monkeypatch.context() as patch:
        patch.setattr(FastStorageWriter, "finish", fail)
        with pytest.raises(CheckpointException, match="on another rank"):
            dcp.save({"w": torch.zeros(5)}, storage_writer=FastStorageWriter(tmp_path))
    dcp.async_save({"w": torch.ones(5)}, storage_writer=FastStorageWriter(tmp_path)).result()
    dcp.save({"w": torch.ones(5)}, storage_writer=FastStorageWriter(tmp_path))
