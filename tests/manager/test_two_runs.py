# SPDX-License-Identifier: Apache-2.0
"""Two runs, or a run and ``ckpt-fast prune``, in one directory: nothing breaks, and somebody is told."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ckpt_fast import CheckpointManager, KeepNewest
from ckpt_fast.retention import removal
from ckpt_fast.state import TrainState
from ckpt_fast.trainer.places import trackers
from tests.helpers import run_ranks

SAYING = "another run saves to the same directory"


def test_a_directory_that_several_delete_is_deleted(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            checkpoint = tmp_path / "iter_0000001"
            checkpoint.mkdir()
            for name in (".metadata", "metadata.json", *map(str, range(50))):
                (checkpoint / name).touch()
            start = threading.Barrier(4)

            def remove(path: str = str(checkpoint), start: threading.Barrier = start) -> None:
                start.wait(60)
                removal.remove_directory(path)

            for done in [threads.submit(remove) for _ in range(4)]:
                done.result()
            assert not checkpoint.exists()


def test_what_goes_while_its_seal_is_made_durable_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001/.metadata").touch()

    def too_late(path: str) -> None:
        shutil.rmtree(path)
        raise FileNotFoundError(path)

    monkeypatch.setattr(removal, "fsync_directory", too_late)
    removal.remove_directory(str(tmp_path / "iter_0000001"))


def save_step(rank: int, root: str, step: int) -> None:
    with CheckpointManager(root) as manager:
        manager.save(step, {"w": torch.ones(3)})


def test_a_manager_tells_of_another_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CheckpointManager(tmp_path, no_dist=True, policies=[KeepNewest(2)]) as manager:
        for step in (1, 2):
            manager.save(step, {"w": torch.ones(3)})
        manager.wait()
        assert SAYING not in caplog.text
        run_ranks(save_step, 1, str(tmp_path), 7)
        for step in (3, 4, 5):
            manager.save(step, {"w": torch.ones(3)})
    assert caplog.text.count(SAYING) == 1
    assert "says '7', and this run has written '2'" in caplog.text


def test_a_run_of_megatron_tells_of_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = trackers.snapshot_train_state(TrainState(step=4), 0)
    for iteration in (4, 8):
        trackers.publish_trackers(str(tmp_path), iteration, state)
    assert SAYING not in caplog.text
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("6")
    for iteration in (12, 16):
        trackers.publish_trackers(str(tmp_path), iteration, state)
    assert caplog.text.count(SAYING) == 1 and tracker.read_text() == "16"
