# SPDX-License-Identifier: Apache-2.0
"""Threads of a rank work on the rank's GPU: on another one, they would take memory for a context."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ckpt_fast.jobs.worker import Worker
from ckpt_fast.pipeline.memory.host_buffer import HostBufferPool
from ckpt_fast.ranks import devices
from tests.pipeline.layouts import random_tensor, whole
from tests.saves import save


@pytest.fixture
def made_current(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Of a process whose main thread works on GPU 3: which thread made which GPU current."""
    made: list[tuple[str, int]] = []
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        current_device=lambda: 3,
        set_device=lambda device: made.append((threading.current_thread().name, device)),
    )
    monkeypatch.setattr(devices, "torch", SimpleNamespace(cuda=cuda))
    return made


@pytest.mark.usefixtures("no_fsync")
def test_a_save(tmp_path: Path, made_current: list[tuple[str, int]]) -> None:
    save([whole(f"w{n}", random_tensor((100, 90), torch.float32, n).t()) for n in range(30)], str(tmp_path))
    assert made_current == [("ckpt_fast-write", 3)]


def test_a_worker(made_current: list[tuple[str, int]]) -> None:
    seen: list[int] = []
    worker = Worker("ckpt_fast-test")
    worker.submit(lambda: seen.append(len(made_current)))
    worker.close()
    assert worker.wait(10) and made_current == [("ckpt_fast-test", 3)] and seen == [1]


def test_memory_that_is_reserved(made_current: list[tuple[str, int]]) -> None:
    HostBufferPool().reserve(4096).join()
    assert made_current == [("ckpt_fast-reserve", 3)]


def test_a_gpu_that_has_failed(monkeypatch: pytest.MonkeyPatch, made_current: list[tuple[str, int]]) -> None:
    """Whoever needs it gets the error."""

    def failing(device: int) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(devices.torch.cuda, "set_device", failing)
    assert devices.on_this_gpu(lambda a, b: a + b)(1, b=2) == 3


def test_no_gpu_is_touched_if_none_is_in_use(
    monkeypatch: pytest.MonkeyPatch, made_current: list[tuple[str, int]]
) -> None:
    monkeypatch.setattr(devices.torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(devices.torch.cuda, "current_device", lambda: pytest.fail("that makes a context"))
    devices.on_this_gpu(lambda: None)()
    assert made_current == []
