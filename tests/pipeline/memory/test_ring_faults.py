# SPDX-License-Identifier: Apache-2.0
"""Copies through a ring of host memory that fail: nobody waits for ever, and memory in use is kept."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast import native
from ckpt_fast.errors import CheckpointError, CheckpointWriteError
from ckpt_fast.native import fallback, fallback_files
from ckpt_fast.pipeline.memory.device_copy import DeviceCopies
from ckpt_fast.pipeline.save.program import ProgramCache
from tests.pipeline.layouts import random_tensor, whole
from tests.pipeline.memory.rings import WatchedPool, contents, expected, on_gpu, small_ring, state
from tests.pipeline.memory.simulated_gpu import SimulatedGpu
from tests.saves import save

pytestmark = pytest.mark.usefixtures("no_fsync")
ILLEGAL = "CUDA error: an illegal memory access was encountered"


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[WatchedPool]:
    yield from small_ring(monkeypatch)


def copies_under_way(simulated: SimulatedGpu) -> int:
    return sum(callable(work) for stream in (simulated.current, simulated.side) for work in stream.work)


@pytest.mark.parametrize("call", ["copy_to_host", "gather", "wait_for"])
@pytest.mark.parametrize("number", [1, 2, 9, 18])
def test_memory_stays_in_use_until_all_copies_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: WatchedPool, call: str, number: int
) -> None:
    """A call fails behind copies that are under way, of its own batch and of the one before."""
    simulated = on_gpu(monkeypatch)
    given_back: list[int] = []
    give_back, called, real = pool.give_back, itertools.count(), getattr(simulated, call)

    def failing(*arguments: Any) -> Any:
        if next(called) != number:
            return real(*arguments)
        if call == "copy_to_host":  # the first of several is on its way
            tensors, slots, stream = arguments
            real(tensors[:1], slots[:1], stream)
        raise RuntimeError(ILLEGAL)

    monkeypatch.setattr(simulated, call, failing)
    monkeypatch.setattr(
        pool,
        "give_back",
        lambda *a, **k: (given_back.append(copies_under_way(simulated)), give_back(*a, **k)),
    )
    shards = [
        whole(f"w{n}", random_tensor((size,), torch.uint8, n)) for n, size in enumerate([100, 3000] * 60)
    ]
    with pytest.raises(CheckpointError, match="an illegal memory access"):
        save(shards, str(tmp_path))
    assert given_back == [0]


def test_all_devices_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of one says nothing of the copies of another."""
    waited: list[object] = []

    class Device:
        def wait_for(self, event: object) -> None:
            waited.append(event)
            raise RuntimeError(f"device {event}")

    copies = DeviceCopies()
    copies._events = [(Device(), 0), (Device(), 1), (Device(), 2)]  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="device"):
        copies.wait()
    assert sorted(map(str, waited)) == ["0", "1", "2"]


def test_a_program_whose_copies_cannot_be_ordered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: WatchedPool
) -> None:
    """Its memory is given back, although somebody keeps the error."""
    simulated, programs = on_gpu(monkeypatch), ProgramCache()
    save(state([30_000]), str(tmp_path / "0"), programs=programs)

    def failing(stream: object) -> None:
        raise RuntimeError(ILLEGAL)

    monkeypatch.setattr(simulated, "record", failing)
    with pytest.raises(CheckpointError, match="an illegal memory access") as kept:
        save(state([30_000]), str(tmp_path / "1"), programs=programs)
    gc.collect()
    assert pool.used_nbytes == 0 and kept.value is not None


def two_files() -> dict[str, Any]:
    return {"shards": state([40_000, 40_000, 40_000, 40_000]), "writers": 2}


def test_the_twin_ends_when_one_of_its_files_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of the other file waits for bytes that only come once the failed one's are written."""
    on_gpu(monkeypatch)
    monkeypatch.setenv("CKPT_FAST_RETRIES", "0")
    write_fully = fallback._write_fully

    def failing(fd: int, image: bytearray, offset: int, path: str) -> None:
        if "__0_1" in path and offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        write_fully(fd, image, offset, path)

    monkeypatch.setattr(fallback, "_write_fully", failing)
    with native.using("fallback"), pytest.raises(CheckpointWriteError, match="No space left"):
        save(directory=str(tmp_path), **two_files())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [1, 2])
def test_the_twin_ends_without_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """One thread cannot write files one after the other that come side by side."""

    class Limited(ThreadPoolExecutor):
        def _adjust_thread_count(self) -> None:
            if len(self._threads) + 1 >= number:
                raise RuntimeError("can't start new thread")
            super()._adjust_thread_count()  # type: ignore[misc]

    on_gpu(monkeypatch)
    monkeypatch.setattr(fallback_files, "ThreadPoolExecutor", Limited)
    with native.using("fallback"), pytest.raises(CheckpointError, match="can't start new thread"):
        save(directory=str(tmp_path), **two_files())
    assert not list(tmp_path.glob("*.distcp"))


@pytest.mark.usefixtures("native_impl")
def test_without_another_thread_all_is_copied_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: WatchedPool
) -> None:
    """While the process ends, it starts none."""
    shards, programs = state([100_000]), ProgramCache()
    wanted = expected(shards, tmp_path / "in place")
    on_gpu(monkeypatch)
    save(shards, str(tmp_path / "ring"), programs=programs)
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name in ("ckpt_fast-write", "ckpt_fast-try"):
            raise RuntimeError("can't create new thread at interpreter shutdown")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    for name, kept in (("planned", None), ("program", programs)):
        pool.asked.clear()
        save(shards, str(tmp_path / name), programs=kept)
        assert contents(tmp_path / name) == wanted
        assert len(pool.asked) == 1 and pool.asked[0] > 400_000
