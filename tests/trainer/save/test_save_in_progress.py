# SPDX-License-Identifier: Apache-2.0
"""A save is due while the previous one is still being written."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast import native
from ckpt_fast.checkpointing import maybe_finalize_async_save
from tests.helpers import run_ranks
from tests.models import Run, Setup
from tests.trainer.training import iterations, tracked

SETUP = Setup(bf16=True, distributed=True)


def save_twice(rank: int, root: str, policy: str) -> dict[str, Any]:
    """Save twice: the first save is slow on rank 1 alone, until the second has been requested."""
    opened, implementation = threading.Event(), native.engine()
    original = implementation.write_files
    if rank == 1:
        implementation.write_files = lambda *a, **k: (opened.wait(60), original(*a, **k))[1]
    try:
        with Run(
            SETUP, save=root, async_save=True, async_strategy="mcore", on_save_in_progress=policy
        ) as run:
            run.state.initialize_async_checkpoint_worker()
            queue = run.state.async_calls_queue
            run.train(1)
            run.save()
            run.train(1)
            if policy == "wait":
                threading.Timer(0.3, opened.set).start()
            run.save()
            seen = {"in flight": queue.get_num_unfinalized_calls(), "tracked": tracked(root)}
            opened.set()
            maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)
            return seen
    finally:
        implementation.write_files = original


@pytest.mark.parametrize(
    ("policy", "in_flight", "tracked_then", "saved"),
    [("wait", 1, (1, 1), [1, 2]), ("skip", 1, None, [1]), ("queue", 2, None, [1, 2])],
)
def test_policy(tmp_path: Path, policy: str, in_flight: int, tracked_then: Any, saved: list[int]) -> None:
    seen = run_ranks(save_twice, 2, str(tmp_path), policy)
    assert seen == [{"in flight": in_flight, "tracked": tracked_then}] * 2
    assert iterations(str(tmp_path)) == saved and tracked(str(tmp_path)) == (saved[-1], saved[-1])


def save_an_iteration_twice(rank: int, root: str) -> tuple[int, Any]:
    with Run(SETUP, save=root, async_save=True, async_strategy="mcore", on_save_in_progress="queue") as run:
        run.state.initialize_async_checkpoint_worker()
        run.train(1)
        run.save()
        run.save()
        in_flight = run.state.async_calls_queue.get_num_unfinalized_calls()
        maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)
        return in_flight, tracked(root)


def test_an_iteration_that_is_saved_again_is_finalized_first(tmp_path: Path) -> None:
    assert run_ranks(save_an_iteration_twice, 2, str(tmp_path)) == [(1, (1, 1))] * 2
