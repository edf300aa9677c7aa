# SPDX-License-Identifier: Apache-2.0
"""``async_save`` on one rank: what its future promises, and what becomes of a save that nobody waits for."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_fast
from ckpt_fast.errors import AsyncSaveError, CheckpointWriteError
from ckpt_fast.jobs import untold
from ckpt_fast.pipeline.save import waves as waves_module
from tests.doors.dcp.states import blank, differences, odd_tensors, training_state
from tests.doors.dcp.test_async import scramble
from tests.pipeline.save.test_waves import HeldDisk


def loaded(directory: Path, like: Any) -> Any:
    found = blank(like)
    ckpt_fast.load(found, directory)
    return found


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> HeldDisk:
    """Return a disk on which nothing is written until it is released."""
    return HeldDisk(monkeypatch)


def test_values_as_of_the_call(tmp_path: Path, disk: HeldDisk) -> None:
    state = {**training_state(), "odd": odd_tensors()}
    future = ckpt_fast.async_save(state, tmp_path)
    scramble(state)
    del state
    gc.collect()
    assert not future.done()
    disk.go.set()
    assert future.result().directory == str(tmp_path)
    expected = {**training_state(), "odd": odd_tensors()}
    assert differences(expected, loaded(tmp_path, expected)) == []


def test_the_future_is_one_of_pythons(tmp_path: Path, disk: HeldDisk) -> None:
    future = ckpt_fast.async_save({"w": torch.ones(3)}, tmp_path)
    called = threading.Event()
    future.add_done_callback(lambda _: called.set())
    assert isinstance(future, Future) and future.running() and not future.cancel()
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)
    ckpt_fast.wait_staged()
    assert not (tmp_path / ".metadata").exists()
    disk.go.set()
    assert called.wait(20)
    assert (tmp_path / ".metadata").exists()
    assert future.exception() is None and future.result() is ckpt_fast.last_report()


def test_a_save_to_the_same_directory_waits(tmp_path: Path, disk: HeldDisk) -> None:
    first = ckpt_fast.async_save({"w": torch.zeros(3)}, tmp_path / "a")
    threading.Timer(0.2, disk.go.set).start()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    second = ckpt_fast.async_save({"w": torch.ones(3)}, tmp_path / "link")
    assert first.done()
    second.result()
    ckpt_fast.save({"w": torch.full((3,), 2.0)}, tmp_path / "a")
    assert loaded(tmp_path / "a", {"w": torch.zeros(3)})["w"].tolist() == [2.0] * 3


def test_others_do_not_wait(tmp_path: Path, disk: HeldDisk) -> None:
    futures = [ckpt_fast.async_save({"w": torch.full((3,), n)}, tmp_path / str(n)) for n in range(3)]
    assert not any(future.done() for future in futures)
    disk.go.set()
    for number, future in enumerate(futures):
        future.result()
        assert loaded(tmp_path / str(number), {"w": torch.zeros(3).long()})["w"].tolist() == [number] * 3


def test_an_error_is_the_futures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise CheckpointWriteError("the disk is broken")

    ckpt_fast.save({"w": torch.ones(3)}, tmp_path)
    with monkeypatch.context() as patched, caplog.at_level(logging.ERROR):
        patched.setattr(waves_module, "write", fail)
        future = ckpt_fast.async_save({"w": torch.zeros(3)}, tmp_path)
        wait([future])
        assert str(tmp_path) in untold._failures
        with pytest.raises(
            AsyncSaveError, match=f"the save to {tmp_path} in the background failed: rank 0: the"
        ):
            future.result()
    assert caplog.text.count("the disk is broken") == 1
    assert isinstance(future.exception(), AsyncSaveError) and str(tmp_path) not in untold._failures
    assert loaded(tmp_path, {"w": torch.zeros(3)})["w"].tolist() == [1.0] * 3
    ckpt_fast.async_save({"w": torch.zeros(3)}, tmp_path).result()
    assert loaded(tmp_path, {"w": torch.ones(3)})["w"].tolist() == [0.0] * 3


@pytest.mark.slow
def test_the_interpreter_waits_for_saves(tmp_path: Path) -> None:
    code = f"""
import sys, torch, torch.distributed as dist, ckpt_fast
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
for n in range(3):
    ckpt_fast.async_save({{"w": torch.full((100_000,), n), f"own.{{rank}}": rank}}, f"{tmp_path}/{{n}}")
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    processes = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    for number in range(3):
        found = loaded(tmp_path / str(number), {"w": torch.zeros(100_000).long(), "own.1": None})
        assert found["w"].eq(number).all() and found["own.1"] == 1
