# SPDX-License-Identifier: Apache-2.0
"""``ckpt_fast.CheckpointManager``: what is saved, kept and restored, also after failures."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ckpt_fast import CheckpointManager, KeepBest, KeepEvery, KeepIf, KeepNewest
from ckpt_fast.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)
from ckpt_fast.manager import directory as directory_module
from ckpt_fast.retention import removal
from tests.cli.running import in_pipe
from tests.helpers import run_ranks
from tests.manager import ranks
from tests.pipeline.save.test_waves import HeldDisk

both = pytest.mark.parametrize("world", [1, 2])


def left(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.glob("iter_*"))


def save(root: Path, steps: list[int], world: int = 1, **options: Any) -> Any:
    return run_ranks(ranks.save, world, str(root), steps, options)


def restored(root: Path, world: int = 1, step: int | None = None) -> Any:
    """Return what one rank restores; all restore the same."""
    outcomes = run_ranks(ranks.restore, world, str(root), step)
    assert all(each == outcomes[0] for each in outcomes)
    return outcomes[0]


@both
def test_a_run_goes_on(tmp_path: Path, world: int) -> None:
    assert save(tmp_path, [1, 2, 3], world) == [(None, 3)] * world
    assert save(tmp_path, [4], world) == [(3, 1)] * world
    assert left(tmp_path) == [1, 2, 3, 4]
    assert restored(tmp_path, world) == ("no error", "(4, 4.0)")
    assert restored(tmp_path, world, 2) == ("no error", "(2, 2.0)")
    kind, text = restored(tmp_path, world, 9)
    assert kind == "CheckpointNotFoundError" and "there: 1, 2, 3, 4" in text


@pytest.mark.parametrize(("world", "later"), [(2, 1), (1, 2)])
def test_on_another_number_of_ranks(tmp_path: Path, world: int, later: int) -> None:
    save(tmp_path, [1], world)
    assert save(tmp_path, [2], later) == [(1, 1)] * later
    assert restored(tmp_path, world) == ("no error", "(2, 2.0)")


def test_the_files_are_those_of_torch_dcp_and_the_command_line_knows_them(tmp_path: Path) -> None:
    save(tmp_path, [1, 2], 2)
    state: dict[str, Any] = {"plain": torch.zeros(4)}
    dcp.load(state, checkpoint_id=tmp_path / "iter_0000002", no_dist=True)
    assert state["plain"].tolist() == [2.0] * 4
    found = in_pipe("ls", tmp_path, "--json").value
    assert [(each["iteration"], each["is_selected"], each["format"]) for each in found] == [
        (1, False, "dcp"),
        (2, True, "dcp"),
    ]
    assert in_pipe("verify", "--deep", tmp_path).status == 0
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    assert [each["is_selected"] for each in in_pipe("ls", tmp_path, "--json").value] == [False, True]
    assert in_pipe("prune", tmp_path, "--keep", 1).status == 0
    assert left(tmp_path) == [2]


def damage(root: Path, step: int, how: str) -> None:
    directory = root / f"iter_{step:07d}"
    if how == "removed":
        shutil.rmtree(directory)
        return
    if how == "unsealed":
        (directory / ".metadata").unlink()
        return
    path = directory / ".metadata" if how == "metadata" else max(directory.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[-1]
    else:
        for position in range(len(content)):  # one bit could be in what nobody reads
            content[position] ^= 1
    path.write_bytes(content)


@both
@pytest.mark.parametrize("how", ["flipped", "truncated", "metadata", "unsealed", "removed"])
def test_a_damaged_one_falls_back(tmp_path: Path, world: int, how: str) -> None:
    save(tmp_path, [1, 2, 3], world)
    damage(tmp_path, 3, how)
    assert restored(tmp_path, world) == ("no error", "(2, 2.0)")
    for step in (1, 2):
        damage(tmp_path, step, "flipped")
    kind, text = restored(tmp_path, world)
    assert kind == "CheckpointCorruptError" and "iter_0000003" in text, "that of the newest"


@pytest.mark.parametrize("content", [None, b"", b"soon", b"\xff"])
def test_without_a_sound_tracker_the_newest_whole_one_counts(tmp_path: Path, content: bytes | None) -> None:
    save(tmp_path, [1, 2, 3])
    damage(tmp_path, 3, "truncated")
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.unlink() if content is None else tracker.write_bytes(content)
    assert restored(tmp_path) == ("no error", "(2, 2.0)")


def test_checkpoints_of_which_none_is_whole_are_no_reason_to_begin_anew(tmp_path: Path) -> None:
    save(tmp_path, [1, 2])
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    for step in (1, 2):
        damage(tmp_path, step, "truncated")
    kind, text = restored(tmp_path)
    assert kind == "CheckpointCorruptError" and "none of the checkpoints in" in text


def test_a_tracker_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, [1])

    def refuse(*_: Any) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(directory_module, "read_small_file", refuse)
    with pytest.raises(CheckpointError, match="cannot be read"):
        CheckpointManager(tmp_path).latest()


def test_a_partial_load_is_of_one_checkpoint(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": torch.ones(3)})
        manager.save(2, {"w": torch.ones(3), "new": torch.ones(3)})
    damage(tmp_path, 2, "truncated")
    found = {"w": torch.zeros(3), "new": torch.full((3,), -7.0)}
    with pytest.raises(CheckpointCorruptError):
        CheckpointManager(tmp_path).restore(found, allow_partial_load=True)
    assert found["new"].tolist() == [-7.0] * 3


def test_a_run_that_was_not_restored_deletes_nothing_but_by_the_policies(tmp_path: Path) -> None:
    policies = [KeepNewest(3), KeepEvery(5)]
    with CheckpointManager(tmp_path, policies=policies) as manager:
        for step in range(1, 13):
            manager.save(step, {"w": torch.ones(3)})
    with CheckpointManager(tmp_path, policies=policies) as manager:
        manager.save(13, {"w": torch.ones(3)})
    assert left(tmp_path) == [5, 10, 11, 12, 13]


def test_deletions_do_not_hold_up_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, original = threading.Event(), directory_module.remove_directory

    def slowly(path: str) -> None:
        assert go_on.wait(60)
        original(path)

    monkeypatch.setattr(directory_module, "remove_directory", slowly)
    with CheckpointManager(tmp_path, policies=[KeepNewest(1)]) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"w": torch.ones(3)}).result()
        assert left(tmp_path) == [1, 2, 3]
        go_on.set()
    assert left(tmp_path) == [3]


@pytest.mark.parametrize("again", [1, 2])
def test_a_step_that_is_saved_again_is_not_deleted_as_an_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: int
) -> None:
    """Steps 1 and 2 are chosen. Before 1 is gone, the program goes back and saves one of them again."""
    inside, go_on, original = threading.Event(), threading.Event(), directory_module.remove_directory

    def slowly(path: str) -> None:
        inside.set()
        assert go_on.wait(60)
        original(path)

    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, {"w": torch.ones(3)})
    monkeypatch.setattr(directory_module, "remove_directory", slowly)
    with CheckpointManager(tmp_path, policies=[KeepNewest(1)]) as manager:
        manager.save(3, {"w": torch.full((3,), 3.0)}).result()
        assert inside.wait(60)
        # A save to the directory that is being deleted has to wait for that.
        threading.Timer(0.3, go_on.set).start() if again == 1 else None
        manager.save(again, {"w": torch.full((3,), 7.0)}).result()
        go_on.set()
    assert left(tmp_path) == [again, 3] and CheckpointManager(tmp_path).latest() == again
    found = {"w": torch.zeros(3)}
    assert CheckpointManager(tmp_path).restore(found) == again and found["w"].tolist() == [7.0] * 3


def test_late_deletions_leave_what_was_published_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deletions for step 5 begin once step 4 is the newest: the program has gone back."""
    inside, go_on, original = threading.Event(), threading.Event(), directory_module.remove_directory

    def slowly(path: str) -> None:
        inside.set()
        assert go_on.wait(60)
        original(path)

    monkeypatch.setattr(directory_module, "remove_directory", slowly)
    with CheckpointManager(tmp_path, policies=[KeepNewest(2)]) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"w": torch.full((3,), float(step))}).result()
        assert inside.wait(60)
        for step in (5, 4):
            manager.save(step, {"w": torch.full((3,), float(step))}).result()
        go_on.set()
    assert left(tmp_path) == [3, 4, 5]
    found = {"w": torch.zeros(3)}
    assert CheckpointManager(tmp_path).restore(found) == 4 and found["w"].tolist() == [4.0] * 3


