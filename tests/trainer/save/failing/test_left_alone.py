# SPDX-License-Identifier: Apache-2.0
"""What failed background saves leave alone: other checkpoints, and good saves behind them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast.checkpointing import maybe_finalize_async_save
from tests.helpers import run_ranks
from tests.models import Run
from tests.trainer import training
from tests.trainer.save.failing import faults
from tests.trainer.save.failing.test_going_on import GOING_ON, SETUP
from tests.trainer.training import tracked


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAST_RETRIES", "0")


def save_over(rank: int, root: str) -> tuple[int, dict[str, int]]:
    """Let a save fail whose directory has a checkpoint of another format; return what is there then."""
    directory = Path(root) / "iter_0000001"
    with Run(SETUP, save=root, **GOING_ON) as run:
        run.state.initialize_async_checkpoint_worker()
        run.train(1)
        with faults.disk_full(rank, root, 1):
            run.save()
            maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
        count = run.state.async_calls_queue.failures.count
    return count, {path.name: path.stat().st_size for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["dcp", "legacy"])
def test_a_checkpoint_of_another_format_stays(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "run" / "iter_0000001"
    directory.mkdir(parents=True)
    if kind == "dcp":
        names = [".metadata", "__0_0.distcp", "run_config.yaml"]
    else:
        (directory / "mp_rank_00").mkdir()
        names = ["mp_rank_00/model_optim_rng.pt", "run_config.yaml", "train_state.pt"]
    for name in names:
        (directory / name).write_bytes(b"of somebody else")
    before = {path.name: path.stat().st_size for path in directory.rglob("*") if path.is_file()}
    assert run_ranks(save_over, 2, str(tmp_path / "run")) == [(1, before)] * 2


def fail_too_often_with_a_good_one_behind(rank: int, root: str) -> tuple[Any, ...]:
    """Let two saves fail where one may, with a good one in flight behind them; then end the run."""
    config = {**GOING_ON, "on_save_in_progress": "queue", "max_failed_saves": 1}
    with Run(SETUP, save=root, **config) as run:
        run.state.initialize_async_checkpoint_worker()
        for step in (1, 2, 3):
            run.train(1)
            with faults.broken_disk(rank, root, step) if step < 3 else contextlib.nullcontext():
                run.save()
                for handle in run.state.async_calls_queue.handles:
                    handle.wait(60)
        error = training.error_of(
            lambda: maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)
        )
        return error, run.state.async_calls_queue.get_num_unfinalized_calls()


def test_the_last_call_publishes_what_is_good(tmp_path: Path) -> None:
    for error, left in run_ranks(fail_too_often_with_a_good_one_behind, 2, str(tmp_path / "run")):
        training.require(error, "AsyncSaveError", "2 background saves in a row failed")
        assert left == 0
    assert tracked(str(tmp_path / "run")) == (3, 3)
