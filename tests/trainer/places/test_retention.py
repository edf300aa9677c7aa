# SPDX-License-Identifier: Apache-2.0
"""Retention: what is kept, what is deleted, and what a crash or an error in between leaves."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.retention import removal
from ckpt_fast.state import TrainState
from ckpt_fast.storage import owners
from ckpt_fast.trainer.places import retention
from ckpt_fast.trainer.places.retention import cleanup_old_dataloader_states
from ckpt_fast.trainer.places.retention import cleanup_old_non_persistent_checkpoint as cleanup
from tests.helpers import run_ranks
from tests.models import Run, Setup

SEAL = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for variable in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(variable, raising=False)


def checkpoint(root: Path, iteration: int, finished: bool = True) -> Path:
    path = root / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"data")
    if finished:
        (path / ".metadata").write_bytes(b"m")
        (path / "metadata.json").write_text(SEAL)
    return path


def track(root: Path, iteration: int, megatron_lm: int | str | None = None) -> None:
    torch.save(TrainState(step=iteration).state_dict(), root / "latest_train_state.pt")
    text = iteration if megatron_lm is None else megatron_lm
    (root / "latest_checkpointed_iteration.txt").write_text(str(text))


def left(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.glob("iter_[0-9]*") if path.is_dir())


def test_keeps_the_newest(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "ckpt_fast")
    for iteration in (9, 10, 100, 1_000_000, 20_000_000):  # the last has more than seven digits
        checkpoint(tmp_path, iteration)
    cleanup(str(tmp_path), leave_ckpt_num=2)
    assert left(tmp_path) == [1_000_000, 20_000_000]
    removed, kept = caplog.messages
    assert "iter_0000009" in removed and "iter_0000100" in removed
    assert "iter_20000000" in kept and "iter_0000009" not in kept


def test_one_is_kept_by_default(tmp_path):
    for iteration in (1, 2, 3):
        checkpoint(tmp_path, iteration)
    cleanup(str(tmp_path))
    assert left(tmp_path) == [3]


@pytest.mark.parametrize("keep", [None, -1])
def test_keep_all(tmp_path, keep):
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)
    cleanup(str(tmp_path), leave_ckpt_num=keep)
    assert left(tmp_path) == [1, 2]


def test_zero_deletes_all(tmp_path):
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)
    cleanup(str(tmp_path), leave_ckpt_num=0)
    assert left(tmp_path) == []


def test_zero_leaves_the_one_to_resume_from(tmp_path):
    for iteration in (1, 2, 3):
        checkpoint(tmp_path, iteration)
    track(tmp_path, 3)
    cleanup(str(tmp_path), leave_ckpt_num=0, max_iteration=3)
    assert left(tmp_path) == [3]


def test_newer_ones_may_be_in_progress(tmp_path):
    for iteration in (1, 2, 3, 4):
        checkpoint(tmp_path, iteration)
    cleanup(str(tmp_path), leave_ckpt_num=1, max_iteration=2)
    assert left(tmp_path) == [2, 3, 4]


def test_after_a_roll_back_the_resumed_run_is_kept(tmp_path):
    """Iterations 150 and 160 are from before the rollback to 80."""
    for iteration in (80, 90, 100, 150, 160):
        checkpoint(tmp_path, iteration)
    track(tmp_path, 100)
    cleanup(str(tmp_path), leave_ckpt_num=2)
    assert left(tmp_path) == [90, 100, 150, 160]


def test_both_trackers_count(tmp_path):
    for iteration in (1, 2, 3, 4):
        checkpoint(tmp_path, iteration)
    track(tmp_path, 4, megatron_lm=1)
    cleanup(str(tmp_path), leave_ckpt_num=1)
    assert left(tmp_path) == [1, 4]


def test_release_tracker(tmp_path):
    for iteration in (1, 2):
        checkpoint(tmp_path, iteration)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    cleanup(str(tmp_path), leave_ckpt_num=1)
    assert left(tmp_path) == [2]


@pytest.mark.parametrize("tracker", ["latest_checkpointed_iteration.txt", "latest_train_state.pt"])
def test_nothing_is_deleted_when_a_tracker_cannot_be_read(tmp_path, tracker, caplog):
    for iteration in (1, 2):
        checkpoint(tmp_path, iteration)
    (tmp_path / tracker).write_text("rubbish")
    cleanup(str(tmp_path), leave_ckpt_num=1)
    assert left(tmp_path) == [1, 2]
    assert "none is deleted" in caplog.text


@pytest.mark.parametrize("names", [[], [".__0_0.distcp.0badcafe.partial"], ["common.pt", "__0_0.distcp"]])
def test_what_is_not_whole_is_neither_counted_nor_protected(tmp_path, names):
    """Saves of 2 and 5 died; one of 7 may be in progress."""
    for iteration in (1, 3, 4, 6):
        checkpoint(tmp_path, iteration)
    for iteration in (2, 5, 7):
        path = tmp_path / f"iter_{iteration:07d}"
        path.mkdir()
        for name in names:
            (path / name).touch()
    track(tmp_path, 6)
    cleanup(str(tmp_path), leave_ckpt_num=3, max_iteration=6)
    assert left(tmp_path) == [3, 4, 6, 7]


def test_a_damaged_one_does_not_count(tmp_path):
    for iteration in (1, 2, 3):
        checkpoint(tmp_path, iteration)
    (tmp_path / "iter_0000002/.metadata").unlink()
    track(tmp_path, 3)
    cleanup(str(tmp_path), leave_ckpt_num=2)
    assert left(tmp_path) == [1, 3]


def test_checkpoints_of_other_kinds_count(tmp_path):
    (tmp_path / "iter_0000001/mp_rank_00").mkdir(parents=True)
    (tmp_path / "iter_0000002/model.weight").mkdir(parents=True)
    (tmp_path / "iter_0000002/metadata.json").write_text(SEAL.replace("torch_dist", "zarr"))
    (tmp_path / "iter_0000002/common.pt").touch()
    checkpoint(tmp_path, 3)
    track(tmp_path, 3)
    cleanup(str(tmp_path), leave_ckpt_num=3)
    assert left(tmp_path) == [1, 2, 3]


def test_the_newest_stay_where_none_is_known_to_be_whole(tmp_path):
    for iteration in (1, 2, 3):
        (tmp_path / f"iter_{iteration:07d}").mkdir()
    cleanup(str(tmp_path), leave_ckpt_num=2)
    assert left(tmp_path) == [2, 3]


def test_unfinished_ones_do_not_count(tmp_path):
    """The save of iteration 3 died; without it, two checkpoints must remain."""
    for iteration in (1, 2, 4):
        checkpoint(tmp_path, iteration)
    checkpoint(tmp_path, 3, finished=False)
    track(tmp_path, 4)
    cleanup(str(tmp_path), leave_ckpt_num=2)
    assert left(tmp_path) == [2, 4]


def test_other_names_stay(tmp_path):
    for iteration in (1, 2, 3):
        checkpoint(tmp_path, iteration)
    strays = ["iter_best", "iter_", "release", "energon/iter_0000001", "non_persistent/iter_0000001"]
    for name in strays:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "iter_0000000").write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "iter_0000009").symlink_to(tmp_path / "elsewhere")
    cleanup(str(tmp_path), leave_ckpt_num=1)
    assert (tmp_path / "iter_0000003").is_dir()
    assert not (tmp_path / "iter_0000002").exists()
    assert all((tmp_path / name).is_dir() for name in [*strays, "elsewhere"])
    assert (tmp_path / "iter_0000000").read_text() == "a file"
    assert (tmp_path / "iter_0000009").is_symlink()


@pytest.mark.parametrize("name", ["", "missing"])
def test_nothing_to_do(tmp_path, name, caplog):
    caplog.set_level(logging.DEBUG, "ckpt_fast")
    cleanup(str(tmp_path / name))
    assert caplog.messages == []


def test_nothing_is_said_if_nothing_is_removed(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "ckpt_fast")
    checkpoint(tmp_path, 1)
    cleanup(str(tmp_path), leave_ckpt_num=2)
    assert caplog.messages == []


def hold_removals(monkeypatch):
    """Let deletions set the first event when they begin, and go on when the second is set."""
    inside, gate, remove = threading.Event(), threading.Event(), retention._remove_checkpoint

    def held(path):
        inside.set()
        assert gate.wait(60)
        remove(path)

    monkeypatch.setattr(retention, "_remove_checkpoint", held)
    return inside, gate


def test_in_the_background_on_a_thread_that_an_exit_waits_for(tmp_path, monkeypatch):
    inside, gate = hold_removals(monkeypatch)
    for iteration in (1, 2):
        checkpoint(tmp_path, iteration)
    before = set(threading.enumerate())
    cleanup(str(tmp_path), do_async=True)
    assert inside.wait(10)
    assert left(tmp_path) == [1, 2]
    (thread,) = set(threading.enumerate()) - before
    assert not thread.daemon
    gate.set()
    thread.join(10)
    assert left(tmp_path) == [2]


def replaced(root: Path, path: Path) -> None:
    """Let another process exchange a checkpoint for a new one."""
    path.rename(root / "before")
    checkpoint(root, int(path.name[5:]))


def saved_here(root: Path, path: Path) -> None:
    """Let this process save into a directory, as into object storage, where nothing tells two saves apart."""
    save = owners.Hold()
    owners.occupy(str(path), save)
    save.let_go()


@pytest.mark.parametrize("save", [replaced, saved_here])
def test_what_is_saved_again_before_its_turn_is_not_deleted(tmp_path, monkeypatch, save):
    """After a roll-back: deletions of a large directory take long."""
    inside, gate = hold_removals(monkeypatch)
    paths = [checkpoint(tmp_path, iteration) for iteration in (1, 2, 3)]
    before = set(threading.enumerate())
    cleanup(str(tmp_path), do_async=True)
    assert inside.wait(10)
    save(tmp_path, paths[1])
    gate.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert left(tmp_path) == [2, 3] and (paths[1] / ".metadata").exists()


def test_a_save_waits_for_the_deletion_in_its_directory(tmp_path, monkeypatch):
    inside, gate = hold_removals(monkeypatch)
    path = checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)
    cleanup(str(tmp_path), do_async=True)
    assert inside.wait(10)
    monkeypatch.setenv("CKPT_FAST_TIMEOUT", "1")
    with pytest.raises(CheckpointWriteError, match="still being deleted"):
        owners.occupy(str(path), owners.Hold())
    monkeypatch.delenv("CKPT_FAST_TIMEOUT")
    threading.Timer(0.1, gate.set).start()
    owners.occupy(str(path), owners.Hold())
    assert left(tmp_path) == [2]


def test_a_relative_path_keeps_its_meaning(tmp_path, monkeypatch):
    for iteration in (1, 2):
        checkpoint(tmp_path, iteration)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    removing, moved = retention._remove_checkpoints, threading.Event()
    monkeypatch.setattr(retention, "_remove_checkpoints", lambda paths: moved.wait() and removing(paths))
    before = set(threading.enumerate())
    cleanup(".", do_async=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved.set()
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert left(tmp_path) == [2]


@pytest.mark.parametrize("do_async", [False, True])
def test_failures_are_logged_and_the_others_are_deleted(tmp_path, monkeypatch, caplog, do_async):
    rmtree = removal.shutil.rmtree

    def stubborn(path):
        if path.endswith("iter_0000001"):
            raise OSError(16, "Device or resource busy", path)
        rmtree(path)

    monkeypatch.setattr(removal.shutil, "rmtree", stubborn)
    for iteration in (1, 2, 3):
        checkpoint(tmp_path, iteration)
    before = set(threading.enumerate())
    with caplog.at_level(logging.ERROR):
        cleanup(str(tmp_path), do_async=do_async)
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
    assert left(tmp_path) == [1, 3]
    assert "iter_0000001" in caplog.text and "busy" in caplog.text


def test_a_half_deleted_checkpoint_does_not_pass_for_a_whole_one(tmp_path, monkeypatch):
    """Whenever the process dies while deleting, the seal is gone before any data."""
    old = checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)
    seen = []

    def die(path):
        seen.append(sorted(os.listdir(path)))
        raise OSError("killed here")

    monkeypatch.setattr(removal.shutil, "rmtree", die)
    unlink, order = os.unlink, []
    monkeypatch.setattr(os, "unlink", lambda path: (unlink(path), order.append(os.path.basename(path)))[0])
    cleanup(str(tmp_path))
    assert order == ["metadata.json", ".metadata"]
    assert seen == [["__0_0.distcp"]]
    monkeypatch.undo()
    cleanup(str(tmp_path))
    assert not old.exists()


def test_a_rank_other_than_0_of_a_launcher_does_nothing(tmp_path, monkeypatch):
    for iteration in (1, 2):
        checkpoint(tmp_path, iteration)
    monkeypatch.setenv("RANK", "1")
    cleanup(str(tmp_path))
    assert left(tmp_path) == [1, 2]


def cleanup_on(rank, active, root):
    if rank == active:
        cleanup(root)


@pytest.mark.parametrize(("active", "expected"), [(1, [1, 2]), (0, [2])])
def test_only_rank_0_deletes(tmp_path, active, expected):
    for iteration in (1, 2):
        checkpoint(tmp_path, iteration)
    run_ranks(cleanup_on, 2, active, str(tmp_path))
    assert left(tmp_path) == expected


def test_dataloader_states_go_with_their_checkpoints(tmp_path):
    """Recovery checkpoints come and go; the states beside them must not pile up."""
    states = tmp_path / "run/energon"
    for iteration in range(1, 10):
        (states / f"iter_{iteration:07d}").mkdir(parents=True)
    (states / "notes").mkdir()
    (tmp_path / "run/iter_0000002").mkdir()
    (tmp_path / "run/non_persistent").mkdir()
    (tmp_path / "archive").mkdir()
    (tmp_path / "run/non_persistent/iter_0000004").symlink_to(tmp_path / "archive")
    roots = [str(tmp_path / "run"), str(tmp_path / "run/non_persistent")]
    cleanup_old_dataloader_states(str(states), roots, newest=8)
    left = sorted(path.name for path in states.iterdir())
    assert left == [f"iter_{iteration:07d}" for iteration in (2, 4, 7, 8, 9)] + ["notes"]
    cleanup_old_dataloader_states(str(tmp_path / "nothing"), roots, newest=8)


def save_recovery_checkpoints(rank, root):
    loader = SimpleNamespace(iterable=SimpleNamespace(save_state=lambda: {"position": 1}))
    with Run(Setup(), save=root, non_persistent_ckpt_type="global", most_recent_k=1) as run:
        for _ in range(5):
            run.train(1)
            run.save(train_data_iterator=loader, non_persistent_ckpt=True)


def test_recovery_checkpoints_take_their_dataloader_states_along(tmp_path):
    run_ranks(save_recovery_checkpoints, 1, str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "energon").iterdir()) == ["iter_0000004", "iter_0000005"]
