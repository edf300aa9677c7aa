# SPDX-License-Identifier: Apache-2.0
"""What ``CheckpointManager`` finds in its directory besides its own: leftovers of killed saves, and links."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast import CheckpointManager, KeepNewest
from ckpt_fast.retention.removal import remove_directory
from ckpt_fast.storage import replacement
from tests.cli.running import in_pipe
from tests.pipeline.save.test_waves import HeldDisk


def state(value: float = 1.0) -> dict[str, Any]:
    return {"w": torch.full((3,), value)}


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} - {"latest_checkpointed_iteration.txt"}


def left_by(root: Path, step: int, kind: str = "new", hours: float = 2.0) -> Path:
    """Make what a save that was killed while it replaced a step has left, and nobody has touched since."""
    path = root / f".iter_{step:07d}.0badcafe.ckpt_fast-{kind}"
    path.mkdir()
    (path / "__0_0.distcp").write_bytes(b"half")
    begun = os.stat(path).st_mtime - 3600 * hours
    for each in (path / "__0_0.distcp", path):
        os.utime(each, (begun, begun))
    return path


@pytest.mark.parametrize("policies", [None, [KeepNewest(2)]])
def test_what_killed_saves_of_other_steps_have_left_is_swept(tmp_path: Path, policies: Any) -> None:
    with CheckpointManager(tmp_path, policies=policies) as manager:
        for step in (1, 2):
            manager.save(step, state())
        manager.wait()
        for step in (1, 9):
            left_by(tmp_path, step)
        (tmp_path / ".notes.0badcafe.ckpt_fast-new").mkdir()
        os.utime(tmp_path / ".notes.0badcafe.ckpt_fast-new", (0, 0))
        manager.save(3, state())
    steps = (1, 2, 3) if policies is None else (2, 3)
    assert names(tmp_path) == {*(f"iter_{step:07d}" for step in steps), ".notes.0badcafe.ckpt_fast-new"}


def test_what_may_be_of_a_live_process_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state())
        manager.wait()
        young, old = left_by(tmp_path, 1, hours=0.9), left_by(tmp_path, 7, hours=1.5)
        monkeypatch.setenv("CKPT_FAST_TIMEOUT", "7200")
        manager.save(2, state())
        manager.wait()
        assert young.exists() and old.exists(), "a save may take that long"
        monkeypatch.delenv("CKPT_FAST_TIMEOUT")
        (old / "__0_0.distcp").write_bytes(b"half of it")
        manager.save(3, state())
        manager.wait()
        assert young.exists() and old.exists(), "somebody writes in it"


def test_what_is_being_replaced_by_this_process_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another manager of the process replaces a step, on a disk that takes hours."""
    with CheckpointManager(tmp_path, no_dist=True) as manager:
        manager.save(1, state(1.0))
    disk = HeldDisk(monkeypatch)
    other = CheckpointManager(tmp_path, no_dist=True)
    future = other.save(1, state(2.0))
    (place,) = tmp_path.glob(".iter_*")
    os.utime(place, (0, 0))
    assert str(tmp_path / "iter_0000001") not in replacement.replaced_in(str(tmp_path))
    other._directory.sweep()
    assert place.exists()
    disk.go.set()
    future.result()
    other.close()
    found = state(0.0)
    assert CheckpointManager(tmp_path).restore(found) == 1 and found["w"].tolist() == [2.0] * 3


def test_an_older_one_without_its_name_gets_it_back(tmp_path: Path) -> None:
    """Where two names cannot be exchanged, a crash may leave the older checkpoint beside its place only."""
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, state(step))
        manager.wait()
        aside = tmp_path / ".iter_0000001.0badcafe.ckpt_fast-old"
        (tmp_path / "iter_0000001").rename(aside)
        for path in (*aside.iterdir(), aside):
            os.utime(path, (0, 0))
        manager.save(3, state(3))
    assert names(tmp_path) == {"iter_0000001", "iter_0000002", "iter_0000003"}
    assert CheckpointManager(tmp_path).restore(state(), step=1) == 1


def test_links_to_archived_checkpoints(tmp_path: Path) -> None:
    root, archive = tmp_path / "run", tmp_path / "archive"
    with CheckpointManager(root) as manager:
        for step in (1, 2, 3):
            manager.save(step, state(step))
    archive.mkdir()
    shutil.move(root / "iter_0000001", archive)
    (root / "iter_0000001").symlink_to(archive / "iter_0000001")
    (root / "iter_0000009").symlink_to(archive / "nowhere")
    (root / "iter_0000008").symlink_to("iter_0000008")
    listed = in_pipe("ls", root, "--json").value
    assert [each["iteration"] for each in listed] == [1, 2, 3]
    found = state(0.0)
    assert CheckpointManager(root).restore(found, step=1) == 1 and found["w"].tolist() == [1.0] * 3
    with CheckpointManager(root, policies=[KeepNewest(1)]) as manager:
        assert manager.restore(found) == 3
        manager.save(4, state(4))
    assert names(root) == {"iter_0000001", "iter_0000004", "iter_0000008", "iter_0000009"}
    assert (archive / "iter_0000001/.metadata").exists()
    (root / "iter_0000004/.metadata").unlink()
    found = state(0.0)
    assert CheckpointManager(root).restore(found) == 1 and found["w"].tolist() == [1.0] * 3


def test_a_link_is_not_followed_even_if_it_takes_the_place_of_a_directory(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "archive") as manager:
        manager.save(1, state())
    (tmp_path / "iter_0000001").symlink_to(tmp_path / "archive/iter_0000001")
    with pytest.raises(OSError, match="symbolic link"):
        remove_directory(str(tmp_path / "iter_0000001"))
    assert (tmp_path / "archive/iter_0000001/.metadata").exists()


def test_a_step_that_is_saved_again_is_not_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program went back without a load, while the deletions of the save before were still going on."""
    with CheckpointManager(tmp_path, policies=[KeepNewest(1)], no_dist=True) as manager:
        manager.save(5, state(5)).result()
        go_on, prune = threading.Event(), manager._directory.prune

        def late(*arguments: Any) -> None:
            assert go_on.wait(60)
            prune(*arguments)

        monkeypatch.setattr(manager._directory, "prune", late)
        manager.save(9, state(9)).result()
        disk = HeldDisk(monkeypatch)
        manager.save(7, state(7))
        assert (tmp_path / "iter_0000007").is_dir()
        pruning = manager._pruning
        assert pruning is not None
        go_on.set()
        pruning.join(60)
        assert (tmp_path / "iter_0000007").is_dir()
        disk.go.set()
    found = state(0.0)
    assert CheckpointManager(tmp_path).restore(found) == 7 and found["w"].tolist() == [7.0] * 3


def test_without_a_tracker_the_later_branch_counts(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 5):
            manager.save(step, state(step))
        manager.restore(state(), step=1)
        manager.save(3, state(3))
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    assert CheckpointManager(tmp_path).latest() == 3


@pytest.mark.parametrize("directory", ["msc://profile/run", Path("msc://profile/run"), "s3://bucket/run"])
def test_object_storage_is_refused(directory: Any) -> None:
    with pytest.raises(ValueError, match="is in object storage, where CheckpointManager cannot save"):
        CheckpointManager(directory)