def test_the_signal_is_caught_until_all_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = HeldDisk(monkeypatch)
    with CheckpointManager(tmp_path, save_on=signal.SIGUSR1) as manager:
        manager.save(1, {"w": torch.ones(3)})
        threading.Timer(0.2, lambda: (os.kill(os.getpid(), signal.SIGUSR1), disk.go.set())).start()
    assert CheckpointManager(tmp_path).latest() == 1


@both
def test_policies_follow_the_line_of_the_run(tmp_path: Path, world: int) -> None:
    save(tmp_path, [1, 2, 3], world)
    assert run_ranks(ranks.roll_back, world, str(tmp_path)) == [[2, 4]] * world
    assert left(tmp_path) == [2, 4]
    damage(tmp_path, 4, "truncated")
    assert restored(tmp_path, world) == ("no error", "(2, 2.0)")


def test_fall_back_follows_the_line_of_the_run(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"w": torch.full((2,), float(step))})
        assert manager.restore({"w": torch.zeros(2)}, step=1) == 1
        manager.save(4, {"w": torch.full((2,), 4.0)})
    damage(tmp_path, 4, "truncated")
    found = {"w": torch.zeros(2)}
    assert CheckpointManager(tmp_path).restore(found) == 1 and found["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("policies", "expected"),
    [
        ([KeepNewest(1)], [6]),
        ([KeepNewest(1), KeepEvery(3)], [3, 6]),
        ([KeepNewest(1), KeepBest(1)], [2, 6]),
        ([KeepNewest(0)], [6]),
        ([KeepNewest(1), KeepIf(lambda each: each.iteration == 4)], [4, 6]),
        (None, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_policies(tmp_path: Path, policies: Any, expected: list[int]) -> None:
    with CheckpointManager(tmp_path, policies=policies) as manager:
        for step in range(1, 7):
            manager.save(step, {"w": torch.ones(3)}, metrics={"loss": abs(step - 2)})
    assert left(tmp_path) == expected


def test_training_waits_only_if_a_save_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = HeldDisk(monkeypatch)
    with CheckpointManager(tmp_path) as manager:
        assert manager.latest() is None and manager.wait() is None
        first = manager.save(1, {"w": torch.ones(3)})
        assert not first.done() and manager.latest() is None
        disk.go.set()
        second = manager.save(2, {"w": torch.ones(3)})
        assert first.done()
    assert second.done() and manager.latest() == 2


@both
def test_a_failed_save_is_raised_by_the_next_call_on_all_ranks(tmp_path: Path, world: int) -> None:
    outcomes = run_ranks(ranks.fail_once, world, str(tmp_path))
    for outcome in outcomes:
        assert outcome["failed"][0] == "AsyncSaveError" and "the disk is broken" in outcome["failed"][1]
        assert outcome["latest"] == 1 and outcome["after"][0] == 4
    assert restored(tmp_path, world) == ("no error", "(4, 4.0)")


@both
def test_a_save_that_fails_at_the_end_is_raised_unless_the_block_ends_with_an_error(
    tmp_path: Path, world: int
) -> None:
    for kind, _ in run_ranks(ranks.fail_at_the_end, world, str(tmp_path), False):
        assert kind == "AsyncSaveError"
    for kind, _ in run_ranks(ranks.fail_at_the_end, world, str(tmp_path), True):
        assert kind == "KeyError"


@pytest.mark.parametrize(("world", "first"), [(1, 0), (2, 1)])
def test_a_signal_on_one_rank_lets_all_save_and_stop(tmp_path: Path, world: int, first: int) -> None:
    outcomes = run_ranks(ranks.train_until_told, world, str(tmp_path), first, fresh=True)
    assert outcomes == [([5, 7], True, 7)] * world


def test_nothing_is_saved_twice_because_of_a_signal(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_every=2) as manager:
        manager.save(2, {"w": torch.ones(3)})
        assert not manager.should_save(2) and not manager.should_save(3) and manager.should_save(4)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    code = f"from tests.manager.ranks import save_for_ever; save_for_ever({str(tmp_path)!r})"
    newest = 0
    for pause in (0.0, 0.02, 0.05):
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code])
        try:
            end = time.monotonic() + 60
            while not any(step > newest + 2 for step in left(tmp_path)) and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(pause)
        finally:
            process.kill()
            process.wait()
        found: dict[str, Any] = {"w": torch.zeros(200_000), "step": 0}
        step = CheckpointManager(tmp_path).restore(found)
        assert step is not None and step > newest
        assert found["step"] == step and found["w"].eq(step).all()
        newest = step


def test_a_crash_while_pruning_leaves_nothing_that_passes_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            removal.shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError(5, "broken", path))
        )
        with CheckpointManager(tmp_path, policies=[KeepNewest(1)]) as manager:
            for step in (1, 2):
                manager.save(step, {"w": torch.full((3,), float(step))})
    assert left(tmp_path) == [1, 2] and not (tmp_path / "iter_0000001/.metadata").exists()
    damage(tmp_path, 2, "truncated")
    with pytest.raises(CheckpointCorruptError, match="iter_0000002"):
        CheckpointManager(tmp_path).restore({"w": torch.zeros(3)})
    with CheckpointManager(tmp_path, policies=[KeepNewest(1)]) as manager:
        manager.save(3, {"w": torch.ones(3)})
    assert left(tmp_path) == [3]


