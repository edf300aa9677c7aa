# SPDX-License-Identifier: Apache-2.0
"""Saves that are written while training continues: what they contain, and when they become visible."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast.callbacks import CallbackManager
from ckpt_fast.checkpointing import maybe_finalize_async_save
from tests.helpers import RankError, run_ranks
from tests.models import Run, Setup, differences, other
from tests.trainer import training
from tests.trainer.training import ALL, is_sealed, iterations, tracked

SETUP = Setup(bf16=True, distributed=True)
BACKGROUND = {"async_save": True, "async_strategy": "mcore"}


def finalize(run: Run, **options: Any) -> None:
    maybe_finalize_async_save(run.state, run.checkpoint, **options)


def save_in_background(rank: int, root: str) -> list[str]:
    fired: list[int] = []
    manager = CallbackManager()
    manager.register("on_checkpoint_save", lambda context: fired.append(context.state.train_state.step))
    with Run(SETUP, save=root, most_recent_k=1, on_save_in_progress="queue", **BACKGROUND) as run:
        run.state.initialize_async_checkpoint_worker()
        run.train(1)
        run.save(callback_manager=manager)
        assert run.state.async_calls_queue.get_num_unfinalized_calls() == 1
        expected = run.fingerprint()
        assert tracked(root) is None
        assert fired == []
        assert not is_sealed(root, 1)
        # Everything that training changes is changed while the save is in flight.
        run.train(2)
        finalize(run, blocking=True)
        assert tracked(root) == (1, 1)
        assert fired == [3]
        assert run.state.async_calls_queue.get_num_unfinalized_calls() == 0

        run.save()
        run.train(1)
        run.save()
        # Two in flight; the first checkpoint stays until one of them replaces it.
        assert (tracked(root), is_sealed(root, 1)) == ((1, 1), True)
        torch.distributed.barrier()
    with Run(other(SETUP), load=root) as loading:
        loading.load()
        wrong = differences(expected, loading.fingerprint())
    finalize(run, blocking=True, terminate=True)
    assert tracked(root) == (4, 4)
    return wrong


def test_background_save_holds_the_state_at_the_call(tmp_path: Path) -> None:
    assert run_ranks(save_in_background, 2, str(tmp_path)) == [[], []]
    # Deletion continues in a thread.
    wait_until(lambda: iterations(str(tmp_path)) == [4])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finalize_without_blocking(rank: int, root: str) -> int:
    with Run(SETUP, save=root, **BACKGROUND) as run:
        run.state.initialize_async_checkpoint_worker()
        run.train(1)
        run.save()
        polls = 0
        while run.state.async_calls_queue.get_num_unfinalized_calls():
            finalize(run)
            polls += 1
        assert tracked(root) == (1, 1)
        return polls


def test_finalizing_without_blocking_gets_there_on_all_ranks_at_once(tmp_path: Path) -> None:
    polls = run_ranks(finalize_without_blocking, 2, str(tmp_path))
    assert polls[0] == polls[1]


def test_without_a_queue_the_save_is_made_at_once(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    run_ranks(training.save_steps, 2, SETUP, root, 1, BACKGROUND)
    assert tracked(root) == (1, 1)
    loaded = run_ranks(training.load, 2, SETUP, root, 1, {"load": root}, {})
    assert [each.restored for each in loaded] == [ALL, ALL]


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dcp"])
@pytest.mark.parametrize(
    "config", [{}, {"async_save": True, "async_strategy": "mcore"}], ids=["sync", "background"]
)
def test_formats_that_cannot_be_loaded_are_not_saved(
    tmp_path: Path, config: dict[str, Any], ckpt_format: str
) -> None:
    root = tmp_path / "run"
    with pytest.raises(RankError, match=f"ckpt_format '{ckpt_format}' cannot be saved") as caught:
        run_ranks(training.save_steps, 1, SETUP, str(root), 1, {**config, "ckpt_format": ckpt_format})
    assert caught.value.errors == {0: "NotImplementedError"}
    assert not root.exists()


class Uploads:
    """Replaces MLflow; records uploads."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def log_artifacts(self, path: str, artifact_path: str) -> None:
        self.paths.append(os.path.basename(path))


class Notes:
    """Replaces Comet; records notes."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log_other(self, name: str, value: Any) -> None:
        if name == "last_saved_iteration":
            self.steps.append(value)


def change_settings_in_flight(rank: int, root: str) -> tuple[list[str], list[int]]:
    uploads, notes = Uploads(), Notes()
    with Run(SETUP, save=root, **BACKGROUND) as run:
        run.state.initialize_async_checkpoint_worker()
        run.state._mlflow_logger, run.state._comet_logger = uploads, notes
        for wanted in (True, False):
            run.train(1)
            run.state.cfg.logger.mlflow_log_artifacts = wanted
            run.save()
            run.state.cfg.logger.mlflow_log_artifacts = not wanted
            run.train(1)
            finalize(run, blocking=True)
    return uploads.paths, notes.steps


def test_loggers_get_the_values_at_the_call(tmp_path: Path) -> None:
    """With the settings and the step of the time of the call."""
    assert run_ranks(change_settings_in_flight, 1, str(tmp_path)) == [(["iter_0000001"], [1, 3])]
