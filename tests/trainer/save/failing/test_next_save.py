# SPDX-License-Identifier: Apache-2.0
"""The save after one that failed in the background reuses nothing of it, and many failures cost nothing."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast.checkpointing import maybe_finalize_async_save
from ckpt_fast.storage import owners
from tests.helpers import run_ranks
from tests.models import Run, Setup
from tests.trainer import training
from tests.trainer.save.failing import faults
from tests.trainer.save.reuse.twins import Twins
from tests.trainer.training import iterations, tracked

SETUP = Setup(layers=2, distributed=True, bf16=True)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, no_fsync: None) -> None:
    monkeypatch.setenv("CKPT_FAST_RETRIES", "0")


def fail_between(rank: int, root: str, fault: str) -> list[bool]:
    """Return, of the saves around one that failed, whether they collected objects only."""
    config = {"async_strategy": "mcore", "on_save_failure": "continue"}
    with Run(SETUP, **config) as run:
        twins = Twins(run, root)

        def save() -> bool:
            run.train(1)
            return twins.save(in_background=True)

        reused = [save(), save()]
        run.train(1)
        twins.saves += 1
        run.checkpoint.save, run.checkpoint.async_save = twins._root("kept"), True
        with faults.FAULTS[fault](rank, run.checkpoint.save, run.state.train_state.step):
            run.save(checkpointing_context=twins.context)
            maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
        assert run.state.async_calls_queue.failures.count == 1
        return [*reused, save(), save()]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("fault", ["disk_full", "unsealable", "no_room"])
def test_the_next_save_is_a_full_one(tmp_path: Path, fault: str, ranks: int) -> None:
    """And equals, bit by bit, one with a context of its own, as ``Twins`` makes sure."""
    assert run_ranks(fail_between, ranks, str(tmp_path), fault) == [[False, True, False, True]] * ranks


@pytest.mark.parametrize("fault", ["disk_full", pytest.param("unsealable", marks=pytest.mark.long)])
def test_the_same_without_the_engine(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAST_NATIVE", "0")
    assert run_ranks(fail_between, 2, str(tmp_path), fault, fresh=True) == [[False, True, False, True]] * 2


def used() -> tuple[int, int, int]:
    """Return this process's threads, descriptors, and KiB of private memory."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    resident = int(status.partition("RssAnon:")[2].split()[0])
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), resident


def fail_often(rank: int, root: str, fault: str) -> list[tuple[int, int, int]]:
    """Return what the process uses after 5 failed saves, and after 20 more."""
    uses = []
    with Run(
        Setup(layers=2, hidden=128, distributed=True, bf16=True),
        save=root,
        async_save=True,
        async_strategy="mcore",
        on_save_failure="continue",
        max_failed_saves=99,
        ckpt_assume_constant_structure=True,
    ) as run:
        run.state.initialize_async_checkpoint_worker()
        context: dict[str, Any] = {}
        for step in range(1, 26):
            run.train(1)
            with faults.FAULTS[fault](rank, root, step):
                run.save(checkpointing_context=context)
                assert not owners.is_occupied(f"{root}/iter_{step - 1:07d}")
                maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
            assert not owners.is_occupied(f"{root}/iter_{step:07d}")
            if step in (5, 25):
                time.sleep(0.2)  # a thread that has ended may still be listed
                uses.append(used())
        run.save(checkpointing_context=context)
        maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)
    return uses


@pytest.mark.parametrize("fault", ["disks_full", pytest.param("unsealable", marks=pytest.mark.long)])
def test_many_failures_cost_nothing(tmp_path: Path, fault: str) -> None:
    """The state takes 9 MB: twenty of it would show."""
    root = str(tmp_path / "run")
    for (threads, files, memory), (threads_then, files_then, memory_then) in run_ranks(
        fail_often, 2, root, fault
    ):
        assert (threads_then, files_then) <= (threads, files)
        assert memory_then - memory < 16 << 10
    assert (tracked(root), iterations(root)) == ((25, 25), [25])


def overwrite(rank: int, root: str) -> tuple[str, str]:
    """Save iteration 1 again, which fails; then load it."""
    config = {"async_save": True, "async_strategy": "mcore", "on_save_failure": "continue"}
    with Run(SETUP, save=root, load=root, **config) as run:
        run.state.initialize_async_checkpoint_worker()
        run.train(1)
        run.save()
        torch.save(run.fingerprint(), training._expected(root, 1, rank))
        maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
        with faults.disk_full(rank, root, 1), contextlib.suppress(ValueError):
            run.save()
            maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
        count = run.state.async_calls_queue.failures.count
        return training.error_of(run.load)[0], str(count)


def test_a_checkpoint_that_was_to_be_replaced_stays(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    assert run_ranks(overwrite, 2, root) == [("no error", "1")] * 2
    assert os.listdir(root).count("iter_0000001") == 1
    assert [name for name in os.listdir(root) if "iter" in name and name not in ("iter_0000001",)] == [
        "latest_checkpointed_iteration.txt"
    ]
    for loaded in run_ranks(training.load, 2, SETUP, root, 1, {"load": root}, {}):
        assert loaded.restored == training.ALL