def test_policies_that_fail_delete_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CheckpointManager(tmp_path, policies=[KeepNewest(1), KeepIf(lambda each: 1 / 0 > 0)]) as manager:
        for step in (1, 2):
            manager.save(step, {"w": torch.ones(3)})
    assert left(tmp_path) == [1, 2] and "none is deleted" in caplog.text


def test_what_does_not_fit_is_no_damage(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": torch.ones(3)})
        manager.save(2, {"w": torch.ones(3)})
        with pytest.raises(CheckpointMismatchError):
            manager.restore({"w": torch.zeros(4)})
        with pytest.raises(CheckpointNotFoundError):
            manager.restore({"w": torch.zeros(3)}, step=7)
        found = {"w": torch.zeros(3), "new": torch.zeros(1)}
        assert manager.restore(found, allow_partial_load=True) == 2


@pytest.mark.parametrize("step", [0, -1, True, 1.0])
def test_steps_count_from_one(tmp_path: Path, step: Any) -> None:
    with pytest.raises(ValueError, match="positive whole number"):
        CheckpointManager(tmp_path).save(step, {"w": torch.ones(3)})
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="save_every=0"):
        CheckpointManager(tmp_path, save_every=0)
    with pytest.raises(ValueError, match="is no policy"):
        CheckpointManager(tmp_path, policies=[3])  # type: ignore[list-item]
