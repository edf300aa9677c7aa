# SPDX-License-Identifier: Apache-2.0
"""The times of a report, all of them, count from the call that saves."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import ckpt_fast
from ckpt_fast.checkpointing import maybe_finalize_async_save
from ckpt_fast.jobs.report import SaveReport, counted_from
from ckpt_fast.trainer.save import save
from tests.helpers import run_ranks
from tests.models import Run, Setup

LONG_AGO_S = 1000.0


def test_a_report_counts_from_where_the_call_began() -> None:
    assert SaveReport("x").since_call() < LONG_AGO_S
    with counted_from(time.perf_counter() - LONG_AGO_S):
        report = SaveReport("x")
    assert report.since_call() >= LONG_AGO_S
    assert SaveReport("x").since_call() < LONG_AGO_S


def times(rank: int, directory: str, in_background: bool) -> tuple[float, float, float]:
    """Save with a call that seems to have begun long ago; return what its report says."""
    with (
        pytest.MonkeyPatch.context() as patch,
        Run(Setup(), save=directory, async_save=in_background) as run,
    ):
        run.state.initialize_async_checkpoint_worker()
        run.train(1)
        clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() - LONG_AGO_S)
        patch.setattr(save, "time", clock)
        run.save()
        patch.undo()
        maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
        report = ckpt_fast.last_report()
        assert report is not None
        return report.stall_s, report.written_s, report.seconds


@pytest.mark.parametrize("in_background", [False, True])
def test_save_checkpoint_counts_from_its_call(tmp_path: Path, in_background: bool) -> None:
    ((held_up, durable, published),) = run_ranks(times, 1, str(tmp_path), in_background)
    # What the call measures itself, it measures with the clock that is late.
    assert held_up < LONG_AGO_S if in_background else held_up >= LONG_AGO_S
    assert durable >= LONG_AGO_S and published >= LONG_AGO_S
