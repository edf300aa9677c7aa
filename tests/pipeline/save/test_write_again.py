# SPDX-License-Identifier: Apache-2.0
"""A write that failed for a possibly transient reason is retried from the buffers."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast import native
from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.format.types import TensorRequest, TensorShard
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors
from ckpt_fast.pipeline.save import write as write_module
from tests.saves import save

TENSOR = torch.arange(5000.0)


def fail_writes(monkeypatch: pytest.MonkeyPatch, code: int, times: int) -> list[int]:
    """Make the next ``times`` writes leave half of each file and fail; the list gets one entry per write."""
    made: list[int] = []
    write_files = native.write_files

    def failing(*arguments: Any, **options: Any) -> Any:
        made.append(len(made))
        result = write_files(*arguments, **options)
        if len(made) <= times:
            for path in arguments[0]:
                os.truncate(path, os.path.getsize(path) // 2)
            raise OSError(code, os.strerror(code), arguments[0][0])
        return result

    monkeypatch.setattr(native, "write_files", failing)
    monkeypatch.setattr(write_module, "_FIRST_DELAY_S", 0.001)
    return made


def save_and_load(directory: Path) -> torch.Tensor:
    save([TensorShard("w", TENSOR, (0,), (5000,))], str(directory))
    into = torch.zeros_like(TENSOR)
    load_tensors(CheckpointIndex(str(directory)), [TensorRequest("w", into, (0,))])
    return into


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_fault_that_passes(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = fail_writes(monkeypatch, code, times=2)
    assert torch.equal(save_and_load(tmp_path), TENSOR)
    assert len(made) == 3 and caplog.text.count("Writing again") == 2


def test_the_pause_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAST_RETRIES", "100")
    made, pauses = fail_writes(monkeypatch, errno.EIO, times=100), []
    monkeypatch.setattr(write_module, "_FIRST_DELAY_S", 0.5)
    monkeypatch.setattr(write_module, "_pause", lambda seconds, _: pauses.append(seconds))
    assert torch.equal(save_and_load(tmp_path), TENSOR)
    assert len(made) == 101 and pauses[:4] == [0.5, 2, 8, 30] and max(pauses) == 30


@pytest.mark.parametrize(("code", "retries", "attempts"), [(errno.EIO, "1", 2), (errno.ENOSPC, "2", 1)])
def test_a_fault_that_stays(
    tmp_path: Path, code: int, retries: str, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_FAST_RETRIES", retries)
    made = fail_writes(monkeypatch, code, times=9)
    with pytest.raises(CheckpointWriteError) as caught:
        save_and_load(tmp_path)
    assert caught.value.errno == code and len(made) == attempts
    assert not (tmp_path / ".metadata").exists()


def test_what_could_not_be_made_durable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's error of an fsync names neither the call nor the file."""

    def fail(_: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write_module, "fsync_directory", fail)
    with pytest.raises(
        CheckpointWriteError, match=f"fsync {tmp_path}: No space left on device. The checkpoint"
    ):
        save_and_load(tmp_path)
