# SPDX-License-Identifier: Apache-2.0
"""FastCheckpointManager as a training loop calls it: with another kind of queue, and callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt_fast import FastCheckpointManager, compat
from ckpt_fast.callbacks import CallbackManager
from ckpt_fast.checkpointing import CheckpointLoadContext, CheckpointSaveContext, create_checkpoint_manager
from ckpt_fast.run.async_queue import AsyncCallsQueue
from tests.helpers import run_ranks
from tests.models import FLOPS, Run, Setup, differences, other
from tests.trainer.training import iterations, tracked

SETUP = Setup(distributed=True, bf16=True)
CLASS = "ckpt_fast.FastCheckpointManager"


def save_and_resume(rank: int, root: str, is_async: bool) -> dict[str, Any]:
    config = {"save": root, "load": root, "custom_manager_class": CLASS, "async_save": is_async}
    fired: list[int] = []
    callbacks = CallbackManager()
    callbacks.register("on_checkpoint_save", lambda context: fired.append(context.state.train_state.step))
    with Run(SETUP, **config) as run:
        if is_async:
            # What a loop that does not know us puts there: a queue for another process.
            run.state._async_calls_queue = compat.MCoreAsyncCallsQueue()
        manager = create_checkpoint_manager(run.checkpoint)
        assert isinstance(manager, FastCheckpointManager)
        for _ in range(2):
            run.train(1)
            run.state.train_state.floating_point_operations_so_far = float(FLOPS)
            context = CheckpointSaveContext(run.state, run.model, run.optimizer, run.scheduler, FLOPS)
            manager.save(context, callbacks)
            expected = run.fingerprint()
            manager.finalize_async_saves(run.state)
        run.train(1)
        manager.finalize_async_saves(run.state, blocking=True, terminate=True)
        if is_async:
            assert isinstance(run.state.async_calls_queue, AsyncCallsQueue)
            assert run.state.async_calls_queue.get_num_unfinalized_calls() == 0
    with Run(other(SETUP), **config) as run:
        run.train(1)
        manager = create_checkpoint_manager(run.checkpoint)
        result = manager.load(CheckpointLoadContext(run.state, run.model, run.optimizer, run.scheduler))
        wrong = differences(expected, run.fingerprint())
    return {"result": result, "wrong": wrong, "fired": len(fired), "there": (iterations(root), tracked(root))}


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_run_resumes_through_the_manager(tmp_path: Path, is_async: bool) -> None:
    for found in run_ranks(save_and_resume, 2, str(tmp_path), is_async):
        assert found == {"result": (2, FLOPS), "wrong": [], "fired": 2, "there": ([1, 2], (2, 2))}
