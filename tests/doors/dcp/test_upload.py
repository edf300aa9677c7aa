# SPDX-License-Identifier: Apache-2.0
"""Abandoned uploads: another package's writer cannot be interrupted."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ckpt_fast.doors.dcp.upload import Upload
from ckpt_fast.errors import CheckpointWriteError
from tests.doors.dcp.test_async import HeldWriter, load


def test_an_upload_that_is_given_up_keeps_its_place_while_it_writes(tmp_path: Path) -> None:
    writer, state = HeldWriter(tmp_path), {"w": torch.full((1000,), 1.0)}
    given_up = Upload(state, writer, str(tmp_path))
    given_up.stage()
    assert writer.begun.wait(20)
    assert not given_up.abandon(0.0)
    touched: list[int] = []
    again = Upload(state, dcp.FileSystemWriter(tmp_path), str(tmp_path), lambda: touched.append(1))
    with pytest.raises(CheckpointWriteError, match="is not over"):
        again.stage()
    assert not touched, "an older checkpoint"
    writer.go.set()
    assert given_up.wait(20)
    upload = Upload(state, dcp.FileSystemWriter(tmp_path), str(tmp_path), lambda: touched.append(1))
    upload.stage()
    upload.write()
    upload.commit()
    assert touched and torch.equal(load(tmp_path, state)["w"], state["w"])


def test_an_upload_that_is_interrupted_leaves_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = Upload({"w": torch.ones(1000)}, dcp.FileSystemWriter(tmp_path), str(tmp_path))

    def interrupted() -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(upload._worker, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        upload.stage()
    assert not [each for each in threading.enumerate() if each.name == "ckpt_fast-upload"]
